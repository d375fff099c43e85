"""One process's share of a run, and its checkpoints: written so that a kill at any moment loses one interval at most.

A file is a line of 64 hexadecimal digits (sha256 of the rest) and a safetensors image. Tensors lie in it by number; the
structure around them is JSON, kept as one more tensor of bytes. Nothing in it is code.
"""

import hashlib
import json
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from replicate.resume import Journal, State
from replicate.runs.identity import checkpoint_source, plug_ins
from replicate.runs.limits import Limits
from replicate.runs.provenance import device_name, provenance, stamp
from replicate.runs.spec import AnySpec
from replicate.runs.store import write_atomic

FORMAT = 1
#: the newest may be damaged by what also stopped the run; the one before it then serves
KEPT = 2
STRUCTURE = "structure"


def pack(state: Any) -> bytes:
    """Pack a state of plain values and tensors into bytes that `unpack` reads, bit for bit."""
    tensors: dict[str, Tensor] = {}

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            # a transposed matrix comes back transposed in memory: products and sums round by the order of their terms
            order = sorted(range(value.dim()), key=value.stride, reverse=True)
            name = f"{len(tensors)}"
            tensors[name] = value.detach().cpu().permute(order).contiguous()
            return {"tensor": name, "device": value.device.type, "order": order}
        if isinstance(value, Mapping):
            return {"mapping": [[k, plain(v)] for k, v in value.items()]}
        if isinstance(value, tuple):
            return {"tuple": [plain(v) for v in value]}
        return [plain(v) for v in value] if isinstance(value, list) else value

    structure = json.dumps(plain(state)).encode()
    tensors[STRUCTURE] = torch.frombuffer(bytearray(structure), dtype=torch.uint8)
    seen: set[int] = set()
    for name, t in tensors.items():
        place = t.untyped_storage().data_ptr()
        if place in seen:  # two names for one storage are two tensors here
            tensors[name] = t.clone()
        seen.add(place)
    image = safetensors.torch.save(tensors)
    return hashlib.sha256(image).hexdigest().encode() + b"\n" + image


def unpack(data: bytes) -> Any:
    """Unpack a state; tensors return to the kind of device that they were on.

    Raises:
        ValueError: the bytes are not those that `pack` made.
    """
    digest, _, image = data.partition(b"\n")
    if hashlib.sha256(image).hexdigest().encode() != digest:
        raise ValueError("its sha256 differs from the one it was written with")
    try:
        tensors = safetensors.torch.load(image)
        structure = json.loads(bytes(tensors.pop(STRUCTURE).numpy()))
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"it is no checkpoint ({error})") from None

    def real(value: Any) -> Any:
        if isinstance(value, list):
            return [real(v) for v in value]
        if not isinstance(value, dict):
            return value
        if "tensor" in value:
            inverse = sorted(range(len(value["order"])), key=value["order"].__getitem__)
            return tensors[value["tensor"]].to(value["device"]).permute(inverse)
        if "tuple" in value:
            return tuple(real(v) for v in value["tuple"])
        return {k: real(v) for k, v in value["mapping"]}

    return real(structure)


class Checkpoints:
    """The checkpoints of one run, newest last, KEPT of them.

    Args:
        folder: the run's; they lie in `checkpoints` below it. None keeps none.
        run_id, source: of the spec and of the code; what either differs in is another run and is refused.
    """

    def __init__(self, folder: Path | None, run_id: str, source: str) -> None:
        self.folder = folder / "checkpoints" if folder is not None else None
        self.head = {"format": FORMAT, "run_id": run_id, "source": source}

    def paths(self) -> list[Path]:
        """Oldest first."""
        return sorted(self.folder.glob("*.checkpoint")) if self.folder is not None else []

    def write(self, state: Any) -> None:
        """Add a checkpoint and drop all but the last ones."""
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        before = self.paths()
        number = int(before[-1].stem) + 1 if before else 1
        write_atomic(self.folder / f"{number:08}.checkpoint", pack({"head": self.head, "state": state}))
        for old in before[: 1 - KEPT]:
            old.unlink(missing_ok=True)

    def read(self) -> Any:
        """Return the newest whole state of this run, or None; name damaged files on stderr."""
        for path in reversed(self.paths()):
            try:
                found = unpack(path.read_bytes())
                if found["head"] != self.head:
                    raise ValueError(
                        "it belongs to another spec or another version of the code, of a plug-in or of a library"
                    )
                return found["state"]
            except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
                print(f"{path.name} of run {self.head['run_id']} is not used: {error}", file=sys.stderr)
                path.unlink(missing_ok=True)
        return None

    def clear(self) -> None:
        """Remove them all: the run has its record."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


class Session:
    """One process's share of a run; it begins where the last checkpoint before it left off. No folder keeps none."""

    def __init__(self, spec: AnySpec, folder: Path | None, device: torch.device, limits: Limits) -> None:
        self.device, self.started, self._begin = device, time.time(), time.monotonic()
        self.plug_ins, source = plug_ins(spec), checkpoint_source(spec)
        provenance(device)  # which code this is, is asked before the first step
        if not source:
            print("the sources of a plug-in cannot be found: this run keeps no checkpoints", file=sys.stderr)
        self.checkpoints = Checkpoints(folder if source else None, spec.run_id(), source)
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
        plugged = {"plugins": self.plug_ins} if self.plug_ins else {}
        # the key is that of the committed records
        return {**provenance(self.device), "device": " + ".join(devices), **times, "sittings": sessions, **plugged}
