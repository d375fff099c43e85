"""The folder of a sweep: the runs of one profile, computed by one version of the code."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from replicate.runs.provenance import source_version
from replicate.runs.store import write_json


@dataclass(frozen=True)
class Sweep:
    """Where the runs of a profile lie while they are computed, and after.

    A sweep belongs to one version of the code. After a change of commit it starts afresh, unless its finished runs are
    reused (`replicate.sweeps.reuse`). A finished sweep is set aside, so that the next call computes everything again.

    Attributes:
        root: REPLICATE_RUNS/PROFILE.
    """

    root: Path

    @property
    def current(self) -> Path:
        """Runs of the sweep in progress."""
        return self.root / "current"

    @property
    def finished(self) -> Path:
        """Runs of the last sweep that was completed."""
        return self.root / "finished"

    @property
    def runs(self) -> Path:
        """Runs of the sweep in progress, or of the finished one where none is in progress."""
        return self.current if self.current.exists() or not self.finished.exists() else self.finished

    def open(self, add: bool = False) -> str:
        """Make the folder ready and return one line on what was found there.

        Args:
            add: continue with a finished sweep of this version, where none is in progress.
        """
        if add and self.belongs_here():
            self.reopen()
        line = "starting afresh"
        if self.current.exists():
            if self.belongs_here():
                return "resuming the unfinished sweep"
            shutil.rmtree(self.current)
            line = "the unfinished sweep is of another version of the code: its runs are deleted, starting afresh"
        self.current.mkdir(parents=True)
        self.mark_version()
        return line

    def version(self) -> dict[str, Any] | None:
        """Return the commit of the sweep and the hash of what differed from it; None where the folder has none."""
        try:
            found = json.loads((self.runs / "version.json").read_text())
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def belongs_here(self) -> bool:
        """Return whether this version of the code, with its uncommitted changes, made the sweep."""
        return self.version() == _version_here()

    def mark_version(self) -> None:
        """Mark the sweep in progress as this version's."""
        write_json(self.current / "version.json", _version_here())

    def reopen(self) -> None:
        """Make the finished sweep the one in progress, where none is."""
        if self.runs == self.finished:
            self.finished.rename(self.current)

    def close(self) -> None:
        """Set the completed sweep aside."""
        shutil.rmtree(self.finished, ignore_errors=True)
        self.current.rename(self.finished)


def _version_here() -> dict[str, Any]:
    commit, dirty = source_version()
    return {"commit": commit, "dirty": dirty}
