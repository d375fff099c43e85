"""The notebooks of the course: clean, numbered, every exercise answered, and readable without a network.

Those that read results are run on the smoke results in test_reproduce.py, as `make notebooks` does it, the others here.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from copy import deepcopy
from functools import cache
from pathlib import Path
from xml.etree import ElementTree

import matplotlib as mpl
import nbformat
import numpy as np
import pytest
from jupyter_client.manager import KernelManager
from matplotlib.textpath import TextPath
from nbclient import NotebookClient

from replicate.report import page
from replicate.report.notebooks import MATH, UNITS, OfflineHTML, begin, drawn, formula, results_folder

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
EVERY = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)


@cache
def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=nbformat.NO_CONVERT)


def sources(path: Path, kind: str) -> list[str]:
    return [cell.source for cell in read(path).cells if cell.cell_type == kind]


def tree(path: Path) -> ast.Module:
    """The code of a notebook, magics left out."""
    lines = "\n".join(sources(path, "code")).splitlines()
    return ast.parse("\n".join("pass" if line.startswith("%") else line for line in lines))


def test_the_report_links_every_notebook() -> None:
    assert [name for name, _ in page.NOTEBOOKS] == [p.stem for p in NOTEBOOKS]


@pytest.fixture(scope="module")
def kernel() -> Iterator[KernelManager]:
    """One Jupyter kernel for several notebooks: it imports the suite once."""
    client = NotebookClient(nbformat.v4.new_notebook(), kernel_name="python3")
    with client.setup_kernel():
        yield client.km


@pytest.mark.parametrize("path", NOTEBOOKS[:4], ids=lambda p: p.stem)
def test_a_notebook_runs(path: Path, kernel: KernelManager) -> None:
    notebook = deepcopy(read(path))
    notebook.cells.insert(0, nbformat.v4.new_code_cell("%reset -f", id="reset"))  # no name of the notebook before it
    NotebookClient(notebook, km=kernel, resources={"metadata": {"path": str(path.parent)}}).execute()
    del notebook.cells[0]
    page, _ = OfflineHTML().from_notebook_node(notebook)
    assert len(page) > 100_000
    assert "results_folder" not in "".join(sources(path, "code"))


def test_six_notebooks_are_numbered_one_to_six_in_name_and_title() -> None:
    assert [p.name[:2] for p in NOTEBOOKS] == [f"{i}-" for i in range(1, 7)]
    for number, path in enumerate(NOTEBOOKS, 1):
        first = read(path).cells[0]
        assert first.cell_type == "markdown"
        assert re.match(rf"# {number}\. \w", first.source), path.name


@EVERY
def test_no_output_is_committed_and_the_metadata_are_clean(path: Path) -> None:
    notebook = read(path)
    nbformat.validate(notebook)
    assert dict(notebook.metadata) == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    ids = [cell.id for cell in notebook.cells]
    assert len(set(ids)) == len(ids)
    for cell in notebook.cells:
        assert cell.metadata == {}
        if cell.cell_type == "code":
            assert cell.execution_count is None
            assert cell.outputs == []


@EVERY
def test_every_section_ends_with_an_exercise_and_every_exercise_has_an_answer(path: Path) -> None:
    cells = read(path).cells
    number = path.name[0]
    asked = [(i, m[1]) for i, c in enumerate(cells) for m in re.finditer(r"\*\*Exercise ([\d.]+)\.\*\*", c.source)]
    assert [name for _, name in asked] == [f"{number}.{i}" for i in range(1, len(asked) + 1)]
    ends = [i for i, _ in asked[1:]] + [len(cells)]
    for (i, name), end in zip(asked, ends, strict=True):
        answers = [c.source for c in cells[i + 1 : end]]
        assert any(c.startswith((f"# Answer to {name}", "<details><summary>Answer</summary>")) for c in answers), name
    sections = re.split(r"(?m)^## ", "\n".join(c.source for c in cells if c.cell_type == "markdown"))[1:]
    assert len(sections) >= 4
    assert all("**Exercise" in s for s in sections)


@EVERY
def test_a_notebook_imports_the_suites_code_and_copies_none_of_it(path: Path) -> None:
    code = tree(path)
    imported = {n.module or "" for n in ast.walk(code) if isinstance(n, ast.ImportFrom)}
    assert sum(m.startswith("replicate.") for m in imported) >= 3
    names = {alias.name for n in ast.walk(code) if isinstance(n, ast.ImportFrom) for alias in n.names}
    own = [n for n in ast.walk(code) if isinstance(n, ast.FunctionDef)]
    assert not names & {n.name for n in own}
    pasted = {n.name for n in own if len(statements(n)) > 1 and body(n) in bodies_of_the_suite()}
    assert not pasted


def body(function: ast.FunctionDef) -> str:
    """What a function does, its name, annotations and docstring left out."""
    return "\n".join(ast.dump(s) for s in statements(function))


def statements(function: ast.FunctionDef) -> list[ast.stmt]:
    return function.body[1:] if ast.get_docstring(function) else function.body


@cache
def bodies_of_the_suite() -> frozenset[str]:
    files = [f for folder in ("replicate", "baselines") for f in (ROOT / folder).rglob("*.py")]
    functions = (n for f in files for n in ast.walk(ast.parse(f.read_text())) if isinstance(n, ast.FunctionDef))
    return frozenset(body(n) for n in functions)


def test_a_copied_function_would_be_found() -> None:
    text = (ROOT / "replicate" / "sampling" / "langevin.py").read_text()
    pasted = next(n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef) and n.name == "ula")
    assert body(pasted) in bodies_of_the_suite()


@EVERY
def test_randomness_comes_from_generators_alone(path: Path) -> None:
    calls = [n for n in ast.walk(tree(path)) if isinstance(n, ast.Call)]
    for call in calls:
        name = ast.unparse(call.func)
        if name in {"torch.randn", "torch.rand", "torch.randint", "torch.multinomial"}:
            deliberate = "0 * torch.randn" in "\n".join(sources(path, "code"))  # the break that exercise 6.3 asks for
            inside_module = path.name.startswith("6") and "components" in ast.unparse(call)
            assert deliberate or inside_module or any(k.arg == "generator" for k in call.keywords), ast.unparse(call)


@EVERY
def test_every_formula_can_be_drawn(path: Path) -> None:
    """mathtext raises on a command that it does not know; what is drawn is well-formed XML."""
    for text in sources(path, "markdown"):
        page = drawn(text)
        assert not [m for m in MATH.finditer(page) if not m["code"]]
        for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
            ElementTree.fromstring(svg)


def test_a_formulas_outline_is_matplotlibs_own() -> None:
    """The path data, walked step by step, end where matplotlib's outline ends, to half a unit a step."""
    numbers = re.search(r' d="([^"]*)"', formula("x"))
    assert numbers
    walked, here, start = [], np.zeros(2), np.zeros(2)
    for code, rest in re.findall(r"([mlqcz])([^mlqcz]*)", numbers[1]):
        points = here + np.array(rest.split(), dtype=float).reshape(-1, 2)
        if code == "z":
            here = start
            continue
        here = points[-1]
        start = here if code == "m" else start
        walked.append(here)
    expected = [v.reshape(-1, 2)[-1] for v, c in outline("x") if c != 79]
    np.testing.assert_allclose(np.array(walked), np.array(expected) * [UNITS / 10, -UNITS / 10], atol=0.51)


def outline(tex: str) -> list[tuple[np.ndarray, int]]:
    prop = mpl.font_manager.FontProperties(math_fontfamily="stix", size=10)
    return list(TextPath((0, 0), f"${tex}$", prop=prop).iter_segments(simplify=False))


def test_dollars_in_code_and_escaped_ones_stay() -> None:
    text = "`$HOME` and \\$5 and ```\n$a$ $b$\n```"
    assert drawn(text) == text
    assert drawn("so $x$ is").startswith("so <svg")
    assert "<div" in drawn("then\n$$ x = y $$\n")


def test_an_unknown_command_is_refused_not_dropped() -> None:
    with pytest.raises(ValueError, match="nosuch"):
        formula(r"\nosuch{x}")


def test_the_page_needs_no_network_and_is_the_same_twice() -> None:
    notebook = nbformat.v4.new_notebook(
        cells=[
            nbformat.v4.new_markdown_cell("# A title\n\nWith $Z = 1$.\n\n$$ \\int p(x)\\, dx = 1 $$", id="a"),
            nbformat.v4.new_code_cell("1 + 1", id="b"),
        ]
    )
    pages = [OfflineHTML().from_notebook_node(notebook)[0] for _ in range(2)]
    assert pages[0] == pages[1]
    assert "<script" not in re.sub(r"<script>.*?</script>", "", pages[0], flags=re.DOTALL)
    assert not re.search(r"(src|href)=[\"']?(https?:)?//|@import|url\([\"']?https?:|cdnjs", pages[0])
    assert pages[0].count("<svg ") == 2


def test_missing_results_raise_one_line_with_the_command_that_makes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RESULTS", str(tmp_path))
    monkeypatch.setenv("PROFILE", "smoke")
    with pytest.raises(FileNotFoundError, match="run `make reproduce PROFILE=smoke`, or set RESULTS"):
        results_folder()
    (tmp_path / "smoke").mkdir()
    (tmp_path / "smoke" / "measurements.csv").touch()
    assert results_folder() == tmp_path / "smoke"


def test_begin_sets_the_reports_look_and_keeps_the_backend() -> None:
    with mpl.rc_context():
        backend = mpl.rcParams["backend"]
        begin()
        assert mpl.rcParams["legend.frameon"] is False
        assert mpl.rcParams["backend"] == backend
