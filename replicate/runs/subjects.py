"""The two subjects of a run: a model on a task, and an experiment of a paper. Nothing else asks which one it is."""

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import safetensors.torch
import torch

from replicate.likelihood.dequantisation import Preprocessed
from replicate.model import LogLikelihood, Model
from replicate.process_state import contained
from replicate.registry import model_entry
from replicate.runs.checkpoint import Session
from replicate.runs.evaluate import Evaluator, Measurement, count, na
from replicate.runs.experiment import Experiment, Run, pack_examples
from replicate.runs.guard import guarded
from replicate.runs.paper import find_experiment
from replicate.runs.seeds import Streams
from replicate.runs.spec import PRECISIONS, AnySpec, ExperimentSpec, RunSpec, experiment_spec
from replicate.runs.training import History, train
from replicate.tasks.base import Task
from replicate.tasks.loading import data_sha256, load_task


@dataclass(frozen=True)
class Findings:
    """What a run computed.

    Attributes:
        measurements: without the memory that the process took.
        record: the subject's own part of the record.
        arrays: for the report's pictures.
        weights: of the trained model, as a safetensors file.
    """

    measurements: Sequence[Measurement]
    record: Mapping[str, Any]
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)
    weights: bytes = b""


def build_model(spec: RunSpec, task: Task, streams: Streams) -> Model:
    """Build the untrained model behind its preprocessing, its weights drawn from the run's own stream.

    Raises:
        ModelError: what was built is no model, or not the one that it declares.
    """
    entry = model_entry(spec.model)
    extra = {"density": task.density} if entry.needs_density else {}
    with contained(f"building {spec.model}", within_run=True), streams.initialisation():
        model = guarded(entry.build(task.info, **{**entry.later, **spec.params}, **extra), task.info)
    if not hasattr(model, "family"):
        type(model).family = entry.family
    return model if spec.preprocessing == "none" else Preprocessed(model, task.info, spec.preprocessing)


def train_model(spec: RunSpec, device: torch.device) -> tuple[Model, Task, History, Evaluator]:
    """Train one model; nothing is measured yet."""
    dtype = PRECISIONS[spec.precision]
    task = load_task(spec.task, spec.seed)
    task = replace(task, train=task.train.to(dtype), valid=task.valid.to(dtype), test=task.test.to(dtype))
    streams = Streams(spec.task, spec.model, spec.seed, device.type)
    model = build_model(spec, task, streams).to(device)
    if dtype != torch.float32:  # never narrowed: some models keep tables in double precision
        model = model.to(dtype)
    with contained(f"training {spec.model}", within_run=True):
        history = train(model, task.train.to(device), task.valid.to(device), spec.training, streams, task.redraw)
    return model, task, history, Evaluator(model, task, spec.evaluation, streams, device)


def _by_task(examples: Mapping[str, LogLikelihood], classifiers: Mapping[str, str]) -> dict[str, Any]:
    """Return the record's parts for likelihoods of test examples and for classifiers, as far as there are any."""
    packed = {task: pack_examples(log_p) for task, log_p in examples.items()}
    return {key: part for key, part in (("examples", packed), ("classifiers", dict(classifiers))) if part}


@dataclass(frozen=True)
class ModelOnTask:
    """A registered model, trained and evaluated on a task."""

    spec: RunSpec

    def data_sha256(self) -> str:
        """Return the hash of the data on this machine, in the form of the spec's.

        Raises:
            UsageError: the subject or its data are not there.
        """
        model_entry(self.spec.model)
        return data_sha256(self.spec.task, self.spec.seed)

    def expected_seconds(self) -> float:
        """Return the seconds that its author expects, 0 where he says nothing."""
        return 0.0

    def compute(self, session: Session) -> Findings:
        """Compute everything that is measured."""
        model, _, history, evaluator = train_model(self.spec, session.device)
        begin = time.perf_counter()
        measurements = list(evaluator.measurements())
        arrays = evaluator.arrays() if self.spec.seed == 0 else {}
        measurements.append(count("train_seconds", history.seconds, "seconds"))
        evaluating = max(time.perf_counter() - begin, session.seconds_before() and session.seconds() - history.seconds)
        measurements.append(count("evaluate_seconds", evaluating, "seconds"))
        weights = {k: v.detach().cpu().contiguous().clone() for k, v in model.state_dict().items()}
        packed, entry = safetensors.torch.save(weights), model_entry(self.spec.model)
        record = {
            "weights_sha256": hashlib.sha256(packed).hexdigest(),
            "about": entry.about,
            "paper": entry.paper,
            "history": vars(history),
            **_by_task(evaluator.examples, evaluator.classifiers),
        }
        return Findings(measurements, record, arrays, packed)


@dataclass(frozen=True)
class ExperimentOfPaper:
    """An experiment that measures what a paper's claims state; its methods are those of `ModelOnTask`."""

    spec: ExperimentSpec

    def _experiment(self) -> Experiment:
        return find_experiment(self.spec.model, self.spec.task)

    def data_sha256(self) -> str:
        spec = self.spec
        return experiment_spec(spec.model, self._experiment(), spec.seed, spec.profile, spec.device).data_sha256

    def expected_seconds(self) -> float:
        return 60 * self._experiment().cuda_minutes

    def compute(self, session: Session) -> Findings:
        spec, what = self.spec, self._experiment()
        begin = time.perf_counter()
        # designs and tolerances were chosen on streams of the bare name; judged runs draw others
        streams = Streams(f"judged/{spec.task}", spec.model, spec.seed, session.device.type)
        outcome = what.measure(Run(spec.params, streams, session.device))
        seconds = time.perf_counter() - begin + session.seconds_before()
        record = {
            "about": what.about,
            "paper": spec.model,
            "plots": [plot.as_dict() for plot in outcome.plots],
            **_by_task(outcome.examples, outcome.classifiers),
        }
        measurements = [Measurement(name, e) for name, e in outcome.estimates.items()]
        measurements += [na(name, reason) for name, reason in outcome.missing.items()]
        return Findings([*measurements, count("evaluate_seconds", seconds, "seconds")], record)


def subject_of(spec: AnySpec) -> ModelOnTask | ExperimentOfPaper:
    """Return what a spec is about."""
    return ExperimentOfPaper(spec) if isinstance(spec, ExperimentSpec) else ModelOnTask(spec)
