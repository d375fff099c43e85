"""The shape of the code: functions that fit a screen, and few training loops."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(p for package in ("replicate", "baselines") for p in (ROOT / package).rglob("*.py"))
LINES, PARAMETERS, LOOPS = 80, 8, 5
#: the suite's two training loops, which all others should be
COMMON = ("replicate/runs/training.py", "replicate/fit.py")


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Every function and method of a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_functions_fit_a_screen_and_take_few_parameters(path: Path) -> None:
    for f in functions(path):
        lines = (f.end_lineno or f.lineno) - f.lineno + 1
        names = [a.arg for a in (*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs)]
        assert lines <= LINES, f"{f.name} has {lines} lines"
        assert len([n for n in names if n not in ("self", "cls")]) <= PARAMETERS, f"{f.name} takes {names}"


def steps_an_optimizer(node: ast.AST) -> bool:
    """Whether a loop calls .step() after .backward() in its own body."""
    called = {n.func.attr for n in ast.walk(node) if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute)}
    return {"backward", "step"} <= called


def test_at_most_five_training_loops_stand_beside_the_common_ones() -> None:
    found = []
    for path in FILES:
        name = path.relative_to(ROOT).as_posix()
        if name in COMMON:
            continue
        found += [
            f"{name}:{f.name}"
            for f in functions(path)
            if any(isinstance(n, ast.For | ast.While) and steps_an_optimizer(n) for n in ast.walk(f))
        ]
    assert len(found) <= LOOPS, found
