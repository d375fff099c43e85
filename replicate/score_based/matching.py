"""Score matching objectives, one value per example; their means are the papers' losses.

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

from collections.abc import Callable

import torch
from torch import Tensor

from replicate.sampling.langevin import standard_normal_like

Score = Callable[[Tensor], Tensor]


def explicit_score_matching(score: Score, true_score: Score, x: Tensor) -> Tensor:
    """Return 1/2 |s(x) - t(x)|^2 at each x (n, D) ~ p, shape (n,); its mean is half the Fisher divergence.

    Example:
        >>> x = torch.linspace(-2, 2, 5)[:, None]
        >>> explicit_score_matching(lambda x: 1 - x, lambda x: -x, x).tolist()
        [0.5, 0.5, 0.5, 0.5, 0.5]
    """
    return 0.5 * (score(x) - true_score(x)).square().sum(-1)


def implicit_score_matching(score: Score, x: Tensor) -> Tensor:
    """Return 1/2 |s(x)|^2 + tr(ds/dx) at each x (n, D) ~ p, shape (n,): exact, at the cost of D reverse passes.

    Example:
        For s = -x the trace is -D:

        >>> implicit_score_matching(lambda x: -x, torch.tensor([[3.0, 4.0]])).tolist()  # 25 / 2 - 2
        [10.5]
    """
    x = x.detach().requires_grad_(True)
    s = score(x)
    value = 0.5 * s.square().sum(-1)
    for i in range(x.shape[1]):
        (row,) = torch.autograd.grad(s[:, i].sum(), x, create_graph=True)
        value = value + row[:, i]
    return value


def denoising_score_matching(score: Score, x: Tensor, sigma: float | Tensor, z: Tensor) -> Tensor:
    """Return 1/2 |sigma s(x + sigma z) + z|^2, shape (n,).

    Args:
        score: of the noised density.
        x: clean data, shape (n, D).
        sigma: noise level in units of x; a number, or one for each example, shape (n, 1).
        z: standard normal draw, shape (n, D).

    Example:
        Data that are all 0, noised by N(0, sigma^2), have score -x / sigma^2, where the loss is 0:

        >>> z = torch.tensor([[1.0], [-2.0]])
        >>> denoising_score_matching(lambda x: -x / 0.25, torch.zeros(2, 1), 0.5, z).tolist()
        [0.0, 0.0]
    """
    return 0.5 * (sigma * score(x + sigma * z) + z).square().sum(-1)


def paired_denoising(score: Score, x: Tensor, sigma: float, generator: torch.Generator) -> Tensor:
    """Return `denoising_score_matching` of each x (n, D) with z and with -z, shape (2 n,).

    Most of the target's noise cancels within the pair.
    """
    z = standard_normal_like(x, generator)
    return denoising_score_matching(score, torch.cat([x, x]), sigma, torch.cat([z, -z]))


def sliced_score_matching(score: Score, x: Tensor, v: Tensor) -> Tensor:
    """Return v' (ds/dx) v + 1/2 (v's)^2 at each x (n, D) with projection v (n, D), E[vv'] = I; shape (n,).

    Example:
        >>> x, v = torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, -1.0]])
        >>> sliced_score_matching(lambda x: -x, x, v).tolist()  # -2 + (4 - 3)^2 / 2
        [-1.5]
    """
    s, slope = _sliced(score, x, v)
    return slope + 0.5 * (v * s).sum(-1).square()


def sliced_score_matching_vr(score: Score, x: Tensor, v: Tensor) -> Tensor:
    """Return v' (ds/dx) v + 1/2 |s|^2: the same mean over v, less variance; shape (n,).

    Example:
        >>> x, v = torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, -1.0]])
        >>> sliced_score_matching_vr(lambda x: -x, x, v).tolist()  # -2 + 25 / 2
        [10.5]
    """
    s, slope = _sliced(score, x, v)
    return slope + 0.5 * s.square().sum(-1)


def _sliced(score: Score, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return s(x) (n, D) and v' (ds/dx) v (n,), both differentiable in the parameters of s."""
    x = x.detach().requires_grad_(True)
    s = score(x)
    (product,) = torch.autograd.grad((s * v).sum(), x, create_graph=True)
    return s, (product * v).sum(-1)


def rademacher(like: Tensor, generator: torch.Generator) -> Tensor:
    """Draw independent signs +-1 of the shape of `like`: of all v with E[vv'] = I they have the least variance here."""
    bits = torch.randint(0, 2, like.shape, generator=generator, device=like.device)
    return (2 * bits - 1).to(like.dtype)


def tweedie(y: Tensor, score: Tensor, sigma: float | Tensor) -> Tensor:
    """Return E[x | x + sigma z = y] = y + sigma^2 score(y), the posterior mean (n, D) (Robbins 1956; Efron 2011).

    Example:
        With x and z standard normal, y ~ N(0, 2) has score -y / 2 and posterior mean y / 2:

        >>> y = torch.tensor([[1.0], [3.0]])
        >>> tweedie(y, -y / 2, 1.0).flatten().tolist()
        [0.5, 1.5]
    """
    return y + sigma**2 * score
