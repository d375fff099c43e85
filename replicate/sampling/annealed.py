"""Annealed Langevin dynamics down a noise schedule (Song and Ermon 2019, arXiv:1907.05600, Algorithm 1).

The printed Algorithm 1, x <- x + (alpha_i / 2) s(x, sigma_i) + sqrt(alpha_i) z, alpha_i = eps sigma_i^2 / sigma_L^2,
is this package's convention with step size alpha_i and T = 1, so `step_size` here is the printed eps. The released
code takes steps alpha_i and noise sqrt(2 alpha_i): to follow it, pass twice its eps.

`denoise=True` ends with Tweedie's mean x + sigma_L^2 s(x, sigma_L) (Jolicoeur-Martineau et al. 2020, arXiv:2009.05475,
Sec. 3), which the printed algorithm lacks. It has no default, because it changes sample quality a lot.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from replicate.resume import State
from replicate.sampling.langevin import Chain, check_settings, langevin_step, path_of, recorded, standard_normal_like

#: (x (n, D), sigma (n,)) -> score of the data noised by N(0, sigma^2 I), shape (n, D)
ScoreAtLevel = Callable[[Tensor, Tensor], Tensor]


@torch.no_grad()
def annealed_langevin(
    score_at: ScoreAtLevel,
    sigmas: Tensor,
    x: Tensor,
    steps_per_level: int,
    step_size: float,
    generator: torch.Generator,
    denoise: bool,
    record_every: int = 0,
) -> Chain:
    """Take Langevin steps at each noise level in turn, from the largest to the smallest.

    Args:
        score_at: see `ScoreAtLevel`.
        sigmas: noise levels, decreasing, shape (L,).
        steps_per_level: Langevin steps at each level (T in the paper).
        step_size: eps, the step size at the last level, in squared units of x.
        denoise: end with Tweedie's mean.
        x, generator, record_every: as for `ula`.

    Raises:
        ValueError: `sigmas` are not positive and decreasing, or a setting is out of range.

    Example:
        Data N(0, 1) and a last level of 1 give samples of variance 2:

        >>> g = torch.Generator().manual_seed(0)
        >>> score = lambda x, sigma: -x / (1 + sigma**2)[:, None]
        >>> chain = annealed_langevin(score, torch.logspace(1, 0, 3), torch.zeros(8000, 1), 100, 0.1, g, denoise=False)
        >>> chain.nfe, round(float(chain.samples.std()), 1)
        (300, 1.4)
    """
    check_settings(steps_per_level, step_size)
    levels = [float(s) for s in sigmas]
    if not levels or levels[-1] <= 0 or levels != sorted(levels, reverse=True):
        raise ValueError(f"sigmas must be positive and decreasing; got {levels}")
    state: State = {"x": x, "generator": generator}
    steps = len(levels) * steps_per_level
    for step in recorded("annealed Langevin", steps, state, record_every):
        level, x = levels[step // steps_per_level], state["x"]
        alpha = step_size * (level / levels[-1]) ** 2
        score = score_at(x, x.new_full((len(x),), level))
        state["x"] = langevin_step(x, score, alpha, standard_normal_like(x, generator))
    x = state["x"]
    if denoise:
        x = x + levels[-1] ** 2 * score_at(x, x.new_full((len(x),), levels[-1]))
    return Chain(x, path_of(state), nfe=steps + int(denoise))
