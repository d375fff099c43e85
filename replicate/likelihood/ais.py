"""Estimate log Z of an unnormalised model from below and from above by annealed importance sampling.

Neal (2001), Annealed importance sampling, Statistics and Computing 11, eq. 4-9; Salakhutdinov & Murray (2008), On the
quantitative analysis of deep belief networks, ICML, sec. 3-4; the reverse chain as in Grosse, Ghahramani & Adams
(2015), Sandwiching the marginal likelihood using bidirectional Monte Carlo, 1511.02543.

The forward run's mean weight is an unbiased estimate of Z / Z_0, so by Jensen its logarithm is low on average; the
reverse run's mean weight is unbiased for Z_0 / Z, so its log Z is high on average. The second statement needs exact
model samples at the start. Here they come from a long Markov chain, so the upper side holds as far as that chain has
converged; a mode that neither run reaches makes the bracket too narrow.

Deviation from the papers: inverse temperatures, weight increments and their sums are float64 (in float32 the steps
between ten thousand temperatures are wrong by per cents).
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from replicate.model import Estimate, Kind, Model
from replicate.resume import State, resumable


@dataclass(frozen=True)
class AISResult:
    """One annealing run.

    Attributes:
        log_z: log Z of the model in nats; "lower_bound" from a forward run, "upper_bound" from a reverse one (in
            expectation over runs). Its stderr is the delta method's, sd(w) / (mean(w) sqrt(n)): the spread of the
            weights at hand, which does not cover regions that no chain reached, and cannot exceed 1.
        ess: effective sample size (sum w)^2 / sum w^2, between 1 and the number of chains.
        log_weights: log importance weights of the chains, shape (n,), float64. They estimate log(Z / Z_0) in a
            forward run and log(Z_0 / Z) in a reverse run.
        samples: last states of the chains, shape (n, D): at the model (forward) or at the base (reverse).
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
        """Reverse minus forward log Z in nats: at least 0 up to sampling error."""
        return self.reverse.log_z.value - self.forward.log_z.value

    @property
    def log_z(self) -> Estimate:
        """The bracket's middle; the stderr combines both runs' errors with half the gap."""
        low, high = self.forward.log_z, self.reverse.log_z
        stderr = math.hypot(low.stderr / 2, high.stderr / 2, self.gap / 2)
        return Estimate((low.value + high.value) / 2, stderr, "estimate", "nats", low.n + high.n)

    def details(self) -> dict[str, Estimate]:
        """Return the rows of the record: both log Z and the smaller of the two effective sample sizes."""
        ess = min(self.forward.ess, self.reverse.ess, key=lambda e: e.value)
        return {"ais_log_z_forward": self.forward.log_z, "ais_log_z_reverse": self.reverse.log_z, "ais_ess": ess}


def schedule(n: int, shape: Literal["linear", "sigmoidal"] = "linear", steepness: float = 4.0) -> Tensor:
    """Return n + 1 inverse temperatures 0 = b_0 < .. < b_n = 1, float64.

    Args:
        n: number of annealing steps, at least 1.
        shape: "linear", or "sigmoidal" (denser at both ends; Grosse, Maddison & Salakhutdinov 2013, sec. 6).
        steepness: the sigmoid's argument runs over (-steepness, steepness).

    Raises:
        ValueError: n < 1, or there is no such shape.

    Example:
        >>> schedule(4).tolist()
        [0.0, 0.25, 0.5, 0.75, 1.0]
    """
    if n < 1:
        raise ValueError(f"schedule needs n >= 1 annealing steps, not {n}")
    if shape not in ("linear", "sigmoidal"):
        raise ValueError(f"schedule shape is {shape!r}; it must be 'linear' or 'sigmoidal'")
    t = torch.linspace(0, 1, n + 1, dtype=torch.float64)
    if shape == "linear":
        return t
    s = torch.sigmoid(steepness * (2 * t - 1))
    betas = (s - s[0]) / (s[-1] - s[0])
    betas[0], betas[-1] = 0.0, 1.0
    return betas


def _checked(betas: Tensor) -> list[float]:
    """Return the inverse temperatures as Python floats (float64), checked."""
    if betas.dtype != torch.float64:
        raise ValueError(f"inverse temperatures must be float64, not {betas.dtype}; use schedule(n)")
    values: list[float] = betas.tolist()
    if len(values) < 2 or values[0] != 0.0 or values[-1] != 1.0 or bool((betas.diff() <= 0).any()):
        raise ValueError("inverse temperatures must increase from exactly 0 to exactly 1")
    return values


def _run(name: str, model: Model, x: Tensor, betas: list[float], generator: torch.Generator, kind: Kind) -> AISResult:
    """Take chains from x (n, D) through the inverse temperatures; log Z has the delta method's error."""
    log_weights = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    state: State = {"x": x, "log_weights": log_weights, "generator": generator}
    for k in resumable(name, len(betas) - 1, state):
        increment, state["x"] = model.anneal(state["x"], betas[k], betas[k + 1], generator)
        state["log_weights"] = state["log_weights"] + increment.double()
    log_weights, n = state["log_weights"], len(x)
    log_mean = float(torch.logsumexp(log_weights, 0)) - math.log(n)
    relative = (log_weights - log_mean).exp()  # w / mean(w)
    stderr = float(relative.std(unbiased=True)) / math.sqrt(n) if n > 1 else math.nan
    log_z = model.base_log_z() + (log_mean if kind == "lower_bound" else -log_mean)
    ess = Estimate(n / float(relative.square().mean()), math.nan, "estimate", "chains", n)
    return AISResult(Estimate(log_z, stderr, kind, "nats", n), ess, log_weights, state["x"])


@torch.no_grad()
def ais(model: Model, chains: int, betas: Tensor, generator: torch.Generator) -> AISResult:
    """Anneal from the base to the model: log Z biased low.

    Args:
        model: has the capability "annealing".
        chains: number of independent chains n.
        betas: inverse temperatures from 0 to 1, float64, shape (K + 1,).

    Raises:
        ValueError: the inverse temperatures are not float64 or do not increase from 0 to 1.

    Example:
        A machine of 2 bits with exp(-f(x)) = exp(x_1 + x_2), so that Z = (1 + e)^2, and a path from uniform bits:

        >>> class Bits(Model):
        ...     def base_log_z(self):
        ...         return 2 * math.log(2)
        ...     def base_sample(self, n, generator):
        ...         return torch.bernoulli(torch.full((n, 2), 0.5), generator=generator)
        ...     def anneal(self, x, beta, beta_next, generator):
        ...         fresh = torch.full_like(x, beta_next).sigmoid()
        ...         return (beta_next - beta) * x.sum(1), torch.bernoulli(fresh, generator=generator)
        >>> found = ais(Bits(), 2000, schedule(20), torch.Generator().manual_seed(0))
        >>> round(found.log_z.value, 1), round(2 * math.log(1 + math.e), 1), found.log_z.kind
        (2.6, 2.6, 'lower_bound')
    """
    values = _checked(betas)
    return _run("ais", model, model.base_sample(chains, generator), values, generator, "lower_bound")


@torch.no_grad()
def reverse_ais(model: Model, start: Tensor, betas: Tensor, generator: torch.Generator, burn_in: int = 1) -> AISResult:
    """Anneal from model samples to the base: log Z biased high.

    Args:
        model: has the capability "annealing"; its kernels are reversible, so each is its own reversal.
        start: samples of the model, as nearly exact and independent as possible, shape (n, D).
        betas: the same inverse temperatures as for the forward run, increasing.
        burn_in: kernels applied at beta = 1 first; the exact reversal of `ais` has one.

    Raises:
        ValueError: the inverse temperatures are not float64 or do not increase from 0 to 1.

    Example:
        One bit with exp(-f(x)) = exp(x), whose Z is 1 + e; its samples are independent bits of rate sigmoid(1):

        >>> class Bit(Model):
        ...     def base_log_z(self):
        ...         return math.log(2)
        ...     def anneal(self, x, beta, beta_next, generator):
        ...         fresh = torch.full_like(x, beta_next).sigmoid()
        ...         return (beta_next - beta) * x.sum(1), torch.bernoulli(fresh, generator=generator)
        >>> g = torch.Generator().manual_seed(0)
        >>> start = torch.bernoulli(torch.full((2000, 1), 1.0).sigmoid(), generator=g)
        >>> found = reverse_ais(Bit(), start, schedule(20), g)
        >>> round(found.log_z.value, 1), round(math.log(1 + math.e), 1), found.log_z.kind
        (1.3, 1.3, 'upper_bound')
    """
    values = _checked(betas)[::-1]
    x = start
    for _ in range(burn_in):
        _, x = model.anneal(x, 1.0, 1.0, generator)
    return _run("reverse ais", model, x, values, generator, "upper_bound")


def bracket(
    model: Model, chains: int, betas: Tensor, generator: torch.Generator, start: Tensor | None = None
) -> Bracket:
    """Run both ways; the reverse run starts at `start` (n, D), by default at the model's own samples.

    Example:
        A Gaussian tilted by exp(x) has log Z = 1/2; the annealing path is N(beta, 1), sampled exactly here:

        >>> class Tilted(Model):
        ...     def base_log_z(self):
        ...         return 0.0
        ...     def base_sample(self, n, generator):
        ...         return torch.randn(n, 1, generator=generator)
        ...     def sample(self, n, generator):
        ...         return 1 + self.base_sample(n, generator)
        ...     def anneal(self, x, beta, beta_next, generator):
        ...         return (beta_next - beta) * x[:, 0], beta_next + self.base_sample(len(x), generator)
        >>> both = bracket(Tilted(), 2000, schedule(20), torch.Generator().manual_seed(0))
        >>> round(both.forward.log_z.value, 1), round(both.reverse.log_z.value, 1)
        (0.5, 0.5)
    """
    forward = ais(model, chains, betas, generator)
    start = model.sample(chains, generator) if start is None else start
    return Bracket(forward, reverse_ais(model, start, betas, generator))
