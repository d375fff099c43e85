"""The contract between a model and the suite, and the typed numbers that the suite reports.

This module is the whole contract: `baselines` and the plug-ins of users import nothing else.

A likelihood is never a bare float. `Estimate` is one number with its kind; `LogLikelihood` is one number per example
with its kind. The kind says on which side of the truth the number may be.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Literal, SupportsFloat, get_args

import torch
from torch import Tensor, nn

Kind = Literal["exact", "lower_bound", "upper_bound", "estimate"]
Family = Literal["autoregressive", "flow", "vae", "ebm", "score", "reference"]
Domain = Literal["continuous", "levels", "bits"]
Capability = Literal[
    "log_prob",  # log_prob(x): exact and normalised
    "importance_weights",  # log_weights(x, k, generator): E[mean_k exp] = p(x)
    "energy",  # energy(x): -log p(x) up to the constant log Z
    "annealing",  # base_log_z, base_sample, anneal: for annealed importance sampling
    "diffusion",  # sde and score_at(x, t): for the probability-flow ODE
    "score",  # score(x) = grad_x log p(x)
    "sample",  # sample(n, generator)
]

#: n and a generator in; samples (n, D) and the sequential network evaluations behind them out
Sampler = Callable[[int, torch.Generator], tuple[Tensor, int]]

KINDS: tuple[str, ...] = get_args(Kind)
FAMILIES: tuple[str, ...] = get_args(Family)
CAPABILITIES: tuple[str, ...] = get_args(Capability)
SYMBOLS: dict[str, str] = {"exact": "=", "lower_bound": ">=", "upper_bound": "<=", "estimate": "~"}
_FLIPPED: dict[str, Kind] = {"exact": "exact", "lower_bound": "upper_bound", "upper_bound": "lower_bound"}


def flipped(kind: str) -> Kind:
    """Return the kind of -x for a number x of this kind: a lower bound becomes an upper bound."""
    return _FLIPPED.get(kind, "estimate")


def kind_of_difference(a: str, b: str) -> Kind:
    """Return the kind of a - b: a bound only where a and -b are bounds of one side, or exact."""
    parts = {a, flipped(b)} - {"exact"}
    if not parts:
        return "exact"
    return flipped(flipped(parts.pop())) if len(parts) == 1 else "estimate"


@dataclass(frozen=True)
class Estimate:
    """One number with its kind and its standard error.

    Attributes:
        value: the number, in `unit`.
        stderr: its standard error in `unit`; 0.0 where there is no sampling error, nan where it is unknown.
        kind: the side of the truth on which `value` may be ("exact" still has the sampling error of a finite test set
            in `stderr`).
        unit: in full words ("nats", "bits/dim", "seconds").
        n: number of independent draws or examples that the number averages.

    Example:
        >>> -Estimate(-1.4, 0.1, "lower_bound", "nats", 100)
        Estimate(value=1.4, stderr=0.1, kind='upper_bound', unit='nats', n=100)
    """

    value: float
    stderr: float
    kind: Kind
    unit: str
    n: int

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"Estimate.kind is {self.kind!r}; it must be one of {', '.join(KINDS)}")
        if self.n < 1:
            raise ValueError(f"Estimate.n is {self.n}; it must be at least 1")

    @property
    def symbol(self) -> str:
        """The sign before the number in a table cell: = >= <= ~."""
        return SYMBOLS[self.kind]

    def __neg__(self) -> Estimate:
        """Return the negated number: a lower bound becomes an upper bound."""
        return replace(self, value=-self.value, kind=flipped(self.kind))

    def __sub__(self, other: Estimate) -> Estimate:
        """Return the difference of two independent numbers of one unit.

        Example:
            >>> Estimate(3.0, 0.3, "lower_bound", "nats", 10) - Estimate(1.0, 0.4, "exact", "nats", 5)
            Estimate(value=2.0, stderr=0.5, kind='lower_bound', unit='nats', n=5)

        Raises:
            ValueError: the units differ.
        """
        if self.unit != other.unit:
            raise ValueError(f"{self.unit} minus {other.unit} has no unit")
        stderr, kind = math.hypot(self.stderr, other.stderr), kind_of_difference(self.kind, other.kind)
        return Estimate(self.value - other.value, stderr, kind, self.unit, min(self.n, other.n))

    def times(self, factor: float, unit: str) -> Estimate:
        """Return the number in another unit; a negative factor flips bounds."""
        kind = flipped(self.kind) if factor < 0 else self.kind
        return Estimate(self.value * factor, self.stderr * abs(factor), kind, unit, self.n)

    @staticmethod
    def exact(value: SupportsFloat, unit: str, n: int = 1) -> Estimate:
        """Return a computed number without sampling error.

        Example:
            >>> Estimate.exact(0.5, "nats")
            Estimate(value=0.5, stderr=0.0, kind='exact', unit='nats', n=1)
        """
        return Estimate(float(value), 0.0, "exact", unit, n)

    @staticmethod
    def mean_of(values: Tensor, kind: Kind, unit: str) -> Estimate:
        """Return the mean of per-example values of shape (n,), with the standard error of that mean.

        Example:
            >>> Estimate.mean_of(torch.tensor([1.0, 3.0]), "exact", "nats")
            Estimate(value=2.0, stderr=1.0, kind='exact', unit='nats', n=2)
        """
        x = values.detach().double().flatten()
        n = x.numel()
        stderr = float(x.std(unbiased=True) / math.sqrt(n)) if n > 1 else math.nan
        return Estimate(float(x.mean()), stderr, kind, unit, n)


@dataclass(frozen=True)
class LogLikelihood:
    """log p(x) of each example, in nats, with its kind.

    Attributes:
        values: shape (n,).
        kind: of every value.
        draws: random draws per value (importance samples, dequantisation draws, probes); 1 if none.
        shared_stderr: standard error in nats that all values share, such as that of one estimate of log Z.
        details: further estimates with a row of their own, by metric name (log Z, effective sample size, solver error).
    """

    values: Tensor
    kind: Kind
    draws: int = 1
    shared_stderr: float = 0.0
    details: Mapping[str, Estimate] = field(default_factory=dict)

    def mean(self) -> Estimate:
        """Return the mean log-likelihood over the examples in nats, with per-example and shared errors combined."""
        m = Estimate.mean_of(self.values, self.kind, "nats")
        return replace(m, stderr=math.hypot(m.stderr, self.shared_stderr))


@dataclass(frozen=True)
class DataInfo:
    """The shapes and ranges of the data, which a model may know before it sees any; never the density.

    Attributes:
        dim: number of dimensions D; every batch is (n, D).
        domain: "continuous" (real numbers), "levels" (integers 0..levels-1), "bits" (0 or 1).
        levels: number of levels on discrete data, None on continuous data.
        image: (height, width) where the D dimensions are an image in row-major order.
    """

    dim: int
    domain: Domain
    levels: int | None = None
    image: tuple[int, int] | None = None


class Model(nn.Module):
    """Base of every model in the suite.

    A subclass sets `family` and `capabilities` and implements the methods that its capabilities name; the suite prints
    "n/a" for measurements that need another one. All tensors are batches of shape (n, D); discrete data are floating
    point tensors of integers. Every random draw uses the generator that the caller gives.
    """

    family: ClassVar[Family]
    capabilities: frozenset[str] = frozenset()
    #: sequential network evaluations of `sample` for one batch
    nfe: int = 1
    #: true if a score costs too much for hundreds of Langevin steps: the sampler comparison skips the model
    costly_score: bool = False

    def initialise(self, train: Tensor, generator: torch.Generator) -> None:
        """Initialise from the training split (n, D); called once before training.

        Models with a fit in closed form or by EM do all their training here.
        """

    def loss(self, batch: Tensor, generator: torch.Generator) -> Tensor:
        """Return the training objective, a scalar, on a batch of shape (n, D)."""
        raise NotImplementedError

    def validation_loss(self, batch: Tensor, generator: torch.Generator) -> Tensor:
        """Return the scalar that selects the best step on the validation split; `loss` unless overridden."""
        return self.loss(batch, generator)

    def after_step(self, generator: torch.Generator) -> None:
        """Update constraints or persistent chains; called after each optimizer step."""

    def log_prob(self, x: Tensor) -> Tensor:
        """Return the exact normalised log density (or log mass) in nats, shape (n,)."""
        raise NotImplementedError

    def log_weights(self, x: Tensor, k: int, generator: torch.Generator) -> Tensor:
        """Return log importance weights, shape (n, k), whose exponentials have mean p(x)."""
        raise NotImplementedError

    def energy(self, x: Tensor) -> Tensor:
        """Return the energy f(x) = -log p(x) - log Z in nats, shape (n,)."""
        raise NotImplementedError

    def score(self, x: Tensor) -> Tensor:
        """Return grad_x log p(x), shape (n, D). Without an override: autograd of `log_prob`, else of `-energy`."""
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            if "log_prob" in self.capabilities:
                total = self.log_prob(x).sum()
            elif "energy" in self.capabilities:
                total = -self.energy(x).sum()
            else:
                raise NotImplementedError
            (grad,) = torch.autograd.grad(total, x)
        return grad

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Draw n samples by the model's own sampler, shape (n, D)."""
        raise NotImplementedError

    def samplers(self) -> Mapping[str, Sampler]:
        """Return further samplers by name, measured like `sample`; each gives (samples (n, D), network evaluations)."""
        return {}

    # annealed importance sampling between a tractable base (beta = 0) and the model (beta = 1)
    def base_log_z(self) -> float:
        """Return the exact log normalising constant of the annealing path at beta = 0, in nats."""
        raise NotImplementedError

    def base_sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Draw n exact samples of the annealing path at beta = 0, shape (n, D)."""
        raise NotImplementedError

    def anneal(self, x: Tensor, beta: float, beta_next: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Take one annealing step.

        Returns:
            (log f_{beta_next}(x) - log f_{beta}(x) of shape (n,), x after an MCMC kernel that is reversible with
            respect to f_{beta_next}, shape (n, D)).
        """
        raise NotImplementedError


def later(default: Any) -> Any:
    """Declare a field of `Training` or `Evaluation` that came after the first committed runs.

    At its default a spec leaves it out, so that it gives no earlier run another id. The default must compute what those
    runs did, and must never change.
    """
    return field(default=default, metadata={"later": True})


@dataclass(frozen=True)
class Training:
    """Training settings; the command line sets each field by `--set NAME=VALUE`.

    Attributes:
        steps: optimizer steps; 0 for models that `initialise` fits.
        batch_size: examples per step.
        lr: peak learning rate.
        optimizer: "adam" (decoupled weight decay) or "sgd" (momentum 0.9).
        betas: Adam's two decay rates.
        schedule: "constant" or "cosine" (to zero, after `warmup` steps).
        warmup: steps of linear warm-up.
        weight_decay: decoupled weight decay.
        grad_clip: largest gradient norm; 0 switches clipping off.
        ema: decay of the exponential moving average of the weights, which is evaluated; 0 switches it off.
        validate_every: steps between validations that select the best weights; 0 keeps the last weights.
    """

    steps: int = 2000
    batch_size: int = 256
    lr: float = 1e-3
    optimizer: Literal["adam", "sgd"] = "adam"
    betas: tuple[float, float] = (0.9, 0.999)
    schedule: Literal["constant", "cosine"] = "cosine"
    warmup: int = 0
    weight_decay: float = 0.0
    grad_clip: float = 0.0
    ema: float = 0.0
    validate_every: int = 0


@dataclass(frozen=True)
class ModelEntry:
    """A model of the suite: the object that an entry point in `replicate.models` names.

    Attributes:
        family: one of FAMILIES.
        about: one line for `replicate list` and the report.
        paper: the source, author and year with arXiv number or place.
        build: called as build(info, **params); initialises parameters from torch's generator, which the suite seeds
            before the call and restores after it.
        domains: the data domains of the model. The suite wraps a continuous model on discrete data in the shared
            dequantise-logit-standardise preprocessing.
        params: default hyperparameters (JSON scalars) of `build`.
        training: default training settings.
        overrides: changes to params and training (one flat mapping) by data domain ("continuous", "levels",
            "bits"), task name, or "TASK@PROFILE"; applied in that order.
        needs_image: build raises ValueError on data without rows and columns.
        needs_dim: build raises ValueError on data of fewer dimensions.
        needs_density: build also gets density=task.density (None where the truth is not known, if the model lists
            that domain; one that lists none runs only where it is known), and the model sees the data without
            preprocessing.
        later: parameters that came after the model's first committed runs, each with the value that computes what these
            runs did. At that value a parameter is left out of the spec, so that it gives no earlier run another id.
    """

    family: Family
    about: str
    paper: str
    build: Callable[..., Model]
    domains: frozenset[str]
    params: Mapping[str, Any] = field(default_factory=dict)
    training: Training = field(default_factory=Training)
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    needs_image: bool = False
    needs_dim: int = 1
    needs_density: bool = False
    later: Mapping[str, Any] = field(default_factory=dict)

    @property
    def problem(self) -> str:
        """The reason why this entry cannot be used, or "" if it can."""
        known = self.family in FAMILIES
        return "" if known else f"family {self.family!r} is not one of {', '.join(FAMILIES)}"


TRAINING_FIELDS = tuple(f.name for f in fields(Training))
