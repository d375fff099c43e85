"""Annealed importance sampling: log Z of an unnormalised model from below and from above.

Neal (2001), Annealed importance sampling, Statistics and Computing 11, eq. 4-9; Salakhutdinov & Murray (2008), On the
quantitative analysis of deep belief networks, ICML, sec. 3-4; the reverse chain as in Grosse, Ghahramani & Adams
(2015), Sandwiching the marginal likelihood using bidirectional Monte Carlo, 1511.02543.

The forward run's mean weight is an unbiased estimate of Z / Z_0, so by Jensen its logarithm is low on average; the
reverse run's mean weight is unbiased for Z_0 / Z, so log Z comes out high. The second statement needs exact model
samples at the start. Here they come from a long Markov chain, so the upper side holds as far as that chain has
converged; a mode that neither run ever reaches narrows the bracket without right.

Deviation from the papers: inverse temperatures, weight increments and their sums are float64 throughout (in float32
ten thousand temperatures round to steps that are wrong by per cents).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from replicate.model import Estimate, Kind, LogLikelihood, Model
from replicate.resume import State, resumable


@dataclass(frozen=True)
class AISResult:
    """One annealing run.

    Attributes:
        log_z: log Z of the model in nats; "lower_bound" from a forward run, "upper_bound" from a reverse one (in
            expectation over runs). Its stderr is the delta method's, sd(w) / (mean(w) sqrt(n)): the spread of the
            weights at hand, which says nothing about regions that no chain reached and cannot exceed 1.
        ess: effective sample size (sum w)^2 / sum w^2, between 1 and the number of chains.
        log_weights: log importance weights of the chains, shape (n,), float64. They estimate log(Z / Z_0) in a
            forward run and log(Z_0 / Z) in a reverse run.
        samples: where the chains ended, shape (n, D): at the model (forward) or at the base (reverse).
    """

    log_z: Estimate
    ess: Estimate
    log_weights: Tensor
    samples: Tensor


class Bracket(NamedTuple):
    """A forward and a reverse run of the same path."""

    forward: AISResult
    reverse: AISResult

    @property
    def gap(self) -> float:
        """Reverse minus forward log Z in nats; at or above 0 up to sampling error."""
        return self.reverse.log_z.value - self.forward.log_z.value

    @property
    def log_z(self) -> Estimate:
        """The bracket's middle; the stderr combines both runs' errors with half the gap."""
        low, high = self.forward.log_z, self.reverse.log_z
        stderr = math.hypot(low.stderr / 2, high.stderr / 2, self.gap / 2)
        return Estimate((low.value + high.value) / 2, stderr, "estimate", "nats", low.n + high.n)

    def details(self) -> dict[str, Estimate]:
        """Rows for the record: both log Z and the smaller of the two effective sample sizes."""
        ess = min(self.forward.ess, self.reverse.ess, key=lambda e: e.value)
        return {"ais_log_z_forward": self.forward.log_z, "ais_log_z_reverse": self.reverse.log_z, "ais_ess": ess}


def schedule(n: int, shape: Literal["linear", "sigmoidal"] = "linear", steepness: float = 4.0) -> Tensor:
    """n + 1 inverse temperatures 0 = b_0 < .. < b_n = 1, float64.

    Args:
        n: number of annealing steps, at least 1.
        shape: "linear", or "sigmoidal" (denser at both ends; Grosse, Maddison & Salakhutdinov 2013, sec. 6).
        steepness: the sigmoid's argument runs over (-steepness, steepness).
    """
    if n < 1:
        raise ValueError(f"schedule needs n >= 1 annealing steps, not {n}")
    t = torch.linspace(0, 1, n + 1, dtype=torch.float64)
    if shape == "linear":
        return t
    if shape != "sigmoidal":
        raise ValueError(f"schedule shape is {shape!r}; it must be 'linear' or 'sigmoidal'")
    s = torch.sigmoid(steepness * (2 * t - 1))
    betas = (s - s[0]) / (s[-1] - s[0])
    betas[0], betas[-1] = 0.0, 1.0
    return betas


def _checked(betas: Tensor) -> list[float]:
    """The inverse temperatures as Python floats (float64), once on the host."""
    if betas.dtype != torch.float64:
        raise ValueError(f"inverse temperatures must be float64, not {betas.dtype}; use schedule(n)")
    values: list[float] = betas.tolist()
    if len(values) < 2 or values[0] != 0.0 or values[-1] != 1.0 or bool((betas.diff() <= 0).any()):
        raise ValueError("inverse temperatures must increase from exactly 0 to exactly 1")
    return values


def _result(offset: float, sign: int, log_weights: Tensor, samples: Tensor, kind: Kind) -> AISResult:
    """log Z = offset + sign * log mean(w), with the delta method's error and the effective sample size."""
    n = log_weights.numel()
    log_mean = float(torch.logsumexp(log_weights, 0)) - math.log(n)
    relative = (log_weights - log_mean).exp()  # w / mean(w)
    stderr = float(relative.std(unbiased=True)) / math.sqrt(n) if n > 1 else math.nan
    ess = n / float(relative.square().mean())
    return AISResult(
        Estimate(offset + sign * log_mean, stderr, kind, "nats", n),
        Estimate(ess, math.nan, "estimate", "chains", n),
        log_weights,
        samples,
    )


@torch.no_grad()
def ais(model: Model, chains: int, betas: Tensor, generator: torch.Generator) -> AISResult:
    """Forward annealing from the base to the model: log Z biased low.

    Args:
        model: has the capability "annealing".
        chains: number of independent chains n.
        betas: inverse temperatures from 0 to 1, float64, shape (K + 1,).

    Raises:
        ValueError: the inverse temperatures are not float64 or do not increase from 0 to 1.
    """
    values = _checked(betas)
    log_weights, x = _annealed("ais", model, model.base_sample(chains, generator), values, generator)
    return _result(model.base_log_z(), 1, log_weights, x, "lower_bound")


@torch.no_grad()
def reverse_ais(model: Model, start: Tensor, betas: Tensor, generator: torch.Generator, burn_in: int = 1) -> AISResult:
    """Reverse annealing from model samples to the base: log Z biased high.

    Args:
        model: has the capability "annealing"; its kernels are reversible, so each is its own reversal.
        start: (as nearly as can be had) independent samples of the model, shape (n, D).
        betas: the same inverse temperatures as for the forward run, increasing.
        burn_in: kernels applied at beta = 1 first; the exact reversal of `ais` has one.

    Raises:
        ValueError: the inverse temperatures are not float64 or do not increase from 0 to 1.
    """
    values = _checked(betas)[::-1]
    x = start
    for _ in range(burn_in):
        _, x = model.anneal(x, 1.0, 1.0, generator)
    log_weights, x = _annealed("reverse ais", model, x, values, generator)
    return _result(model.base_log_z(), -1, log_weights, x, "upper_bound")


def _annealed(
    name: str, model: Model, x: Tensor, betas: list[float], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Log weights (n,) in float64 and last states (n, D) of chains that walk through the inverse temperatures."""
    log_weights = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    state: State = {"x": x, "log_weights": log_weights, "generator": generator}
    for k in resumable(name, len(betas) - 1, state):
        increment, state["x"] = model.anneal(state["x"], betas[k], betas[k + 1], generator)
        state["log_weights"] = state["log_weights"] + increment.double()
    return state["log_weights"], state["x"]


def bracket(
    model: Model, chains: int, betas: Tensor, generator: torch.Generator, start: Tensor | None = None
) -> Bracket:
    """Forward and reverse run; the reverse one starts at `start` (n, D), by default at the model's own samples."""
    forward = ais(model, chains, betas, generator)
    if start is None:
        start = model.sample(chains, generator)
    return Bracket(forward, reverse_ais(model, start, betas, generator))


def log_likelihood_bracket(
    model: Model,
    x: Tensor,
    chains: int,
    betas: Tensor,
    generator: torch.Generator,
    start: Tensor | None = None,
    path: Model | None = None,
) -> LogLikelihood:
    """log p(x) = -energy(x) - log Z of x (n, D), with log Z from the middle of an AIS bracket.

    Args:
        model: has the capability "energy".
        x: examples, shape (n, D).
        chains, betas, generator, start: as for `bracket`.
        path: the model whose annealing path has the same Z, where that is not `model` itself: behind an affine
            change of variables whose log-determinant is part of the energy, that is the wrapped model.
    """
    both = bracket(model if path is None else path, chains, betas, generator, start)
    with torch.no_grad():
        energy = torch.cat([model.energy(part).double() for part in x.split(4096)])
    log_z = both.log_z
    return LogLikelihood(-energy - log_z.value, "estimate", chains, log_z.stderr, both.details())
