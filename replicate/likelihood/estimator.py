"""Estimate log p(x), with its kind, from a model's capabilities: one rule for every family.

| the model has | estimator | kind |
|---|---|---|
| log_prob | itself | exact |
| importance_weights | log-mean-exp of k weights | lower bound |
| energy, D = 2 | -energy minus log Z by quadrature | estimate |
| annealing | -energy minus log Z by annealed importance sampling, both ways | estimate |
| diffusion | probability-flow ODE | estimate (solver and trace error stated) |

In two dimensions quadrature gives log Z to far more digits than annealing. There the record has the annealed bracket
as well: it checks the estimator that is the only one elsewhere.

A continuous model of discrete data turns each of these into a lower bound on log P(x) (see `dequantisation`),
except where log Z itself is an estimate.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from replicate.likelihood.ais import Bracket, bracket, schedule
from replicate.likelihood.dequantisation import Preprocessed
from replicate.likelihood.importance import iw_bound
from replicate.likelihood.ode import ode_log_prob
from replicate.likelihood.quadrature import log_z
from replicate.model import Estimate, Kind, LogLikelihood, Model
from replicate.resume import State, resumable

#: rows per call of a model; fixed, because the batch size changes the last bits of a float
CHUNK = 2_000

#: capabilities that lead to a normalised density without integrating over a grid
NORMALISED = frozenset({"log_prob", "importance_weights", "annealing", "diffusion"})

Estimator = Callable[[Tensor], LogLikelihood]


@dataclass(frozen=True)
class Effort:
    """The evaluation budget of log p.

    Attributes:
        importance_samples: k of the importance-weighted bound.
        dequantisation_draws: noise draws of the log-mean-exp bound on discrete data.
        ode_draws: (noise, probe) draws averaged for the probability flow on discrete data.
        ode_steps: steps of the probability-flow ODE solver.
        ode_probes: trace probes per example, where the trace is not exact and there are no draws to average.
        ais_chains, ais_steps: chains and temperatures of each run of annealed importance sampling.
        quadrature_points: grid points per axis of numerical normalisation in 2-D.
    """

    importance_samples: int = 1_000
    dequantisation_draws: int = 64
    ode_draws: int = 8
    ode_steps: int = 12
    ode_probes: int = 8
    ais_chains: int = 128
    ais_steps: int = 500
    quadrature_points: int = 400


def log_likelihood(
    model: Model, x: Tensor, effort: Effort, generator: torch.Generator, half_width: float | None = None
) -> LogLikelihood:
    """Estimate log p(x) in nats of x (n, D) by the best estimator that the model's capabilities allow.

    Args:
        half_width: half the side of the box that quadrature may integrate over (2-D densities only).

    Raises:
        NotImplementedError: no capability of the model gives log p.

    Example:
        >>> class Normal(Model):
        ...     capabilities = frozenset({"log_prob"})
        ...     def log_prob(self, x):
        ...         return -0.5 * x.square().sum(1) - 0.5 * math.log(2 * math.pi)
        >>> found = log_likelihood(Normal(), torch.zeros(3, 1), Effort(), torch.Generator())
        >>> found.mean().symbol, round(found.mean().value, 3)
        ('=', -0.919)
    """
    if isinstance(model, Preprocessed) and model.discrete:
        return _dequantised(model, x, effort, generator)
    if half_width is not None and "energy" in model.capabilities and "log_prob" not in model.capabilities:
        return _by_quadrature(model, effort, half_width, generator)(x)
    if isinstance(model, Preprocessed) and model.inner.capabilities & NORMALISED:
        z, logdet = model.transform(x, generator)
        inner = _estimator(model.inner, effort, generator)(z)
        details = dict(inner.details)
        if "elbo" in details:  # in the coordinates of the data, as the log-likelihood
            details["elbo"] = replace(details["elbo"], value=details["elbo"].value + float(logdet.mean()))
        return replace(inner, values=inner.values + logdet, details=details)
    return _estimator(model, effort, generator)(x)


def _estimator(model: Model, effort: Effort, generator: torch.Generator) -> Estimator:
    has = model.capabilities
    if "log_prob" in has:
        return lambda x: LogLikelihood(_chunked(model.log_prob, x), "exact")
    if "importance_weights" in has:
        return lambda x: iw_bound(model, x, effort.importance_samples, generator)
    if "annealing" in has:
        both = _bracket(model, effort, generator)
        return _shifted(model, both.log_z, both.details())
    if "diffusion" in has:
        return lambda x: ode_log_prob(model, x, generator, steps=effort.ode_steps, probes=effort.ode_probes)
    raise NotImplementedError(
        "no normalised density: the model gives neither log p nor an energy that can be normalised"
    )


@torch.no_grad()
def _chunked(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    parts = x.split(CHUNK)
    state: State = {"done": []}
    for i in resumable("log p", len(parts), state):
        state["done"].append(f(parts[i]).detach())
    return torch.cat(state["done"])


def _shifted(model: Model, z: Estimate, details: Mapping[str, Estimate]) -> Estimator:
    def estimate(x: Tensor) -> LogLikelihood:
        values = -_chunked(model.energy, x) - z.value
        return LogLikelihood(values, "estimate", shared_stderr=z.stderr, details=details)

    return estimate


def _by_quadrature(model: Model, effort: Effort, half_width: float, generator: torch.Generator) -> Estimator:
    device = str(next(model.parameters()).device)
    z = log_z(lambda x: -model.energy(x), half_width, effort.quadrature_points, device=device)
    details = {"log_z": z}
    inner = model.inner if isinstance(model, Preprocessed) else model
    if "annealing" in inner.capabilities:
        details.update(_bracket(inner, effort, generator).details())
    return _shifted(model, z, details)


def _bracket(model: Model, effort: Effort, generator: torch.Generator) -> Bracket:
    return bracket(model, effort.ais_chains, schedule(effort.ais_steps), generator)


def _dequantised(model: Preprocessed, x: Tensor, effort: Effort, generator: torch.Generator) -> LogLikelihood:
    """Bound log P(x): log-mean-exp over noise draws, or the plain mean where each draw is itself noisy.

    The probability flow's trace estimate is unbiased for log p but not for p. By Jensen's inequality a log-mean-exp of
    it would be no lower bound, so its draws are averaged.
    """
    inner = model.inner
    noisy = "diffusion" in inner.capabilities and "log_prob" not in inner.capabilities
    draws = effort.ode_draws if noisy else effort.dequantisation_draws
    estimate = _estimator(inner, replace(effort, ode_probes=1), generator)
    total = torch.full((len(x),), -math.inf if not noisy else 0.0, dtype=torch.float64, device=x.device)
    for _ in range(draws):
        with torch.no_grad():  # a learned transform would keep the graph of every draw
            z, logdet = model.transform(x, generator)
        one = estimate(z)
        log_p = (one.values + logdet).double()
        total = total + log_p / draws if noisy else torch.logaddexp(total, log_p - math.log(draws))
    # an estimate by the probability flow is unbiased up to the solver's stated error: its mean bounds log P(x)
    kind: Kind = "estimate" if "annealing" in inner.capabilities else "lower_bound"
    return LogLikelihood(total, kind, draws * one.draws, one.shared_stderr, one.details)
