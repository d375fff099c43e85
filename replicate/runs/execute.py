"""One run, from its spec to its record, in this process."""

from __future__ import annotations

import ctypes
import hashlib
import math
import os
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from threadpoolctl import threadpool_limits

from replicate.errors import NotANumber, UsageError
from replicate.likelihood.dequantisation import Preprocessed
from replicate.model import Estimate, LogLikelihood, Model
from replicate.registry import model_entry
from replicate.resume import Journal, State, Together
from replicate.runs.checkpoint import Checkpoints
from replicate.runs.evaluate import Evaluator, Measurement, na
from replicate.runs.experiment import Context, pack_examples
from replicate.runs.limits import DEFAULT, Limits
from replicate.runs.paper import find_experiment
from replicate.runs.provenance import device_name, peak_memory_mb, provenance, source_version, stamp
from replicate.runs.record import check_record, seal
from replicate.runs.seeds import Streams
from replicate.runs.spec import PRECISIONS, AnySpec, ExperimentSpec, RunSpec, experiment_spec
from replicate.runs.store import write_arrays, write_atomic, write_json
from replicate.runs.training import History, train
from replicate.tasks.base import Task
from replicate.tasks.loading import data_sha256, load_task

#: parameters of glibc's mallopt(3)
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> None:
    """Let this process keep the memory that it frees, where its C library can be told so (glibc).

    torch takes and frees blocks of megabytes at every step. Given back to the system, each comes again page by page,
    which costs up to a third of a small model's time.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(M_MMAP_THRESHOLD, 1 << 30)
    mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


def prepare_process(device: str) -> torch.device:
    """Make this process deterministic: one thread, deterministic kernels, full float32 precision."""
    keep_freed_memory()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_num_threads(1)
    threadpool_limits(1)  # numpy's and scipy's too: their sums depend on it as well
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


def run(spec: RunSpec, device: torch.device) -> tuple[Model, Task, History, Evaluator]:
    """Train one model; nothing is measured yet."""
    dtype = PRECISIONS[spec.precision]
    task = in_precision(load_task(spec.task, spec.seed), dtype)
    streams = Streams(spec.task, spec.model, spec.seed, device.type)
    model = build_model(spec, task, streams).to(device)
    if dtype != torch.float32:  # never narrowed: some models keep tables in double precision
        model = model.to(dtype)
    history = train(model, task.train.to(device), task.valid.to(device), spec.training, streams, task.redraw)
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


def execute(spec: AnySpec, folder: Path | None, device: torch.device, limits: Limits = DEFAULT) -> dict[str, Any]:
    """Run a spec and return its record.

    With a folder, go on from the checkpoint that lies there, leave checkpoints on the way, and at the end write what
    the run leaves, the record last.

    Raises:
        UsageError: the data here are not those that the spec names.
        Stopped: the run was asked to stop and has left a checkpoint.
    """
    sitting = Sitting(spec, folder, device, limits)
    check_data(spec)
    with sitting.journal.active():
        found = _experiment(spec, sitting) if isinstance(spec, ExperimentSpec) else _model(spec, sitting)
        sitting.journal.finishing = True
        memory = Measurement("peak_memory_mb", Estimate.exact(peak_memory_mb(device), "megabytes"))
        record = seal(
            check_record(
                {
                    "run_id": spec.run_id(),
                    "spec": spec.as_dict(),
                    **found.record,
                    "measurements": [check_finite(m).as_dict() for m in [*found.measurements, memory]],
                    "provenance": sitting.provenance(),
                }
            )
        )
        if folder is not None:
            _leave(found, record, folder)
            sitting.checkpoints.clear()
    return record


def _leave(found: _Found, record: Mapping[str, Any], folder: Path) -> None:
    """Write what a run leaves, the record last: where it is, everything is."""
    folder.mkdir(parents=True, exist_ok=True)
    if found.weights:
        write_atomic(folder / "model.safetensors", found.weights)
    if found.arrays:
        write_arrays(folder / "arrays.npz", found.arrays)
    write_json(folder / "record.json", record)
    (folder / "failure.json").unlink(missing_ok=True)


def check_data(spec: AnySpec) -> None:
    """Refuse to compute on other data than the spec's hash names.

    Raises:
        UsageError: the sha256 of the data on this machine is another.
    """
    if isinstance(spec, ExperimentSpec):
        here = experiment_spec(spec.model, find_experiment(spec.model, spec.task), spec.seed, spec.profile, spec.device)
        digest = here.data_sha256
    else:
        digest = data_sha256(spec.task, spec.seed)
    if digest != spec.data_sha256:
        raise UsageError(
            f"the data of {spec.task} on this machine have sha256 {digest[:12]}, the spec names "
            f"{spec.data_sha256[:12]}; give this machine the same version of the suite, its libraries and its data"
        )


def train_together(runs: Sequence[tuple[AnySpec, Path]], device: torch.device, limits: Limits = DEFAULT) -> bool:
    """Train seeds of one experiment in common steps, and leave checkpoints from which each run goes on alone.

    Args:
        runs: specs that differ in the seed alone, with their folders.

    Returns:
        Whether anything was trained; not where the runs stand at different steps, or have all been trained.

    Raises:
        UsageError: the data here are not those that a spec names.
        Stopped: the process was asked to stop and has left checkpoints.
    """
    for spec, _ in runs:
        check_data(spec)
    first = runs[0][0]
    train_seeds = find_experiment(first.model, first.task).together
    assert train_seeds is not None
    sittings = [Sitting(spec, folder, device, limits, len(runs)) for spec, folder in runs]
    journals = [sitting.journal for sitting in sittings]
    positions = {journal.position for journal in journals}
    if len(positions) > 1 or positions.pop()[0]:
        return False
    with Together(journals, limits.checkpoint_every).active():
        train_seeds([_context(spec, device) for spec, _ in runs if isinstance(spec, ExperimentSpec)])
    return True


def _context(spec: ExperimentSpec, device: torch.device) -> Context:
    """An experiment's. Designs and tolerances were settled on streams of the bare name; what is judged is afresh."""
    return Context(spec.params, Streams(f"judged/{spec.task}", spec.model, spec.seed, device.type), device)


class Sitting:
    """One process's share of a run: its journal, its checkpoints, and what the record says of where it was made.

    Args:
        together: so many runs are trained in this process in common steps.
    """

    def __init__(
        self, spec: AnySpec, folder: Path | None, device: torch.device, limits: Limits, together: int = 1
    ) -> None:
        self.device, self.started, self._begin = device, time.time(), time.monotonic()
        self.together = together
        self.checkpoints = Checkpoints(folder, spec.run_id(), "+".join(source_version()))
        saved = self.checkpoints.read()
        self.before: list[dict[str, Any]] = saved["sittings"] if saved else []
        self.journal = Journal(self._write, saved["journal"] if saved else None, limits.checkpoint_every)

    def _write(self, journal: State) -> None:
        try:
            self.checkpoints.write({"journal": journal, "sittings": [*self.before, self.as_dict()]})
        except OSError as error:  # a checkpoint that cannot be written must not end a run that can go on
            print(f"a checkpoint could not be written: {error}", file=sys.stderr)

    def seconds_before(self) -> float:
        """Wall seconds of earlier sittings, a run's share of those that trained several together."""
        return float(sum(s["seconds"] / s.get("together", 1) for s in self.before))

    def seconds(self) -> float:
        """Wall seconds of all sittings so far."""
        return self.seconds_before() + time.monotonic() - self._begin

    def as_dict(self) -> dict[str, Any]:
        """This sitting so far."""
        return {
            "device": device_name(self.device),
            "started": stamp(self.started),
            "seconds": round(time.monotonic() - self._begin, 3),
            "checkpoints": self.journal.saves,
            "checkpoint_seconds": round(self.journal.save_seconds, 3),
            **({"together": self.together} if self.together > 1 else {}),
        }

    def provenance(self) -> dict[str, Any]:
        """Of the record: this process's, and every sitting; a run on two kinds of device names both."""
        sittings = [*self.before, self.as_dict()]
        devices = list(dict.fromkeys(s["device"] for s in sittings))
        times = {"started": sittings[0]["started"], "finished": stamp(time.time())}
        return {**provenance(self.device), "device": " + ".join(devices), **times, "sittings": sittings}


@dataclass(frozen=True)
class _Found:
    """What a run leaves behind: measurements, its own part of the record, and files beside it."""

    measurements: Sequence[Measurement]
    record: Mapping[str, Any]
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)
    weights: bytes = b""


def _by_task(examples: Mapping[str, LogLikelihood], classifiers: Mapping[str, str]) -> dict[str, Any]:
    """The record's parts for the likelihoods of test examples and for classifiers; absent where there are none."""
    packed = {task: pack_examples(log_p) for task, log_p in examples.items()}
    return {key: part for key, part in (("examples", packed), ("classifiers", dict(classifiers))) if part}


def _seconds(metric: str, seconds: float) -> Measurement:
    return Measurement(metric, Estimate.exact(seconds, "seconds"))


def _model(spec: RunSpec, sitting: Sitting) -> _Found:
    model, _, history, evaluator = run(spec, sitting.device)
    begin = time.perf_counter()
    measurements = list(evaluator.measurements())
    arrays = evaluator.arrays() if spec.seed == 0 else {}
    measurements.append(_seconds("train_seconds", history.seconds))
    evaluating = max(time.perf_counter() - begin, sitting.seconds_before() and sitting.seconds() - history.seconds)
    measurements.append(_seconds("evaluate_seconds", evaluating))
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
        **_by_task(evaluator.examples, evaluator.classifiers),
    }
    return _Found(measurements, record, arrays, packed)


def _experiment(spec: ExperimentSpec, sitting: Sitting) -> _Found:
    what = find_experiment(spec.model, spec.task)
    begin = time.perf_counter()
    outcome = what.measure(_context(spec, sitting.device))
    seconds = time.perf_counter() - begin + sitting.seconds_before()
    measurements = [Measurement(name, e) for name, e in outcome.estimates.items()]
    measurements += [na(name, reason) for name, reason in outcome.missing.items()]
    record = {
        "about": what.about,
        "paper": spec.model,
        "plots": [plot.as_dict() for plot in outcome.plots],
        **_by_task(outcome.examples, outcome.classifiers),
    }
    return _Found([*measurements, _seconds("evaluate_seconds", seconds)], record)


def failure(spec: AnySpec, error: BaseException | str, stderr: str = "") -> dict[str, Any]:
    """The record of a run that did not end.

    Args:
        error: what was raised, or a line.
        stderr: the end of what the run's process printed there.
    """
    text = error if isinstance(error, str) else (f"{type(error).__name__}: {error}".splitlines() or [""])[0]
    tail = [] if isinstance(error, str) else traceback.format_exception(error)[-6:]
    head = {"run_id": spec.run_id(), "spec": spec.as_dict(), "error": text}
    return {**head, "traceback_tail": "".join(tail), "stderr_tail": stderr}
