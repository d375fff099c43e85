"""Examples in docstrings run and print what they show."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def with_examples() -> list[str]:
    """The dotted names of the modules that have an example."""
    files = [f for room in ("replicate", "baselines") for f in sorted((ROOT / room).rglob("*.py"))]
    found = [f for f in files if ">>> " in f.read_text(encoding="utf-8")]
    return [".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for f in found]


@pytest.mark.parametrize("name", with_examples())
def test_examples_print_what_they_show(name: str) -> None:
    results = doctest.testmod(importlib.import_module(name))
    assert results.attempted
    assert not results.failed
