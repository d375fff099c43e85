"""Score matching objectives, one value an example; their means are the papers' losses.

A score is any differentiable function from (n, D) to (n, D). For p with score t = grad log p, every objective equals
explicit score matching, 1/2 E|s - t|^2, up to a constant that s does not change:

- explicit: the distance itself, where t is known (Hyvarinen 2005, JMLR 6, eq. 2);
- implicit: 1/2 |s|^2 + tr(ds/dx), by partial integration (eq. 4), the trace from D reverse passes;
- denoising: at a noised point x + sigma z the target is -z / sigma, whose mean is the score of the noised density
  (Vincent 2011, eq. 11). Written as 1/2 |sigma s + z|^2, sigma^2 times the paper's, since the quotient overflows in
  half precision;
- sliced: v' (ds/dx) v + 1/2 (v's)^2 with random v, or with |s|^2 for (v's)^2, which is its mean over v and has less
  variance (Song et al. 2019, 1905.07088, eq. 7 and 8). By reverse-over-reverse differentiation.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Score = Callable[[Tensor], Tensor]


def explicit_score_matching(score: Score, true_score: Score, x: Tensor) -> Tensor:
    """1/2 |s(x) - t(x)|^2 at each x (n, D) ~ p, shape (n,); its mean is half the Fisher divergence."""
    return 0.5 * (score(x) - true_score(x)).square().sum(-1)


def implicit_score_matching(score: Score, x: Tensor) -> Tensor:
    """1/2 |s(x)|^2 + tr(ds/dx) at each x (n, D) ~ p, shape (n,): exact, at the cost of D reverse passes."""
    x = x.detach().requires_grad_(True)
    s = score(x)
    value = 0.5 * s.square().sum(-1)
    for i in range(x.shape[1]):
        (row,) = torch.autograd.grad(s[:, i].sum(), x, create_graph=True)
        value = value + row[:, i]
    return value


def denoising_score_matching(score: Score, x: Tensor, sigma: float | Tensor, z: Tensor) -> Tensor:
    """1/2 |sigma s(x + sigma z) + z|^2, shape (n,).

    Args:
        score: of the noised density.
        x: clean data, shape (n, D).
        sigma: noise level in units of x; a number, or one for each example, shape (n, 1).
        z: standard normal draw, shape (n, D).
    """
    return 0.5 * (sigma * score(x + sigma * z) + z).square().sum(-1)


def sliced_score_matching(score: Score, x: Tensor, v: Tensor) -> Tensor:
    """v' (ds/dx) v + 1/2 (v's)^2 at each x (n, D) with projection v (n, D), E[vv'] = I; shape (n,)."""
    s, slope = _sliced(score, x, v)
    return slope + 0.5 * (v * s).sum(-1).square()


def sliced_score_matching_vr(score: Score, x: Tensor, v: Tensor) -> Tensor:
    """v' (ds/dx) v + 1/2 |s|^2: the same mean over v, less variance; shape (n,)."""
    s, slope = _sliced(score, x, v)
    return slope + 0.5 * s.square().sum(-1)


def _sliced(score: Score, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """s(x) (n, D) and v' (ds/dx) v (n,), both differentiable in the parameters of s."""
    x = x.detach().requires_grad_(True)
    s = score(x)
    (product,) = torch.autograd.grad((s * v).sum(), x, create_graph=True)
    return s, (product * v).sum(-1)


def rademacher(like: Tensor, generator: torch.Generator) -> Tensor:
    """Independent signs +-1 of the shape of `like`: among all v with E[vv'] = I, those of least variance here."""
    bits = torch.randint(0, 2, like.shape, generator=generator, device=like.device)
    return (2 * bits - 1).to(like.dtype)


def tweedie(y: Tensor, score: Tensor, sigma: float | Tensor) -> Tensor:
    """E[x | x + sigma z = y] = y + sigma^2 score(y), the posterior mean (n, D) (Robbins 1956; Efron 2011)."""
    return y + sigma**2 * score
