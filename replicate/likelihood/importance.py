"""Bound log p(x) from below by importance weights.

For weights w with E[w] = p(x), L_k = E[log (1/k) sum_i w_i] grows with k from the ELBO (k = 1) to log p(x)
(Burda, Grosse and Salakhutdinov 2016, 1509.00519, theorem 1). The weight is p(x, z) / q(z | x) at a sampled z:
with an analytic KL inside it would no longer average to p(x), and the result would not be a bound.
"""

import math

import torch
from torch import Tensor

from replicate.model import Estimate, LogLikelihood, Model
from replicate.resume import State, resumable

#: most (example, draw) pairs per call of `log_weights`
CHUNK = 20_000


def _log_moments(model: Model, x: Tensor, k: int, generator: torch.Generator, chunk: int) -> Tensor:
    """Return log sum_i w_i, log sum_i w_i^2 and sum_i log w_i of each row's k weights (3, n), in double precision."""
    log_sum = torch.full((len(x),), -math.inf, dtype=torch.float64, device=x.device)
    log_square, total = log_sum.clone(), torch.zeros_like(log_sum)
    for start in range(0, k, chunk):
        log_w = model.log_weights(x, min(chunk, k - start), generator).double()
        log_sum = torch.logaddexp(log_sum, log_w.logsumexp(1))
        log_square = torch.logaddexp(log_square, (2 * log_w).logsumexp(1))
        total = total + log_w.sum(1)
    return torch.stack([log_sum, log_square, total])


@torch.no_grad()
def _moments(model: Model, x: Tensor, k: int, generator: torch.Generator, chunk: int) -> Tensor:
    """Return `_log_moments` of all rows: whole rows first, so that an example is encoded once unless k > chunk."""
    if k < 1 or chunk < 1:
        raise ValueError(f"k = {k} draws in chunks of {chunk}: both must be at least 1")
    parts = x.split(max(1, chunk // k))
    state: State = {"done": [], "generator": generator}
    for i in resumable("importance weights", len(parts), state):
        state["done"].append(_log_moments(model, parts[i], k, generator, chunk))
    return torch.cat(state["done"], dim=1)


def iw_bound(model: Model, x: Tensor, k: int, generator: torch.Generator, chunk: int = CHUNK) -> LogLikelihood:
    """Return log (1/k) sum_i w_i of each example: in expectation a lower bound on log p(x), tighter with larger k.

    Every example has exactly k draws, whatever the number of examples or the chunk; another chunk draws other noise of
    the same law.

    Args:
        model: has the capability "importance_weights".
        x: shape (n, D).
        k: draws for each example.
        generator: source of all noise, on x's device.
        chunk: most (example, draw) pairs in memory at a time.

    Returns:
        Values of shape (n,) in nats, float64, with `draws` = k. Details: "elbo", the ELBO from the same draws in
        nats, and "ess", the effective sample size (sum w)^2 / sum w^2 out of k, averaged over the examples.

    Raises:
        ValueError: k or chunk is below 1.

    Example:
        Weights exp(z) with z ~ N(-1/2, 1) have mean 1, so that log p(x) = 0; the ELBO is -1/2:

        >>> class Lognormal(Model):
        ...     def log_weights(self, x, k, generator):
        ...         return torch.randn(len(x), k, generator=generator) - 0.5
        >>> g = torch.Generator().manual_seed(0)
        >>> bounds = [iw_bound(Lognormal(), torch.zeros(2000, 1), k, g).mean().value for k in (1, 100)]
        >>> [abs(round(b, 1)) for b in bounds]
        [0.5, 0.0]
    """
    log_sum, log_square, total = _moments(model, x, k, generator, chunk)
    details = {
        "elbo": Estimate.mean_of(total / k, "lower_bound", "nats"),
        "ess": Estimate.mean_of((2 * log_sum - log_square).exp(), "estimate", "draws"),
    }
    return LogLikelihood(log_sum - math.log(k), "lower_bound", draws=k, details=details)


def elbo(model: Model, x: Tensor, k: int, generator: torch.Generator, chunk: int = CHUNK) -> LogLikelihood:
    """Return the evidence lower bound E[log w] of each example, averaged over k draws.

    Arguments, errors and chunking are those of `iw_bound`. The values (n,) are in nats, with `draws` = k: more draws
    make the bound less noisy, not tighter.

    Example:
        >>> class Lognormal(Model):
        ...     def log_weights(self, x, k, generator):
        ...         return torch.randn(len(x), k, generator=generator) - 0.5
        >>> found = elbo(Lognormal(), torch.zeros(2000, 1), 10, torch.Generator().manual_seed(0))
        >>> round(found.mean().value, 1), found.kind
        (-0.5, 'lower_bound')
    """
    return LogLikelihood(_moments(model, x, k, generator, chunk)[2] / k, "lower_bound", draws=k)
