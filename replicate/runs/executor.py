"""The contract of an executor: it computes runs in this process, in a pool of processes, or on a cluster.

An executor decides where and when a run is computed, and nothing else. Through each of them the same specs give the
same bytes.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from replicate.runs.child import STOPPED, UNWRITABLE, stderr_tail
from replicate.runs.execute import failure
from replicate.runs.limits import Limits
from replicate.runs.spec import AnySpec
from replicate.runs.store import read_record, write_json

#: of a run; "lost" means that its worker went away and the run is rescheduled
Event = Literal["started", "done", "failed", "lost"]
#: receives the event, the spec, and a line
Listener = Callable[[Event, AnySpec, str], None]


@dataclass(frozen=True)
class RunFolders:
    """A folder with one folder per run, named by the run's id."""

    root: Path

    def folder(self, spec: AnySpec) -> Path:
        """Return the folder of a run."""
        return self.root / spec.run_id()

    def missing(self, specs: Sequence[AnySpec]) -> Iterator[AnySpec]:
        """Iterate over the specs without a whole record."""
        return (s for s in specs if read_record(self.folder(s)) is None)


class Executor(Protocol):
    """Something that computes runs."""

    @property
    def jobs(self) -> int:
        """The number of runs at a time."""

    def run_all(
        self, specs: Sequence[AnySpec], runs: RunFolders, listen: Listener, deadline: float | None = None
    ) -> bool:
        """Compute the specs whose records are missing; each leaves a record or a failure in its folder.

        Args:
            specs: in the order in which they start.
            runs: where records are read and written.
            listen: receives what happens to each run.
            deadline: monotonic time after which no run starts, and running ones save themselves and stop.

        Returns:
            Whether every spec was tried before the deadline.

        Raises:
            OSError: the runs' folder cannot be written.
        """


def outcome(spec: AnySpec, folder: Path, code: int | None, exceeded: Limits | None) -> str:
    """Return the error of a run whose process has ended, or "" where its record is there and whole.

    Where the process could not say why it failed, write its failure.

    Args:
        code: the process's exit code; a negative one is the signal that ended it.
        exceeded: the run's limits, where it was stopped for the time it took.

    Raises:
        OSError: the folder cannot be written.
    """
    if read_record(folder) is not None:
        return ""
    if exceeded is None and code != UNWRITABLE:
        with suppress(OSError, ValueError, KeyError):
            return str(json.loads((folder / "failure.json").read_text())["error"])
    known = {
        UNWRITABLE: "its folder could not be written",
        STOPPED: "another program stopped the run's process",
        -9: "the run's process ended with code -9 and left no record: it was killed, perhaps for lack of memory",
    }
    error = known.get(code or 0, f"the run's process ended with code {code} and left no record")
    if exceeded is not None:
        error = f"it took longer than {exceeded.seconds:g} seconds (--run-limit); the next call resumes it"
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "failure.json", failure(spec, error, stderr_tail(folder)))
    return error
