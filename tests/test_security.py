"""Nothing from disk or network is run: no such call in the code, and hostile text stays text wherever it is shown."""

from __future__ import annotations

import ast
import copy
import csv
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from fuzz.examples import EXPERIMENT, PLOT, RECORDS, RUN
from helpers.report_data import BEGIN, END, row

from replicate.errors import RecordError, ReportError
from replicate.report import build as builder
from replicate.report.build import build
from replicate.report.labels import latex, markdown
from replicate.report.readme import refresh, stale
from replicate.runs.record import check_record, seal
from replicate.runs.spec import spec_hash
from replicate.validation import harmless

ROOT = Path(__file__).resolve().parents[1]

# -- what the code may not call

MODULES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "yaml", "code"}
CALLS = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "os.system",
    "os.popen",
    "subprocess.getoutput",
    "subprocess.getstatusoutput",
    "asyncio.create_subprocess_shell",
    "shutil.unpack_archive",
    "tempfile.mktemp",
    "ssl._create_unverified_context",
    "torch.hub.load",
    "torch.jit.load",
    "torch.package.PackageImporter",
    "pandas.eval",
    "pandas.read_pickle",
    "markupsafe.Markup",
    "jinja2.Template",  # has no autoescape by default
}
METHODS = {"to_pickle", "read_pickle", "extractall", "unpack_archive"}
#: a call that must carry this keyword with this value
NEEDED = {"torch.load": ("weights_only", True), "jinja2.Environment": ("autoescape", True)}
#: a keyword that, where it is given, must have this value
FIXED = {"shell": False, "allow_pickle": False, "weights_only": True, "autoescape": True, "verify": True}
ALL_INTERFACES = {"0.0.0.0", "::", "tcp://0.0.0.0", "tcp://"}


class Walker(ast.NodeVisitor):
    """Finds calls that run what they read, by the names under which a module was imported."""

    def __init__(self) -> None:
        self.names: dict[str, str] = {}
        self.found: list[str] = []

    def note(self, node: ast.AST, what: str) -> None:
        """A finding with its line."""
        self.found.append(f"line {getattr(node, 'lineno', 0)}: {what}")

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self.imported(node, alias.name)
            self.names[alias.asname or alias.name.partition(".")[0]] = (
                alias.name if alias.asname else (alias.name.partition(".")[0])
            )

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        for alias in node.names:
            self.imported(node, f"{node.module}.{alias.name}")
            self.names[alias.asname or alias.name] = f"{node.module}.{alias.name}"

    def imported(self, node: ast.AST, name: str) -> None:
        """Modules that there is no safe use of, under any name."""
        if name.partition(".")[0] in MODULES:
            self.note(node, f"imports {name}")

    def dotted(self, node: ast.expr) -> str:
        """The full name of what is called; "" of what has none."""
        if isinstance(node, ast.Name):
            return self.names.get(node.id, node.id)
        if isinstance(node, ast.Attribute):
            head = self.dotted(node.value)
            return f"{head}.{node.attr}" if head else ""
        return ""

    def visit_Call(self, node: ast.Call) -> None:
        name = self.dotted(node.func).removeprefix("builtins.")
        method = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        given = {k.arg: k.value.value if isinstance(k.value, ast.Constant) else None for k in node.keywords if k.arg}
        if name in CALLS or method in METHODS or (method in ("eval", "query") and node.args):
            self.note(node, f"calls {name or method}")
        keyword, value = NEEDED.get(name, ("", None))
        if keyword and given.get(keyword) is not value:
            self.note(node, f"calls {name} without {keyword}={value}")
        for key, right in FIXED.items():
            if key in given and given[key] is not right:
                self.note(node, f"gives {key} another value than {right}")
        self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> None:
        if node.id in ("eval", "exec") and node.id not in self.names:
            self.note(node, f"speaks of {node.id}")

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, str) and (node.value in ALL_INTERFACES or node.value.startswith("http://")):
            self.note(node, f"holds {node.value!r}")


def findings(source: str) -> list[str]:
    """What a module does that it may not."""
    walker = Walker()
    walker.visit(ast.parse(source))
    return walker.found


@pytest.mark.parametrize("package", ["replicate", "baselines"])
def test_no_module_executes_its_input(package: str) -> None:
    modules = sorted((ROOT / package).rglob("*.py"))
    assert modules
    found = {str(path.relative_to(ROOT)): findings(path.read_text()) for path in modules}
    assert {name: what for name, what in found.items() if what} == {}


@pytest.mark.parametrize(
    "planted",
    [
        "import pickle",
        "import pickle as p",
        "from pickle import loads",
        "import joblib.memory",
        "import yaml",
        "import marshal",
        "eval('1')",
        "import builtins\nbuiltins.exec('1')",
        "f = eval",
        "model.eval('1')",
        "frame.query('a > 1')",
        "__import__('os')",
        "import os as o\no.system('ls')",
        "from os import popen\npopen('ls')",
        "import subprocess\nsubprocess.run('ls', shell=True)",
        "import subprocess as s\ns.Popen('ls', shell=flag)",
        "import torch\ntorch.load(path)",
        "from torch import load\nload(path, weights_only=False)",
        "import torch as t\nt.load(path, weights_only=flag)",
        "import numpy as np\nnp.load(path, allow_pickle=True)",
        "import pandas as pd\npd.read_pickle(path)",
        "frame.to_pickle(path)",
        "import tarfile\ntarfile.open(path).extractall(folder)",
        "import shutil\nshutil.unpack_archive(path)",
        "import jinja2\njinja2.Environment()",
        "from jinja2 import Environment\nEnvironment(autoescape=False)",
        "from markupsafe import Markup\nMarkup(text)",
        "server.bind(('0.0.0.0', 80))",
        "url = 'http://example.org/data'",
        "get(url, verify=False)",
    ],
)
def test_the_check_finds_each_planted_call(planted: str) -> None:
    assert findings(planted)


@pytest.mark.parametrize(
    "harmless_code",
    [
        "model.eval()",
        "import re\nre.compile('a')",
        "import torch\ntorch.load(path, weights_only=True)",
        "import numpy as np\nnp.load(path, allow_pickle=False)",
        "import subprocess\nsubprocess.run(['ls'], check=True)",
        "from jinja2 import Environment\nEnvironment(autoescape=True)",
        "import json\njson.load(handle)",
        "import safetensors.torch\nsafetensors.torch.load(image)",
        "server.bind(('127.0.0.1', 0))",
    ],
)
def test_the_walker_lets_harmless_calls_pass(harmless_code: str) -> None:
    assert findings(harmless_code) == []


def test_no_template_switches_escaping_off() -> None:
    templates = [p for p in (ROOT / "replicate").rglob("*") if p.suffix in (".html", ".j2", ".jinja")]
    assert templates
    for path in templates:
        assert not re.search(r"\|\s*safe\b|autoescape|Markup", path.read_text()), path


@pytest.mark.parametrize("page", ["SECURITY.md", "FAULTS.md"])
def test_whatever_a_page_names_is_there(page: str) -> None:
    text = (ROOT / page).read_text()
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("*.py"))
    named = re.findall(r"`(test_\w+)`", text)
    assert len(named) > 10
    assert [name for name in named if f"def {name}(" not in tests] == []
    paths = re.findall(r"`((?:replicate|tests)/[\w/.]+)`", text)
    assert len(paths) > 3
    assert [path for path in paths if not (ROOT / path).exists()] == []


# -- hostile text in what is shown

PAYLOAD = (
    '<script>alert(1)</script><img src=x onerror=alert(2)>"\' onmouseover="x" javascript:x '
    "`code` *b* _i_ [a](javascript:x) | cell $x$ \\input{/etc/passwd} \\\\ ^~#%&{} [/red] <!-- headline:end -->"
)
ESCAPE = "\x1b[31mred\x1b]0;title\x07"


def spec_of(model: str, family: str, task: str) -> dict[str, Any]:
    """A whole spec under hostile names."""
    return {**RUN.as_dict(), "model": model, "family": family, "task": task}


def write(folder: Path, spec: dict[str, Any], name: str, **rest: Any) -> None:
    """One run's folder."""
    place = folder / spec_hash(spec)
    place.mkdir(parents=True)
    left = {"run_id": place.name, "spec": spec, **rest}
    (place / name).write_text(json.dumps(left if name == "failure.json" else seal(left)))


def hostile_runs(folder: Path, plot: str = "curve") -> Path:
    """Runs whose every text is a payload: models, tasks, metrics, units, reasons, errors, labels, provenance."""
    rows = [
        row("nll", 1.0, "exact", PAYLOAD),
        row("bits_per_dim", 1.0, "exact", PAYLOAD),
        row("kl", 0.5, "exact", PAYLOAD),
        row(PAYLOAD.replace(":", ""), 1.0, "exact", PAYLOAD),
        row("w2:" + PAYLOAD, 1.0, "estimate", PAYLOAD),
        row("mmd", None, None, status=f"n/a: {PAYLOAD}"),
    ]
    said = {"about": PAYLOAD, "paper": PAYLOAD}
    origin = {"device": PAYLOAD, "commit": PAYLOAD, "platform": PAYLOAD}
    history = {"train": [[1, 2.0], [2, 1.0]], "valid": [], "best_step": 1, "seconds": 1.0}
    for model, task in ((PAYLOAD, f"task {PAYLOAD}"), (f"[x] {PAYLOAD}", "digits"), (f"* {PAYLOAD}", "digits")):
        spec = spec_of(model, "flow", task)
        write(folder, spec, "record.json", measurements=rows, provenance=origin, history=history, **said)
    lost = {"error": f"ValueError: {PAYLOAD}{ESCAPE}", "traceback_tail": f"line\n{PAYLOAD}{ESCAPE}"}
    write(folder, spec_of(f"lost {PAYLOAD}", "ebm", "digits"), "failure.json", **lost)
    lines = [{"label": PAYLOAD, "x": [1, 2, 3], "y": [1.0, None, 0.5]}]
    drawn = {**PLOT, "name": plot, "title": PAYLOAD, "x_label": PAYLOAD, "lines": lines, "levels": {PAYLOAD: 1.0}}
    write(folder, EXPERIMENT.as_dict(), "record.json", measurements=rows[:1], plots=[drawn], provenance=origin, **said)
    return folder


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """results/smoke of the hostile runs."""
    folder = tmp_path_factory.mktemp("hostile")
    return build(hostile_runs(folder / "runs"), folder / "smoke", "smoke").parent


class Page(HTMLParser):
    """Elements, attributes and text of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: set[str] = set()
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.add(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_shows_payloads_as_text_and_holds_no_element_of_theirs(built: Path) -> None:
    page = Page()
    page.feed((built / "report.html").read_text())
    assert page.text.count(PAYLOAD) > 10
    assert not page.elements & {"script", "iframe", "object", "embed", "link", "base", "form", "svg"}
    assert not [a for a in page.attributes if a[1].startswith("on") or "javascript:" in a[2][:40]]
    assert all(value.startswith("data:image/png;base64,") for tag, name, value in page.attributes if name == "src")
    links = [value for _, name, value in page.attributes if name == "href"]
    ours = ("#", "../notebooks/")
    assert all(link.startswith(ours) or (built / link).is_file() for link in links)


def test_markdown_tables_hold_neither_html_nor_new_cells(built: Path, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"# Title\n\n{BEGIN}\nold\n{END}\n\ntail\n")
    assert refresh(readme, built)
    assert not stale(readme, built)
    texts = [p.read_text() for p in sorted((built / "tables").glob("*.md"))] + [readme.read_text()]
    assert readme.read_text().endswith(f"{END}\n\ntail\n")
    for text in texts:
        assert "alert(1)" in text
        assert not re.search(r"<(?!br>|!-- headline:(begin|end) -->)[a-z!/]", text.replace("`<=`", ""), re.IGNORECASE)
        assert not re.search(r"(?<!\\)\[a(?<!\\)\]\(", text)
        tables = [line for line in text.splitlines() if line.startswith("|")]
        assert len({len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) for line in tables}) == 1


#: what our own LaTeX is made of
COMMANDS = {
    *("caption", "label", "begin", "end", "toprule", "midrule", "bottomrule", "centering", "multicolumn", "emph"),
    *("textbf", "textsuperscript", "par", "smallskip", "footnotesize", "textbackslash", "textasciicircum"),
    *("textasciitilde", "textless", "textgreater", "textbar", "textquotedbl", "geq", "leq", "sim"),
}


def test_latex_tables_hold_no_command_or_active_character_of_a_payload(built: Path) -> None:
    files = sorted((built / "tables").glob("*.tex"))
    assert files
    for path in files:
        text = path.read_text().removeprefix("% needs \\usepackage{booktabs}\n")
        assert "alert(1)" in text
        assert set(re.findall(r"\\([A-Za-z]+)", text)) <= COMMANDS
        plain = re.sub(r"\$(?:=|\\geq|\\leq|\\sim)\$", "", re.sub(r"\\[\\{}$&#%_]", "", text))
        assert not re.search(r"[$#%_^~\"<>|]", re.sub(r"\\[A-Za-z]+", "", plain.replace("tab:", "")))
        assert plain.count("{") == plain.count("}")


def test_no_row_of_a_latex_table_begins_with_what_a_line_break_would_take_for_its_option(built: Path) -> None:
    for path in sorted((built / "tables").glob("*.tex")):
        assert not re.search(r"\\\\\s*(\\midrule\s*)?[\[*]", path.read_text()), path.name


def test_figures_hold_payloads_as_text_alone(built: Path) -> None:
    drawn = sorted((built / "figures").glob("*.svg"))
    assert drawn
    for path in drawn:
        assert "<script" not in path.read_text()
        assert not re.search(r"<[^!][^>]*\son[a-z]+=", path.read_text())


def test_every_csv_has_one_width_and_gives_the_payload_back(built: Path) -> None:
    for path in (built / "measurements.csv", built / "summary.csv", *sorted((built / "tables").glob("*.csv"))):
        with open(path, encoding="utf-8", newline="") as handle:
            rows = list(csv.reader(handle))
        assert len({len(r) for r in rows}) == 1
        assert any(PAYLOAD in cell for r in rows for cell in r)


def test_no_error_of_a_failed_run_brings_a_terminal_command_into_the_results(built: Path) -> None:
    texts = [p for p in built.rglob("*") if p.suffix in (".csv", ".md", ".tex", ".html", ".jsonl", ".svg")]
    assert len(texts) > 10
    assert [p.name for p in texts if "\x1b" in p.read_text() or "\x07" in p.read_text()] == []


def test_a_plot_whose_name_climbs_out_of_its_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builder, "all_figures", lambda *_: iter(()))
    runs = hostile_runs(tmp_path / "runs", plot="/../../../../climbed")
    with pytest.raises(ReportError, match="climbed"):
        build(runs, tmp_path / "results" / "smoke", "smoke")
    assert not list(tmp_path.rglob("*climbed*"))


def test_payloads_cannot_leave_the_escapes_of_latex_and_markdown() -> None:
    assert "\n" not in latex("a\n\nb\rc")
    assert markdown("a\n| b |\r\n<b>") == r"a \| b \| &lt;b&gt;"


def test_commands_to_a_terminal_are_written_out() -> None:
    assert harmless(f"{ESCAPE}\n\tline \x9b\ud800 é") == r"\x1b[31mred\x1b]0;title\x07" + "\n\tline " + r"\x9b\ud800 é"


# -- what is refused at the door


def at(record: dict[str, Any], path: tuple[Any, ...], value: str) -> dict[str, Any]:
    """A copy of a record with another value at a path of keys."""
    out = copy.deepcopy(record)
    box: Any = out
    for key in path[:-1]:
        box = box[key]
    box[path[-1]] = value
    return out


TEXTS: list[tuple[int, tuple[Any, ...]]] = [
    (0, ("spec", "model")),
    (0, ("spec", "task")),
    (0, ("measurements", 0, "metric")),
    (0, ("measurements", 0, "unit")),
    (0, ("measurements", 0, "split")),
    (0, ("measurements", 2, "status")),
    (1, ("plots", 0, "lines", 0, "label")),
    (1, ("plots", 0, "x_label")),
    (1, ("plots", 0, "y_label")),
]


@pytest.mark.parametrize(("which", "path"), TEXTS)
@pytest.mark.parametrize("value", ["=cmd|' /C calc'!A1", "+1+1", "-1+1", "@SUM(1)", "\tx"])
def test_record_with_text_that_a_spreadsheet_would_run_is_refused(
    which: int, path: tuple[Any, ...], value: str
) -> None:
    with pytest.raises(RecordError, match=str(path[-1])):
        check_record(at(RECORDS[which], path, value))


@pytest.mark.parametrize(("which", "path"), [*TEXTS, (0, ("about",)), (0, ("provenance", "commit"))])
def test_a_record_whose_text_would_command_a_terminal_is_refused(which: int, path: tuple[Any, ...]) -> None:
    with pytest.raises(RecordError, match=str(path[-1])):
        check_record(at(RECORDS[which], path, f"n/a: {ESCAPE}"))


@pytest.mark.parametrize("name", ["../climbed", "/etc/climbed", "a/b", "..", ""])
def test_a_record_whose_names_are_no_file_names_is_refused(name: str) -> None:
    for path in (("plots", 0, "name"), ("spec", "task"), ("spec", "model")):
        with pytest.raises(RecordError, match=path[-1]):
            check_record(at(RECORDS[1], path, name))


# -- the terminal


def test_listing_and_claims_show_the_terminals_mark_up_as_text(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    import replicate.registry as registry
    from replicate.cli import main
    from replicate.cli.results import print_claims
    from replicate.model import ModelEntry
    from replicate.report.ledger import CLAIM_COLUMNS

    entry = ModelEntry("flow", "[/red] about", "[/red] paper", lambda *_: None, frozenset())  # type: ignore[arg-type, return-value]
    monkeypatch.setattr(registry, "models", lambda: {"[/red]": entry})
    monkeypatch.setattr(sys, "argv", ["replicate", "list"])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # the user's has the list of the models that are installed
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code in (0, None)
    assert "[/red] about" in capsys.readouterr().out
    claim = dict.fromkeys(CLAIM_COLUMNS, "1") | {"claim_id": "[/red]", "paper": "[/red]", "relation": "within"}
    claim |= {"verdict": "reproduced", "deterministic": "true", "source_quality": "R", "number_kind": "exact"}
    print_claims([claim])
    assert capsys.readouterr().out.count("[/red]") == 2
