"""Says at the end how many cases there were, and how to see the same ones again."""

from __future__ import annotations

import pytest

from fuzz.cases import CASES, ON_DEMAND, SEED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line below the tests."""
    again = f"FUZZ_CASES={CASES} FUZZ_SEED={SEED} repeats them" if ON_DEMAND else "the same ones every time"
    terminalreporter.write_line(f"fuzz: {CASES} cases; {again}")
