"""Sessions of a run that die where a test wants it, and what the run found in the end."""

from __future__ import annotations

from collections.abc import Callable

from replicate.report.labels import is_timing
from replicate.resume import Journal, State
from replicate.runs.checkpoint import pack, unpack
from replicate.runs.experiment import Outcome


class Killed(BaseException):
    """Stands for kill -9: nothing in the program may catch it."""


class Sitting:
    """One process's share of a run that saves after every step and dies right after a given save.

    Args:
        saved: the last checkpoint of the sitting before, or None.
        last: the save that it dies after; 0 for none.
    """

    def __init__(self, saved: bytes | None = None, last: int = 0) -> None:
        self.kept, self.last = saved, last
        self.journal = Journal(self.write, unpack(saved) if saved else None, every=0, shortest=0)
        self.count = 0

    def write(self, state: State) -> None:
        self.count += 1
        if self.count == self.last:
            self.kept = pack(state)
            raise Killed

    def outcome(self, run: Callable[[], Outcome]) -> Outcome | None:
        """What the experiment found, or None where it was killed."""
        with self.journal.active():
            try:
                return run()
            except Killed:
                return None


def found(outcome: Outcome) -> dict[str, str]:
    """All that was found but times, to the bit, and what the report draws of it."""
    kept = {name: repr(e) for name, e in outcome.estimates.items() if not is_timing(name)}
    return kept | {plot.name: repr(plot) for plot in outcome.plots}
