"""A run's specification and the hash that names it.

The hash covers every setting, except settings added later that have their defaults. So a new field of `Training` or
`Evaluation` (declared by `replicate.model.later`), or a new parameter of a model (`ModelEntry.later`), gives no
committed run another id. The default of a later setting must never change.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar

import torch

from replicate.data.files import sha256
from replicate.errors import UsageError
from replicate.model import FAMILIES, TRAINING_FIELDS, ModelEntry, Training
from replicate.registry import model_entry, unknown
from replicate.runs.effort import EVALUATION, Evaluation
from replicate.runs.experiment import Experiment
from replicate.tasks.base import Task
from replicate.tasks.loading import data_sha256, load_task, unsupported
from replicate.validation import (
    CELL,
    COUNT,
    DIGEST,
    MOST,
    NAME,
    PROFILES,
    Param,
    Problems,
    Range,
    Rule,
    Scalar,
    brief,
    check_table,
    check_value,
    rules_of,
)

#: raised by hand when a change of the code changes results but no spec
RESULTS_VERSION = 1
PRECISIONS = {"float32": torch.float32, "float64": torch.float64}
DEVICES = ("cpu", "cuda")
#: the preprocessings that a user may choose
PREPROCESSINGS = ("logit", "gaussianise")
DEFAULT_PREPROCESSING = "gaussianise"
MAX_SEED = 2**31 - 1
SMOKE_STEPS = 25


@dataclass(frozen=True, kw_only=True)
class Spec:
    """All that may change the numbers of a run, and nothing else.

    `device` is the kind of device ("cpu", "cuda"): kernels differ, so numbers do. The number of the device, the number
    of workers and every path are left out on purpose.
    """

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

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON-ready form, the one that is hashed."""
        data = asdict(self)
        for name, part in vars(self).items():
            if is_dataclass(part):
                for f in fields(part):
                    if f.metadata.get("later") and getattr(part, f.name) == f.default:
                        del data[name][f.name]
        found: dict[str, Any] = json.loads(json.dumps(data))
        return found

    def run_id(self) -> str:
        """Return the sha256 of the canonical JSON."""
        return spec_hash(self.as_dict())

    @property
    def label(self) -> str:
        """The run in words."""
        return f"{self.model} on {self.task}, seed {self.seed}"

    @property
    def data_key(self) -> tuple[str, str]:
        """Equal for runs that read the same data."""
        return self.task, self.model if isinstance(self, ExperimentSpec) else ""


@dataclass(frozen=True, kw_only=True)
class RunSpec(Spec):
    """The spec of a model's run on a task."""

    preprocessing: str
    training: Training
    evaluation: Evaluation


@dataclass(frozen=True, kw_only=True)
class ExperimentSpec(Spec):
    """The spec of an experiment's run: its paper's key is the model, its name is the task."""

    kind: str = "experiment"


AnySpec = RunSpec | ExperimentSpec
T = TypeVar("T")


def _rules(kind: type, ranges: Mapping[str, Range]) -> dict[str, Rule]:
    """Return the rules of a part of a spec, which must have every field but the later ones."""
    later = {f.name for f in fields(kind) if f.metadata.get("later")}
    return {name: replace(rule, required=name not in later) for name, rule in rules_of(kind, ranges=ranges).items()}


_TRAINING_RANGES = {
    **dict.fromkeys(("steps", "warmup", "validate_every"), COUNT),
    **dict.fromkeys(("weight_decay", "grad_clip"), Range(low=0)),
    **dict.fromkeys(("betas", "ema"), Range(low=0, below=1)),
    "batch_size": Range(1, MOST),
    "lr": Range(above=0),
}
#: what a training setting may be, whoever gives it
_TRAINING = _rules(Training, _TRAINING_RANGES)
_EVALUATION = _rules(Evaluation, dict.fromkeys(rules_of(Evaluation), COUNT))
_RANGES = {"seed": Range(0, MAX_SEED), "results_version": Range(1, MOST)}
_CHOICES = {
    **{"family": FAMILIES, "profile": PROFILES, "precision": PRECISIONS, "device": DEVICES},
    **{"preprocessing": ("none", "affine", *PREPROCESSINGS), "kind": ("experiment",)},
}
_RUN = {
    **rules_of(RunSpec, ranges=_RANGES, choices=_CHOICES, complete=True),
    **dict.fromkeys(("model", "task"), Rule(str, pattern=CELL)),
    **dict.fromkeys(("training", "evaluation"), Rule(Mapping)),
    "data_sha256": Rule(str, pattern=DIGEST),
}
_EXPERIMENT = {
    **rules_of(ExperimentSpec, ranges=_RANGES, choices=_CHOICES, complete=True),
    **dict.fromkeys(("model", "task"), Rule(str, pattern=NAME)),
    "data_sha256": Rule(str, pattern=DIGEST, blank=True),  # of an experiment that reads no data
}
_PARAM = Rule(Param, blank=True)


def check_spec(data: object, problems: Problems, name: str = "the spec") -> None:
    """Note every difference between the data and what `as_dict` of a spec returns.

    Args:
        name: of the data, in words or as a path of keys.
    """
    wrong = lambda _, problem: problems.add(problem)  # noqa: E731
    is_experiment = isinstance(data, Mapping) and data.get("kind") == "experiment"
    if not check_table(data, _EXPERIMENT if is_experiment else _RUN, name, wrong):
        return
    assert isinstance(data, Mapping)
    for key, rules in {"training": _TRAINING, "evaluation": _EVALUATION}.items():
        if not is_experiment and isinstance(data.get(key), Mapping):
            check_table(data[key], rules, f"{key} of {name}", wrong)
    if isinstance(data.get("params"), Mapping):
        for key, value in data["params"].items():
            if isinstance(key, str) and key:
                check_value(brief(key), value, _PARAM, wrong, f"params of {name}")
            else:
                problems.add(f"params of {name} has a key {brief(key)}; it must be text")


def spec_from_dict(data: object) -> AnySpec:
    """Read a spec of either kind; the inverse of `as_dict`. Whether its model, task or paper exists is not checked.

    Raises:
        UsageError: everything that is wrong with the data, one problem per line.
    """
    problems = Problems()
    check_spec(data, problems)
    problems.refuse(UsageError)
    assert isinstance(data, Mapping)
    params = _frozen(data["params"])
    if data.get("kind") == "experiment":
        return ExperimentSpec(**{**data, "params": params})
    training = Training(**{**data["training"], "betas": tuple(data["training"]["betas"])})
    return RunSpec(**{**data, "params": params, "training": training, "evaluation": Evaluation(**data["evaluation"])})


def _frozen(params: Mapping[str, Any]) -> dict[str, Any]:
    """Turn lists into tuples, so that settings from an entry, a command line and a file are equal."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in params.items()}


def canonical(data: Mapping[str, Any]) -> bytes:
    """Return the one JSON form that is hashed: sorted keys, no spaces, ASCII."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


def spec_hash(spec: Mapping[str, Any]) -> str:
    """Return the sha256 of a spec's canonical JSON."""
    return hashlib.sha256(canonical(spec)).hexdigest()


def preprocessing_of(entry: ModelEntry, task: Task) -> str:
    """Return the preprocessing between data and model: "none", "affine", or a dequantisation."""
    if entry.needs_density or (task.info.domain != "continuous" and task.info.domain in entry.domains):
        return "none"
    return "affine" if task.info.domain == "continuous" else DEFAULT_PREPROCESSING


def _rule_of(key: str, default: Any) -> Rule:
    """Return the rule of a setting: a parameter of a model must have the type of its default."""
    if key in _TRAINING:
        return _TRAINING[key]
    if key == "preprocessing":
        return Rule(str, choices=PREPROCESSINGS)
    if isinstance(default, (list, tuple)):
        return Rule(tuple[Scalar, ...])
    return Rule(type(default), blank=True) if isinstance(default, (bool, int, float, str)) else _PARAM


def _check_setting(problems: Problems, key: str, value: Any, default: Any) -> None:
    hint = " (which is its default)." if value is default else f" (its default is {brief(default)})."
    check_value(key, value, _rule_of(key, default), lambda _, problem: problems.add(problem + hint))


def _typed(value: Any, default: Any) -> Any:
    """Convert a setting to the type of its default: an integer to a float, a list to a tuple."""
    if isinstance(default, float):
        return float(value)
    return tuple(value) if isinstance(default, tuple) else value


def _found(problems: Problems, find: Callable[[str], T], name: str) -> T | None:
    """Return find(name), or note the problem and return None."""
    try:
        return find(name)
    except UsageError as error:
        problems.add(str(error))
        return None


def _defaults(
    entry: ModelEntry | None, task: Task | None, task_name: str, profile: str
) -> tuple[dict[str, Any], Training, str]:
    """Return a model's parameters, training and preprocessing on a task, as far as both are known."""
    if entry is None:
        return {}, Training(), "none"
    params, training = dict(entry.params), entry.training
    if task is None:
        return params, training, "none"
    for layer in (entry.overrides.get(k, {}) for k in (task.info.domain, task_name, f"{task_name}@{profile}")):
        params.update({k: v for k, v in layer.items() if k not in TRAINING_FIELDS})
        training = replace(training, **{k: v for k, v in layer.items() if k in TRAINING_FIELDS})
    if profile == "smoke":
        steps = min(training.steps, SMOKE_STEPS)
        training = replace(training, steps=steps, validate_every=steps if training.validate_every else 0)
    return params, training, preprocessing_of(entry, task)


def make_spec(
    model: str,
    task_name: str,
    seed: int = 0,
    profile: str = "standard",
    device: str = "cpu",
    precision: str = "float32",
    settings: Mapping[str, Any] | None = None,
) -> RunSpec:
    """Make the spec of one run: the entry's defaults, its overrides for the task and profile, then `settings`.

    Raises:
        UsageError: every unknown name, every value of the wrong type or out of range, and a model that cannot run here.
    """
    problems = Problems()
    entry = _found(problems, model_entry, model)
    fold = seed if isinstance(seed, int) else 0
    task = _found(problems, lambda name: load_task(name, fold), task_name)
    for key, value in (("seed", seed), ("profile", profile), ("precision", precision), ("device", device)):
        check_value(key, value, _RUN[key], lambda _, problem: problems.add(f"{problem}."))
    reason = unsupported(entry, task) if entry and task else None
    if reason:
        problems.add(f"{model} cannot run on {task_name}: {reason}.")
    params, training, preprocessing = _defaults(entry, task, task_name, profile)
    asked = settings or {}
    defaults = {**params, **vars(training)}
    for key, value in defaults.items():  # a plug-in's own defaults are no better than a user's
        if key not in asked:
            _check_setting(problems, key, value, value)
    for key, value in asked.items():
        if key in defaults:
            _check_setting(problems, key, value, defaults[key])
        elif key == "preprocessing" and (task is None or preprocessing in PREPROCESSINGS):
            _check_setting(problems, key, value, DEFAULT_PREPROCESSING)
        elif entry is not None:
            known = [*params, *TRAINING_FIELDS]
            problems.add(str(unknown("setting", key, known, f"{model} takes {', '.join(known)}.")))
    problems.refuse(UsageError)
    assert entry is not None
    assert task is not None

    params = _frozen({key: _typed(asked.get(key, value), value) for key, value in params.items()})
    params = {key: value for key, value in params.items() if key not in entry.later or value != entry.later[key]}
    chosen = {k: _typed(v, getattr(training, k)) for k, v in asked.items() if k in TRAINING_FIELDS}
    return RunSpec(
        model=model,
        family=entry.family,
        task=task_name,
        seed=seed,
        profile=profile,
        precision=precision,
        device=device,
        preprocessing=asked.get("preprocessing", preprocessing),
        params=params,
        training=replace(training, **chosen),
        evaluation=EVALUATION[profile],
        data_sha256=data_sha256(task_name, seed),
    )


def experiment_spec(
    paper: str, experiment: Experiment, seed: int, profile: str = "standard", device: str = "cpu"
) -> ExperimentSpec:
    """Make the spec of one seed of a paper's experiment."""
    files = (*experiment.files, *experiment.optional_files)  # an absent one has no digest
    digests = "".join([*map(data_sha256, experiment.tasks), *map(sha256, files)])
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
