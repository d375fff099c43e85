"""What runs specs: in this process, in a pool of processes on this machine, or on a cluster. One contract for all.

An executor may decide where and when a run is computed and nothing else. The same specs through any of them give the
same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from replicate.runs.child import STOPPED, UNWRITABLE, stderr_tail
from replicate.runs.execute import failure
from replicate.runs.limits import Limits
from replicate.runs.spec import AnySpec
from replicate.runs.store import read_record, write_json

Outcome = Literal["started", "done", "failed", "lost"]
#: told "started", "done", "failed" or "lost" (its worker went away; the run is given to another), the spec, and a line
Listener = Callable[[Outcome, AnySpec, str], None]


@dataclass(frozen=True)
class Runs:
    """A folder of runs, one below it for each, named by its id."""

    root: Path

    def folder(self, spec: AnySpec) -> Path:
        """Where a run's record lies."""
        return self.root / spec.run_id()

    def missing(self, specs: Sequence[AnySpec]) -> Iterator[AnySpec]:
        """The specs without a whole record."""
        return (s for s in specs if read_record(self.folder(s)) is None)


class Executor(Protocol):
    """Where runs are computed."""

    @property
    def jobs(self) -> int:
        """Runs at a time."""

    def run_all(self, specs: Sequence[AnySpec], runs: Runs, listen: Listener, deadline: float | None = None) -> bool:
        """Run the specs whose records are missing; every one leaves a record or a failure in its folder.

        Args:
            specs: in the order in which they start.
            runs: where records are read and written.
            listen: told what happens to each run.
            deadline: monotonic time after which nothing is started and what runs saves itself and stops.

        Returns:
            True if every spec has been tried; False if the deadline came first.

        Raises:
            OSError: the runs' folder cannot be written.
        """


def outcome(spec: AnySpec, folder: Path, code: int | None, exceeded: Limits | None) -> str:
    """The error's line of a run whose process has ended, or "" where its record is there and whole.

    Where the process could not say why it failed, its failure is written here.

    Args:
        code: the process's exit code; a negative one is the signal that ended it.
        exceeded: its limits, where it was stopped for the time it took.

    Raises:
        OSError: the folder cannot be written.
    """
    if read_record(folder) is not None:
        return ""
    if exceeded is None and code != UNWRITABLE:
        try:
            return str(json.loads((folder / "failure.json").read_text())["error"])
        except (OSError, ValueError, KeyError):
            pass
    if exceeded is not None:
        error = f"it took longer than {exceeded.seconds:g} seconds (--run-limit); the next call goes on from there"
    elif code == UNWRITABLE:
        error = "its folder could not be written"
    elif code == STOPPED:
        error = "the run's process was told to stop by somebody else"
    elif code == -9:
        error = "the run's process ended with code -9 and left no record: it was killed, perhaps for lack of memory"
    else:
        error = f"the run's process ended with code {code} and left no record"
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "failure.json", failure(spec, error, stderr_tail(folder)))
    return error
