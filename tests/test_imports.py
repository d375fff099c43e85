"""Rooms import one way: each module only from rooms below its own, and no two modules in a circle."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
#: from the bottom up; a module imports its own room and those before it
ROOMS = (
    *(
        "errors",
        "validation",
        "resume",
        "fitting",
        "model",
        "process_state",
        "registry",
        "sde",
        "data",
        "tasks",
        "sampling",
        "likelihood",
    ),
    *("metrics", "score_based", "energies", "runs", "ledger", "experiments", "papers", "report", "sweeps", "cli"),
    *("testing", "__main__"),
)
#: what opens the front door reaches down lazily
FRONT = "replicate"


def modules() -> dict[str, Path]:
    """Every module of the suite and its baselines by its dotted name."""
    files = [*ROOT.glob("replicate/**/*.py"), *ROOT.glob("baselines/**/*.py")]
    names = {".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): f for f in files}
    return dict(sorted(names.items()))


def imports(name: str) -> set[str]:
    """Modules of the suite that a module imports, wherever in its text it does."""
    known, found = modules(), set()
    for node in ast.walk(ast.parse(known[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            asked = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            asked = [i if i in known else node.module for i in inside]
        else:
            continue
        found |= {a for a in asked if a in known}
    return found - {name}


def room(name: str) -> str:
    """The room of a module: the package or module right below `replicate`."""
    first, _, rest = name.partition(".")
    return first if first == "baselines" or not rest else rest.split(".")[0]


@pytest.mark.parametrize("name", [n for n in modules() if n.startswith("replicate.")])
def test_module_imports_only_rooms_below_its_own(name: str) -> None:
    allowed = set(ROOMS[: ROOMS.index(room(name)) + 1]) | {FRONT}
    above = {i for i in imports(name) if room(i) not in allowed and room(i) != "baselines"}
    assert not above, f"{name} imports upward: {sorted(above)}"
    if any(room(i) == "baselines" for i in imports(name)):
        assert room(name) in ("experiments", "papers"), f"{name} imports a plug-in, baselines"


def test_no_two_modules_import_each_other() -> None:
    try:
        TopologicalSorter({name: imports(name) for name in modules()}).prepare()
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize("name", [n for n in modules() if n.startswith("baselines.")])
def test_baselines_know_the_model_contract_and_nothing_else(name: str) -> None:
    assert {i for i in imports(name) if room(i) != "baselines"} <= {"replicate.model"}


@pytest.mark.parametrize("name", [n for n in modules() if n.startswith("replicate.papers.")])
def test_no_paper_imports_another(name: str) -> None:
    key = name.split(".")[2]
    others = {i for i in imports(name) if i.startswith("replicate.papers.") and i.split(".")[2] != key}
    assert not others, f"{name} imports another paper: {sorted(others)}"
