"""A run's specification and the hash that names it."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, get_args, get_type_hints

import torch

from replicate.model import ModelEntry, Training
from replicate.registry import TRAINING_FIELDS, UsageError, load_task, model_entry, unknown, unsupported
from replicate.runs.effort import EVALUATION, Evaluation
from replicate.runs.experiment import Experiment
from replicate.runs.files import sha256
from replicate.tasks.base import Task

#: raised by hand when a change of code changes results without changing any spec
RESULTS_VERSION = 1
PROFILES = ("smoke", "standard", "full")
PRECISIONS = {"float32": torch.float32, "float64": torch.float64}
#: the suite's own settings, beside the model's parameters and the training's
PREPROCESSINGS = ("logit", "gaussianise")
DEFAULT_PREPROCESSING = "gaussianise"
MAX_SEED = 2**31 - 1
SMOKE_STEPS = 25


@dataclass(frozen=True)
class RunSpec:
    """All that may change a run's numbers, and nothing else.

    `device` is the kind of device ("cpu", "cuda"): kernels differ, so numbers do. Which of several devices, the
    number of workers and every path are left out on purpose.
    """

    model: str
    family: str
    task: str
    seed: int
    profile: str
    precision: str
    device: str
    preprocessing: str
    params: Mapping[str, Any]
    training: Training
    evaluation: Evaluation
    data_sha256: str
    results_version: int = RESULTS_VERSION

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready form, the one that is hashed."""
        data: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return data

    def run_id(self) -> str:
        """sha256 of the canonical JSON."""
        return spec_hash(self.as_dict())

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> RunSpec:
        """The inverse of `as_dict`."""
        training = Training(**{**data["training"], "betas": tuple(data["training"]["betas"])})
        return RunSpec(**{**data, "training": training, "evaluation": Evaluation(**data["evaluation"])})


@dataclass(frozen=True)
class ExperimentSpec:
    """What may change an experiment's numbers, in the words of a run: a paper's key is its model, its name its task."""

    model: str
    family: str
    task: str
    seed: int
    profile: str
    precision: str
    device: str
    params: Mapping[str, Any]
    data_sha256: str
    results_version: int = RESULTS_VERSION
    kind: str = "experiment"

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready form, the one that is hashed."""
        data: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return data

    def run_id(self) -> str:
        """sha256 of the canonical JSON."""
        return spec_hash(self.as_dict())


AnySpec = RunSpec | ExperimentSpec


def spec_from_dict(data: Mapping[str, Any]) -> AnySpec:
    """The inverse of `as_dict`, of either kind."""
    return ExperimentSpec(**data) if data.get("kind") == "experiment" else RunSpec.from_dict(data)


def spec_hash(spec: Mapping[str, Any]) -> str:
    """sha256 of a spec's canonical JSON (sorted keys, no spaces, ASCII)."""
    text = json.dumps(spec, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def preprocessing_of(entry: ModelEntry, task: Task) -> str:
    """What stands between the data and the model: "none", "affine", or a dequantisation."""
    if entry.needs_density or (task.info.domain != "continuous" and task.info.domain in entry.domains):
        return "none"
    return "affine" if task.info.domain == "continuous" else DEFAULT_PREPROCESSING


def _number(name: str, value: Any, default: Any) -> Any:
    """Check a value against the type of the default it replaces."""
    wanted = type(default)
    if isinstance(default, bool) or default is None or isinstance(default, (list, tuple)):
        ok = default is None or isinstance(value, bool if isinstance(default, bool) else (list, tuple))
        value = tuple(value) if ok and isinstance(default, tuple) else value
    elif isinstance(default, float):
        ok = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        value = float(value) if ok else value
    else:
        ok = isinstance(value, wanted) and not (isinstance(value, bool) and wanted is int)
    if not ok:
        raise UsageError(f"{name} is {value!r}; it must be of type {wanted.__name__}, as in its default {default!r}.")
    return value


def _check_training(training: Training) -> None:
    hints = get_type_hints(Training)
    for name in ("optimizer", "schedule"):
        allowed = get_args(hints[name])
        if getattr(training, name) not in allowed:
            raise UsageError(f"{name} is {getattr(training, name)!r}; it must be one of {', '.join(allowed)}.")
    for name, low in (("steps", 0), ("batch_size", 1), ("warmup", 0), ("validate_every", 0), ("grad_clip", 0)):
        if getattr(training, name) < low:
            raise UsageError(f"{name} is {getattr(training, name)}; it must be at least {low}.")
    if training.lr <= 0:
        raise UsageError(f"lr is {training.lr}; it must be above 0.")
    if not 0 <= training.ema < 1:
        raise UsageError(f"ema is {training.ema}; it must be in [0, 1).")


def make_spec(
    model: str,
    task_name: str,
    seed: int = 0,
    profile: str = "standard",
    device: str = "cpu",
    precision: str = "float32",
    settings: Mapping[str, Any] | None = None,
) -> RunSpec:
    """The spec of one run: the entry's defaults, its overrides for the task and profile, then `settings`.

    Raises:
        UsageError: an unknown name, a value of the wrong type or out of range, or a model that cannot run here.
    """
    entry, task = model_entry(model), load_task(task_name)
    if profile not in PROFILES:
        raise unknown("profile", profile, PROFILES, f"It is one of {', '.join(PROFILES)}.")
    if not 0 <= seed <= MAX_SEED:
        raise UsageError(f"seed is {seed}; it must be from 0 to {MAX_SEED}.")
    if precision not in PRECISIONS:
        raise unknown("precision", precision, PRECISIONS, f"It is one of {', '.join(PRECISIONS)}.")
    reason = unsupported(entry, task)
    if reason:
        raise UsageError(f"{model} cannot run on {task_name}: {reason}.")

    params, training = dict(entry.params), entry.training
    preprocessing = preprocessing_of(entry, task)
    layers = [entry.overrides.get(k, {}) for k in (task.info.domain, task_name, f"{task_name}@{profile}")]
    for layer in layers:
        params.update({k: v for k, v in layer.items() if k not in TRAINING_FIELDS})
        training = replace(training, **{k: v for k, v in layer.items() if k in TRAINING_FIELDS})
    if profile == "smoke":
        steps = min(training.steps, SMOKE_STEPS)
        training = replace(training, steps=steps, validate_every=steps if training.validate_every else 0)
    for key, value in (settings or {}).items():
        if key in TRAINING_FIELDS:
            training = replace(training, **{key: _number(key, value, getattr(training, key))})
        elif key in params:
            params[key] = _number(key, value, params[key])
        elif key == "preprocessing" and preprocessing in PREPROCESSINGS:
            if value not in PREPROCESSINGS:
                raise unknown("preprocessing", str(value), PREPROCESSINGS, f"One of {', '.join(PREPROCESSINGS)}.")
            preprocessing = value
        else:
            known = [*params, *TRAINING_FIELDS]
            raise unknown("setting", key, known, f"{model} takes {', '.join(known)}.")
    _check_training(training)
    return RunSpec(
        model=model,
        family=entry.family,
        task=task_name,
        seed=seed,
        profile=profile,
        precision=precision,
        device=device,
        preprocessing=preprocessing,
        params=params,
        training=training,
        evaluation=EVALUATION[profile],
        data_sha256=task.sha256(),
    )


def experiment_spec(
    paper: str, experiment: Experiment, seed: int, profile: str = "standard", device: str = "cpu"
) -> ExperimentSpec:
    """The spec of one seed of a paper's experiment."""
    digests = "".join([*(load_task(t).sha256() for t in experiment.tasks), *map(sha256, experiment.files)])
    return ExperimentSpec(
        model=paper,
        family=experiment.family,
        task=experiment.name,
        seed=seed,
        profile=profile,
        precision=experiment.precision,
        device=device,
        params=experiment.settings(profile),
        data_sha256=hashlib.sha256(digests.encode()).hexdigest() if digests else "",
    )
