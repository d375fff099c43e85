"""Bound log p of a diffusion model from below by its variational bound (Song et al. 2021, 2101.09258, theorem 3)."""

import math

import torch
from torch import Tensor

from replicate.likelihood.ode import Diffusion
from replicate.model import LogLikelihood
from replicate.sampling.langevin import standard_normal_like
from replicate.score_based.diffusion import level_range
from replicate.sde import SDE


@torch.no_grad()
def variational_bound(model: Diffusion, x: Tensor, levels: int, generator: torch.Generator) -> LogLikelihood:
    """Bound log p(x) of the reverse SDE with the model's score from below (theorem 3, in lambda = log(sigma / s)).

        log p(x) >= - KL(q(x_T | x) || prior) - int E|eps - z|^2 dlambda - E[-log N(x; denoised(x_tmin), rho_min^2)]

    where eps = -sigma score and the last term, (D / 2) log(2 pi rho_min^2) + E|eps - z|^2 / 2, decodes the data from
    x_tmin. The integral is stratified: each example has its own level in each of `levels` equal intervals, each with z
    and -z. |z|^2, whose mean is known, is a control variate with the weight that is exact for N(0, I).

    Args:
        x: data, shape (n, D).
        levels: strata.

    Returns:
        Values (n,) in nats of kind "lower_bound", float64: unbiased for the bound.

    Example:
        Data N(0, 1) with their exact score, whose mean log density is -(1 + log(2 pi)) / 2 = -1.42:

        >>> from replicate.sde import VP
        >>> class Normal:
        ...     sde = VP(t_min=1e-3)
        ...     def score_at(self, x, t):
        ...         return -x
        >>> g = torch.Generator().manual_seed(0)
        >>> found = variational_bound(Normal(), torch.randn(4000, 1, generator=g), 20, g)
        >>> round(found.mean().value, 1), found.kind
        (-1.4, 'lower_bound')
    """
    low, high = level_range(model.sde)
    n, width = len(x), (high - low) / levels
    integral = torch.zeros(n, dtype=torch.float64, device=x.device)
    for i in range(levels):
        u = torch.rand(n, generator=generator, device=x.device, dtype=torch.float64)
        integral += width * mean_error(model, x, low + (i + u) * width, generator)
    last = mean_error(model, x, torch.full_like(integral, low), generator)
    decoder = 0.5 * x.shape[1] * (math.log(2 * math.pi) + 2 * low) + 0.5 * last
    return LogLikelihood(-prior_divergence(model.sde, x) - integral - decoder, "lower_bound", draws=levels)


def mean_error(model: Diffusion, x: Tensor, level: Tensor, generator: torch.Generator) -> Tensor:
    """Estimate E_z|eps - z|^2 (n,) without bias at each example's level (n,), from z, -z and the control variate."""
    z = standard_normal_like(x, generator)
    t = model.sde.time_of(level)
    scale, std = (v.to(x)[:, None] for v in model.sde.marginal(t))
    total = torch.zeros_like(level)
    for sign in (1.0, -1.0):
        eps = -std * model.score_at(scale * x + sign * std * z, t.to(x))
        total += 0.5 * (eps - sign * z).square().sum(-1)
    weight = (1 + (2 * level).exp()).pow(-2)
    return total + weight * (x.shape[1] - z.double().square().sum(-1))


def prior_divergence(sde: SDE, x: Tensor) -> Tensor:
    """Return KL(N(s x, sigma^2 I) || N(0, prior_std^2 I)) at t_max in nats for each x (n, D): float64, shape (n,)."""
    scale, std = (float(v) for v in sde.marginal(torch.tensor([sde.t_max], dtype=torch.float64)))
    dim, prior = x.shape[1], sde.prior_std**2
    square = scale**2 * x.double().square().sum(-1)
    return 0.5 * ((square + dim * std**2) / prior - dim + dim * math.log(prior / std**2))
