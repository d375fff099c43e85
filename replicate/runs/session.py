"""One process's share of a run: its journal, its checkpoints, and what the record says about where it ran."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch

from replicate.resume import Journal, State
from replicate.runs.checkpoint import Checkpoints
from replicate.runs.limits import Limits
from replicate.runs.provenance import device_name, provenance, source_version, stamp
from replicate.runs.spec import AnySpec


class Session:
    """One process's share of a run; it begins where the last checkpoint of the session before left off.

    Args:
        folder: of the run; None keeps no checkpoints.
    """

    def __init__(self, spec: AnySpec, folder: Path | None, device: torch.device, limits: Limits) -> None:
        self.device, self.started, self._begin = device, time.time(), time.monotonic()
        self.checkpoints = Checkpoints(folder, spec.run_id(), "+".join(source_version()))
        saved = self.checkpoints.read()
        self.before: list[dict[str, Any]] = saved["sittings"] if saved else []
        self.journal = Journal(self._write, saved["journal"] if saved else None, limits.checkpoint_every)

    def _write(self, journal: State) -> None:
        try:
            self.checkpoints.write({"journal": journal, "sittings": [*self.before, self.as_dict()]})
        except OSError as error:  # a run that can continue must not end for want of a checkpoint
            print(f"a checkpoint could not be written: {error}", file=sys.stderr)

    def seconds_before(self) -> float:
        """Return the wall seconds of earlier sessions."""
        return float(sum(s["seconds"] for s in self.before))

    def seconds(self) -> float:
        """Return the wall seconds of all sessions so far."""
        return self.seconds_before() + time.monotonic() - self._begin

    def as_dict(self) -> dict[str, Any]:
        """Return this session so far, JSON-ready."""
        return {
            "device": device_name(self.device),
            "started": stamp(self.started),
            "seconds": round(time.monotonic() - self._begin, 3),
            "checkpoints": self.journal.saves,
            "checkpoint_seconds": round(self.journal.save_seconds, 3),
        }

    def provenance(self) -> dict[str, Any]:
        """Return the provenance of the record, with every session; a run on two kinds of device names both."""
        sessions = [*self.before, self.as_dict()]
        devices = list(dict.fromkeys(s["device"] for s in sessions))
        times = {"started": sessions[0]["started"], "finished": stamp(time.time())}
        # the key is that of the committed records
        return {**provenance(self.device), "device": " + ".join(devices), **times, "sittings": sessions}
