"""One run, from its spec to its record, in this process."""

from __future__ import annotations

import datetime
import hashlib
import json
import math
import os
import platform
import resource
import subprocess
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

from replicate.likelihood.dequantisation import Preprocessed
from replicate.model import Estimate, Model
from replicate.registry import experiment, load_task, model_entry
from replicate.runs.evaluate import Evaluator, Measurement, na
from replicate.runs.experiment import Context
from replicate.runs.seeds import Streams
from replicate.runs.spec import PRECISIONS, AnySpec, ExperimentSpec, RunSpec, spec_from_dict
from replicate.runs.store import write_arrays, write_atomic, write_json
from replicate.runs.training import History, train
from replicate.tasks.base import Task


class NotANumber(RuntimeError):
    """A measurement came out as nan or infinity."""


def prepare_process(device: str) -> torch.device:
    """Make this process deterministic: one thread, deterministic kernels, full float32 precision."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # nothing reads it: 5 %
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = False
    return torch.device(device)


def build_model(spec: RunSpec, task: Task, streams: Streams) -> Model:
    """The untrained model behind its preprocessing, its weights drawn from the run's own stream."""
    entry = model_entry(spec.model)
    extra = {"density": task.density} if entry.needs_density else {}
    with streams.initialisation():
        model = entry.build(task.info, **spec.params, **extra)
    if spec.preprocessing != "none":
        model = Preprocessed(model, task.info, spec.preprocessing)
    return model


def in_precision(task: Task, dtype: torch.dtype) -> Task:
    """The task's splits in another precision."""
    return replace(task, train=task.train.to(dtype), valid=task.valid.to(dtype), test=task.test.to(dtype))


def run(
    spec: RunSpec, device: torch.device, on_step: Callable[[int], None] | None = None
) -> tuple[Model, Task, History, Evaluator]:
    """Train one model; nothing is measured yet."""
    dtype = PRECISIONS[spec.precision]
    task = in_precision(load_task(spec.task), dtype)
    streams = Streams(spec.task, spec.model, spec.seed, device.type)
    model = build_model(spec, task, streams).to(device)
    if dtype != torch.float32:  # never narrowed: some models keep tables in double precision
        model = model.to(dtype)
    history = train(model, task.train.to(device), task.valid.to(device), spec.training, streams, on_step)
    return model, task, history, Evaluator(model, task, spec.evaluation, streams, device)


def check_finite(measurement: Measurement) -> Measurement:
    """The measurement itself.

    Raises:
        NotANumber: its value is nan or infinite, or its error infinite.
    """
    e = measurement.estimate
    if e and (not math.isfinite(e.value) or math.isinf(e.stderr)):
        raise NotANumber(f"{measurement.metric} is {e.value} +- {e.stderr} on the {measurement.split} split")
    return measurement


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory in megabytes: the device's on a GPU, else this process's resident set, libraries included."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def execute(spec: AnySpec, folder: Path | None, device: torch.device) -> dict[str, Any]:
    """Run a spec and return its record; with a folder, write what it leaves and then the record there."""
    started = time.time()
    found = _experiment(spec, device) if isinstance(spec, ExperimentSpec) else _model(spec, device)
    memory = Measurement("peak_memory_mb", Estimate(peak_memory_mb(device), 0.0, "exact", "megabytes", 1))
    record = {
        "run_id": spec.run_id(),
        "spec": spec.as_dict(),
        **found.record,
        "measurements": [check_finite(m).as_dict() for m in [*found.measurements, memory]],
        "provenance": provenance(device, started),
    }
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        if found.weights:
            write_atomic(folder / "model.safetensors", found.weights)
        if found.arrays:
            write_arrays(folder / "arrays.npz", found.arrays)
        write_json(folder / "record.json", record)
        (folder / "failure.json").unlink(missing_ok=True)
    return record


@dataclass(frozen=True)
class _Found:
    """What a run leaves behind: measurements, its own part of the record, and files beside it."""

    measurements: Sequence[Measurement]
    record: Mapping[str, Any]
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)
    weights: bytes = b""


def _seconds(metric: str, seconds: float) -> Measurement:
    return Measurement(metric, Estimate(seconds, 0.0, "exact", "seconds", 1))


def _model(spec: RunSpec, device: torch.device) -> _Found:
    model, _, history, evaluator = run(spec, device)
    begin = time.perf_counter()
    measurements = list(evaluator.measurements())
    arrays = evaluator.arrays() if spec.seed == 0 else {}
    measurements.append(_seconds("train_seconds", history.seconds))
    measurements.append(_seconds("evaluate_seconds", time.perf_counter() - begin))
    weights = {k: v.detach().cpu().contiguous().clone() for k, v in model.state_dict().items()}
    packed = safetensors.torch.save(weights)
    entry = model_entry(spec.model)
    record = {
        "weights_sha256": hashlib.sha256(packed).hexdigest(),
        "about": entry.about,
        "paper": entry.paper,
        "history": {
            "train": history.train,
            "valid": history.valid,
            "best_step": history.best_step,
            "seconds": history.seconds,
        },
    }
    return _Found(measurements, record, arrays, packed)


def _experiment(spec: ExperimentSpec, device: torch.device) -> _Found:
    what = experiment(spec.model, spec.task)
    # designs and tolerances were settled on the streams of the bare name; what is judged is drawn afresh
    streams = Streams(f"judged/{spec.task}", spec.model, spec.seed, device.type)
    begin = time.perf_counter()
    outcome = what.run(Context(spec.params, streams, device))
    seconds = time.perf_counter() - begin
    measurements = [Measurement(name, e) for name, e in outcome.estimates.items()]
    measurements += [na(name, reason) for name, reason in outcome.missing.items()]
    record = {"about": what.about, "paper": spec.model, "plots": [plot.as_dict() for plot in outcome.plots]}
    return _Found([*measurements, _seconds("evaluate_seconds", seconds)], record)


def failure(spec: AnySpec, error: BaseException | str) -> dict[str, Any]:
    """The record of a run that did not end."""
    text = error if isinstance(error, str) else f"{type(error).__name__}: {error}".splitlines()[0]
    tail = [] if isinstance(error, str) else traceback.format_exception(error)[-6:]
    return {"run_id": spec.run_id(), "spec": spec.as_dict(), "error": text, "traceback_tail": "".join(tail)}


@cache
def source_version() -> tuple[str, str]:
    """(commit, sha256 of what differs from it beside the results; "" for a clean tree).

    Outside a repository both are "unknown".
    """
    root = Path(__file__).resolve().parents[2]
    where = ("--", ".", ":(exclude)results", ":(exclude)README.md")

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=True).stdout

    try:
        changes = git("status", "--porcelain", *where) + git("diff", "HEAD", *where)
        return git("rev-parse", "HEAD").strip(), hashlib.sha256(changes.encode()).hexdigest() if changes else ""
    except (OSError, subprocess.CalledProcessError):
        return "unknown", "unknown"


def device_name(device: torch.device) -> str:
    """The device's model, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def provenance(device: torch.device, started: float) -> dict[str, Any]:
    """Where and with what a run was made."""
    commit, dirty = source_version()
    stamp = lambda t: datetime.datetime.fromtimestamp(t, datetime.UTC).isoformat(timespec="seconds")  # noqa: E731
    return {
        "commit": commit,
        "dirty": dirty,
        "device": device_name(device),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "tf32": torch.backends.cuda.matmul.allow_tf32,
        "started": stamp(started),
        "finished": stamp(time.time()),
    }


def worker(spec_json: str, folder: str, device: str) -> None:
    """A child process's whole life: one run, and a failure record if it does not end well."""
    from multiprocessing import parent_process
    from multiprocessing.connection import wait
    from signal import SIG_IGN, SIGINT, signal
    from threading import Thread

    signal(SIGINT, SIG_IGN)  # Ctrl-C is the parent's to handle
    parent = parent_process()
    if parent is not None:

        def die_with_parent() -> None:
            wait([parent.sentinel])
            os._exit(1)

        Thread(target=die_with_parent, daemon=True).start()
    spec = spec_from_dict(json.loads(spec_json))
    try:
        execute(spec, Path(folder), prepare_process(device))
    except Exception as error:
        Path(folder).mkdir(parents=True, exist_ok=True)
        write_json(Path(folder) / "failure.json", failure(spec, error))
        raise SystemExit(1) from None
