"""Compute one run, from its spec to its record, in this process."""

import ctypes
import math
import os
import traceback
from pathlib import Path
from typing import Any

import torch
from threadpoolctl import threadpool_limits

from replicate.errors import Exited, NotANumber, UsageError
from replicate.process_state import set_up
from replicate.runs.checkpoint import Session
from replicate.runs.evaluate import Measurement, count
from replicate.runs.limits import DEFAULT, Limits
from replicate.runs.provenance import peak_memory_mb
from replicate.runs.record import check_record, seal
from replicate.runs.seeds import stream_seed
from replicate.runs.spec import AnySpec
from replicate.runs.store import write_arrays, write_atomic, write_json
from replicate.runs.subjects import subject_of

#: parameters of glibc's mallopt(3)
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> None:
    """Let this process keep the memory that it frees, where its C library allows that (glibc).

    torch takes and frees blocks of megabytes at every step. Where the system gets them back, each returns page by page,
    which costs up to a third of a small model's time.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(M_MMAP_THRESHOLD, 1 << 30)
    mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


def prepare_process(device: str, run_id: str = "") -> torch.device:
    """Make this process deterministic: one thread, deterministic kernels, full float32 precision.

    Whatever was imported or ran before, a run begins with the same values (`replicate.process_state.PARTS`).
    """
    keep_freed_memory()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    set_up(stream_seed("global", run_id))
    threadpool_limits(1)  # sums in numpy and scipy depend on the number of threads as well
    return torch.device(device)


def check_finite(measurement: Measurement) -> Measurement:
    """Return the measurement itself.

    Raises:
        NotANumber: its value is nan or infinite, or its error infinite.
    """
    e = measurement.estimate
    if e and (not math.isfinite(e.value) or math.isinf(e.stderr)):
        raise NotANumber(f"{measurement.metric} is {e.value} +- {e.stderr} on the {measurement.split} split")
    return measurement


def check_data(spec: AnySpec) -> None:
    """Refuse to compute on other data than the spec's hash names.

    Raises:
        UsageError: the sha256 of the data on this machine is another.
    """
    digest = subject_of(spec).data_sha256()
    if digest != spec.data_sha256:
        raise UsageError(
            f"the data of {spec.task} on this machine have sha256 {digest[:12]}, the spec names "
            f"{spec.data_sha256[:12]}; give this machine the same version of the suite, its libraries and its data"
        )


def execute(spec: AnySpec, folder: Path | None, device: torch.device, limits: Limits = DEFAULT) -> dict[str, Any]:
    """Compute a run and return its record.

    With a folder, resume from the checkpoint in it, leave checkpoints on the way, and write the run's files at the end,
    the record last.

    Raises:
        UsageError: the data here are not those that the spec names.
        Stopped: the run was asked to stop and has left a checkpoint.
    """
    session = Session(spec, folder, device, limits)
    check_data(spec)
    with session.journal.active():
        found = subject_of(spec).compute(session)
        session.journal.finishing = True
        memory = count("peak_memory_mb", peak_memory_mb(device), "megabytes")
        head = {"run_id": spec.run_id(), "spec": spec.as_dict(), **found.record}
        rows = [check_finite(m).as_dict() for m in [*found.measurements, memory]]
        record = seal(check_record({**head, "measurements": rows, "provenance": session.provenance()}))
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            if found.weights:
                write_atomic(folder / "model.safetensors", found.weights)
            if found.arrays:
                write_arrays(folder / "arrays.npz", found.arrays)
            write_json(folder / "record.json", record)  # last: where it is, everything is
            (folder / "failure.json").unlink(missing_ok=True)
            session.checkpoints.clear()
    return record


def failure(spec: AnySpec, error: BaseException | str, stderr: str = "") -> dict[str, Any]:
    """Return the record of a run that failed.

    Args:
        error: the exception, or a line.
        stderr: the end of what the run's process printed there.
    """
    text = error if isinstance(error, str) else (f"{type(error).__name__}: {error}".splitlines() or [""])[0]
    origin = error.__cause__ if isinstance(error, Exited) and error.__cause__ else error
    tail = [] if isinstance(origin, str) else traceback.format_exception(origin)[-6:]
    head = {"run_id": spec.run_id(), "spec": spec.as_dict(), "error": text}
    return {**head, "traceback_tail": "".join(tail), "stderr_tail": stderr}
