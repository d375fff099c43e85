"""Deterministic sampling by the probability-flow ODE (Song et al. 2021, arXiv:2011.13456, Eq. 13).

With y = x / m(t) and sigma = std(t) / m(t) every linear SDE has the same flow, dy/dsigma = -sigma m(t) s(m(t) y, t)
(Karras et al. 2022, arXiv:2206.00364, Eq. 4), which Heun's method integrates on `time_grid` (their Algorithm 1). Unlike
there, the flow ends at t_min, where the model's likelihood is defined, and no Euler step to sigma = 0 is added
unless `denoise` is set (that step is Tweedie's mean).
"""

import torch
from torch import Tensor

from replicate.resume import State
from replicate.sampling.langevin import Chain, path_of, recorded
from replicate.sampling.predictor_corrector import ScoreAt, posterior_mean, time_grid
from replicate.sde import SDE


@torch.no_grad()
def probability_flow(
    score_at: ScoreAt,
    sde: SDE,
    n: int,
    dim: int,
    steps: int,
    generator: torch.Generator,
    denoise: bool = False,
    record_every: int = 0,
) -> Chain:
    """Carry n samples of the prior to t_min by Heun's method; the generator draws the prior only.

    Args:
        n, dim: shape (n, D) of the samples.
        steps: Heun steps, two score evaluations each.
        score_at, sde, generator, denoise, record_every: as for `predictor_corrector`.

    Raises:
        ValueError: steps < 1.

    Example:
        The flow of a Gaussian is linear: from N(0, 20^2) to data N(0, 1) it divides by about 20.

        >>> from replicate.sde import VE
        >>> sde, g = VE(0.01, 20.0), torch.Generator().manual_seed(0)
        >>> score = lambda x, t: -x / (1 + sde.marginal(t)[1] ** 2)[:, None]
        >>> chain = probability_flow(score, sde, 5, 1, 50, g, record_every=50)
        >>> [round(float(r), 1) for r in chain.path[0] / chain.samples]
        [20.0, 20.0, 20.0, 20.0, 20.0]
    """
    x = sde.prior_sample(n, dim, generator)
    times = time_grid(sde, steps, x.device)
    scale, std = (value.to(x.dtype) for value in sde.marginal(times))
    sigma = std / scale
    times = times.to(x.dtype)

    def slope(y: Tensor, i: int) -> Tensor:
        return -std[i] * score_at(scale[i] * y, times[i].expand(n))

    state: State = {"x": x, "y": x / scale[0]}
    for i in recorded("probability flow", steps, state, record_every):
        y, h = state["y"], sigma[i + 1] - sigma[i]
        first = slope(y, i)
        second = slope(y + h * first, i + 1)
        y = y + h * (first + second) / 2
        state["x"], state["y"] = scale[i + 1] * y, y
    x = state["x"]
    if denoise:
        x = posterior_mean(x, score_at(x, times[-1].expand(n)), scale[-1], std[-1])
    return Chain(x, path_of(state), nfe=2 * steps + int(denoise))
