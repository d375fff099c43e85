"""Every test computes on one thread, as every run does; property tests draw the same cases every time."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from replicate.cli import main

torch.set_num_threads(1)
settings.register_profile("suite", deadline=None, derandomize=True)
settings.load_profile("suite")

#: files that take longest go first, so that none of them is left for one process at the end
LONGEST = ("test_reproduce.py", "test_notebooks.py", "test_faults.py", "test_cluster.py", "test_contracts.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture
def replicate(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., tuple[int, str, str]]:
    """Run `replicate WORDS` in this process; returns (exit code, stdout, stderr)."""
    monkeypatch.setenv("REPLICATE_RUNS", str(tmp_path / "runs"))

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["replicate", *words])
        before = torch.are_deterministic_algorithms_enabled()
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        finally:
            torch.use_deterministic_algorithms(before)
        out = capsys.readouterr()
        return code, out.out, out.err

    return run
