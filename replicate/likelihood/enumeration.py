"""Compute log Z of small discrete models exactly, as a sum over all states: the check of its estimators.

An RBM needs the states of its smaller layer alone, since the other sums out in closed form (Salakhutdinov & Murray
2008, sec. 2).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from replicate.model import Estimate

#: most states that are enumerated
LIMIT = 2**26


def states(dim: int, levels: int, start: int, stop: int, device: torch.device | str = "cpu") -> Tensor:
    """Return states start..stop-1 of {0, .., levels-1}^dim, last dimension fastest: (stop - start, dim), float64."""
    index = torch.arange(start, stop, dtype=torch.int64, device=device)
    place = levels ** torch.arange(dim - 1, -1, -1, dtype=torch.int64, device=device)
    return (index[:, None] // place % levels).double()


def log_sum_over_states(
    log_f: Callable[[Tensor], Tensor], dim: int, levels: int, chunk: int = 2**16, device: torch.device | str = "cpu"
) -> Tensor:
    """Return log sum_x exp(log_f(x)) over all x in {0, .., levels-1}^dim, a differentiable float64 scalar.

    Args:
        log_f: maps states (n, dim), float64, to their log values (n,).
        chunk: states evaluated at a time.

    Raises:
        ValueError: there are more than LIMIT states.
    """
    total = levels**dim
    if total > LIMIT:
        raise ValueError(f"{levels}^{dim} states are too many to enumerate (limit {LIMIT})")
    parts = [
        torch.logsumexp(log_f(states(dim, levels, start, min(start + chunk, total), device)).double(), 0)
        for start in range(0, total, chunk)
    ]
    return torch.logsumexp(torch.stack(parts), 0)


@torch.no_grad()
def enumerate_log_z(
    energy: Callable[[Tensor], Tensor],
    dim: int,
    levels: int = 2,
    chunk: int = 2**16,
    device: torch.device | str = "cpu",
) -> Estimate:
    """Return the exact log Z = log sum_x exp(-energy(x)) in nats over all of {0, .., levels-1}^dim.

    Args:
        energy: maps states (n, dim), float64, to energies (n,) in nats.

    Raises:
        ValueError: there are more than LIMIT states.

    Example:
        Independent bits with energy -x each: log Z = 3 log(1 + e) = 3.9398.

        >>> round(enumerate_log_z(lambda x: -x.sum(1), dim=3).value, 4)
        3.9398
    """
    return Estimate.exact(log_sum_over_states(lambda x: -energy(x), dim, levels, chunk, device), "nats")


def rbm_log_z(weights: Tensor, visible_bias: Tensor, hidden_bias: Tensor, chunk: int = 2**12) -> Tensor:
    """Return the exact log Z of an RBM by enumeration of its smaller layer, a differentiable float64 scalar.

    The energy is E(v, h) = -sum_d b[d, v_d] - sum_j c_j h_j - sum_dj W[d, v_d, j] h_j with h in {0, 1}^H and
    v in {0, .., L-1}^D; a Bernoulli unit is L = 2 with zeros at level 0.

    Args:
        weights, visible_bias, hidden_bias: W, b and c, of shapes (D, L, H), (D, L) and (H,).
        chunk: states evaluated at a time.

    Raises:
        ValueError: both layers have more than LIMIT states.

    Example:
        With weights 0 the units are independent, and Z = 2^3 2^5:

        >>> log_z = rbm_log_z(torch.zeros(3, 2, 5), torch.zeros(3, 2), torch.zeros(5))
        >>> round(float(log_z / torch.tensor(2.0).log()), 6)
        8.0
    """
    w, b, c = weights.double(), visible_bias.double(), hidden_bias.double()
    dim, levels, hidden = w.shape

    def given_hidden(h: Tensor) -> Tensor:
        logits = b + torch.einsum("nj,dlj->ndl", h, w)
        return h @ c + torch.logsumexp(logits, 2).sum(1)

    def given_visible(v: Tensor) -> Tensor:
        onehot = torch.nn.functional.one_hot(v.long(), levels).double().flatten(1)
        pre = c + onehot @ w.flatten(0, 1)
        return onehot @ b.flatten() + torch.nn.functional.softplus(pre).sum(1)

    if 2**hidden <= levels**dim:
        return log_sum_over_states(given_hidden, hidden, 2, chunk, w.device)
    return log_sum_over_states(given_visible, dim, levels, chunk, w.device)
