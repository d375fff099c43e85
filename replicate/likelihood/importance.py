"""Importance-weighted bounds on log p(x).

For weights w with E[w] = p(x), L_k = E[log (1/k) sum_i w_i] grows with k from the ELBO (k = 1) to log p(x)
(Burda, Grosse and Salakhutdinov 2016, 1509.00519, theorem 1). The weight is p(x, z) / q(z | x) at a sampled z:
with an analytic KL inside it would no longer average to p(x), and the result would not be a bound.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from replicate.model import Estimate, LogLikelihood, Model
from replicate.resume import State, resumable

#: most (example, draw) pairs that one call of `log_weights` is asked for
CHUNK = 20_000


def _log_moments(model: Model, x: Tensor, k: int, generator: torch.Generator, chunk: int) -> Tensor:
    """Running moments of the k log weights of each row of x (n, D), in double precision.

    Returns:
        (3, n): log sum_i w_i, log sum_i w_i^2, sum_i log w_i.
    """
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
    """`_log_moments` of all rows: whole rows first, so that an example is encoded once unless k > chunk."""
    if k < 1 or chunk < 1:
        raise ValueError(f"k = {k} draws in chunks of {chunk}: both must be at least 1")
    parts = x.split(max(1, chunk // k))
    state: State = {"done": [], "generator": generator}
    for i in resumable("importance weights", len(parts), state):
        state["done"].append(_log_moments(model, parts[i], k, generator, chunk))
    return torch.cat(state["done"], dim=1)


def iw_bound(model: Model, x: Tensor, k: int, generator: torch.Generator, chunk: int = CHUNK) -> LogLikelihood:
    """log (1/k) sum_i w_i of each example: in expectation a lower bound on log p(x), tighter with larger k.

    Exactly k draws are made for every example, whatever the number of examples or the chunk; another chunk
    draws other noise of the same law.

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
    """
    log_sum, log_square, total = _moments(model, x, k, generator, chunk)
    details = {
        "elbo": Estimate.mean_of(total / k, "lower_bound", "nats"),
        "ess": Estimate.mean_of((2 * log_sum - log_square).exp(), "estimate", "draws"),
    }
    return LogLikelihood(log_sum - math.log(k), "lower_bound", draws=k, details=details)


def elbo(model: Model, x: Tensor, k: int, generator: torch.Generator, chunk: int = CHUNK) -> LogLikelihood:
    """The evidence lower bound E[log w] of each example, averaged over k draws.

    Args, errors and chunking as in `iw_bound`. Returns values of shape (n,) in nats with `draws` = k: more draws
    make the bound less noisy, not tighter.
    """
    return LogLikelihood(_moments(model, x, k, generator, chunk)[2] / k, "lower_bound", draws=k)
