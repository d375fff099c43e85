"""The folder of a sweep: the runs of one profile, computed by one version of the code, known by its sources."""

import json
import shutil
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from replicate.runs.identity import other_plug_ins, plug_ins
from replicate.runs.provenance import UNKNOWN, source_here, source_version
from replicate.runs.spec import AnySpec
from replicate.runs.store import read_record, write_json


@dataclass(frozen=True)
class Sweep:
    """Where the runs of a profile lie while they are computed, and after.

    A sweep belongs to one version of the suite's sources. After a change it starts afresh, unless its finished runs are
    reused (`replicate.sweeps.reuse`). Where it does not say its version, its runs are moved aside, never deleted. A
    finished sweep is set aside, so that the next call computes everything again.

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
            line = self._leave()
        self.current.mkdir(parents=True)
        self.mark_version()
        return line

    def _leave(self) -> str:
        """Make room for a sweep of this version, and return one line on what became of the other."""
        found = self.version() or {}
        if not any(path.is_dir() for path in self.current.iterdir()):
            shutil.rmtree(self.current)
            return "starting afresh"
        if found.get("source_sha256") is None:
            aside = next(p for n in count(1) if not (p := self.root / f"set-aside-{n}").exists())
            self.current.rename(aside)
            return (
                "the unfinished sweep does not say which version of the code it is of: "
                f"its runs are moved to {aside}, starting afresh; delete that folder if you do not need them"
            )
        shutil.rmtree(self.current)
        commit, keep = str(found.get("commit")), ""
        if commit != UNKNOWN and found.get("dirty") == "":
            keep = f"; `--reuse {commit[:8]}` in its place keeps those that give the same bits again"
        return f"the unfinished sweep is of another version of the code: its runs are deleted, starting afresh{keep}"

    def drop_other_plug_ins(self, specs: Iterable[AnySpec]) -> list[str]:
        """Remove the records of these runs that another version of a plug-in computed; return a line for each."""
        dropped: Counter[str] = Counter()
        for spec in specs:
            path = self.current / spec.run_id()
            record = read_record(path) if plug_ins(spec) else None
            if record and (other := other_plug_ins(spec, record["provenance"], "then", "now")):
                (path / "record.json").unlink()
                dropped[other] += 1
        return [
            f"{n} finished runs are of another version of a plug-in and start again: {o}" for o, n in dropped.items()
        ]

    def version(self) -> dict[str, Any] | None:
        """Return the hash of the sweep's sources, and its commit as a label; None where the folder has none."""
        try:
            found = json.loads((self.runs / "version.json").read_text())
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def belongs_here(self) -> bool:
        """Return whether the sources that are here made the sweep."""
        return (self.version() or {}).get("source_sha256") == source_here()

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
    return {"source_sha256": source_here(), "commit": commit, "dirty": dirty}
