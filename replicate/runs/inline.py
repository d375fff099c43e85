"""Compute runs one after the other in this process: for a debugger, and as the reference of the other executors."""

import math
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from replicate.errors import Stopped, TimeLimit
from replicate.process_state import ProcessState
from replicate.resume import stop_current
from replicate.runs.child import STOPPED, attempt, make_ready
from replicate.runs.executor import Listener, RunFolders, outcome
from replicate.runs.limits import DEFAULT, Limits
from replicate.runs.spec import AnySpec


class Inline:
    """An `Executor` within this process. The memory limit does not hold here: it would be the caller's own."""

    jobs = 1

    def __init__(self, limits: Limits = DEFAULT) -> None:
        self.limits = limits

    def run_all(
        self, specs: Sequence[AnySpec], runs: RunFolders, listen: Listener, deadline: float | None = None
    ) -> bool:
        """See `Executor`."""
        for spec in list(runs.missing(specs)):
            if deadline is not None and time.monotonic() >= deadline:
                return False
            folder = runs.folder(spec)
            make_ready(folder)
            listen("started", spec, "")
            before = ProcessState()
            try:
                with _alarm(self.limits.seconds, deadline):
                    code = attempt(spec, folder, self.limits)
            finally:
                before.restore()
            if code == STOPPED:
                if deadline is not None and time.monotonic() >= deadline:
                    return False
                raise Stopped
            error = outcome(spec, folder, code, None)
            listen("failed" if error else "done", spec, error)
        return True


@contextmanager
def _alarm(seconds: float, deadline: float | None) -> Iterator[None]:
    """Inside, raise `TimeLimit` after so many seconds; at an earlier deadline let the run save itself and stop."""
    left = math.inf if deadline is None else max(1e-3, deadline - time.monotonic())

    def ring(number: int, frame: Any) -> None:
        if left < seconds:
            if not stop_current():  # it has not reached a point where it can save itself
                signal.setitimer(signal.ITIMER_REAL, 0.1)
            return
        raise TimeLimit(f"it took longer than {seconds:g} seconds (--run-limit); the next call resumes it")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, min(seconds, left))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
