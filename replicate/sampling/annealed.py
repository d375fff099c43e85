"""Annealed Langevin dynamics through a ladder of noise levels (Song and Ermon 2019, arXiv:1907.05600, Algorithm 1).

The printed Algorithm 1, x <- x + (alpha_i / 2) s(x, sigma_i) + sqrt(alpha_i) z, alpha_i = eps sigma_i^2 / sigma_L^2,
is this package's convention with step size alpha_i and T = 1, so `step_size` here is the printed eps. The released
code takes steps alpha_i and noise sqrt(2 alpha_i): to follow it, pass twice its eps.

The last step: `denoise=True` ends with Tweedie's mean x + sigma_L^2 s(x, sigma_L) (Jolicoeur-Martineau et al. 2020,
arXiv:2009.05475, Sec. 3), which the printed algorithm lacks. It is no default, as it changes sample quality a lot.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from replicate.resume import State, resumable
from replicate.sampling.langevin import Chain, Recorder, check_settings, langevin_step, standard_normal_like

ScoreAt = Callable[[Tensor, Tensor], Tensor]


@torch.no_grad()
def annealed_langevin(
    score_at: ScoreAt,
    sigmas: Tensor,
    x: Tensor,
    steps_per_level: int,
    step_size: float,
    generator: torch.Generator,
    denoise: bool,
    temperature: float = 1.0,
    record_every: int = 0,
) -> Chain:
    """Langevin steps at each noise level in turn, from the largest to the smallest.

    Args:
        score_at: (x (n, D), sigma (n,)) -> score of the data noised by N(0, sigma^2 I), shape (n, D).
        sigmas: noise levels, decreasing, shape (L,).
        x: starting states, shape (n, D); not changed.
        steps_per_level: Langevin steps at each level (T in the paper).
        step_size: eps, the step size at the last level, in squared units of x.
        generator: on x's device.
        denoise: end with Tweedie's mean.
        temperature: T of the Langevin steps.
        record_every: keep every so many states in `path`; 0 keeps none.

    Raises:
        ValueError: `sigmas` is not a decreasing ladder of positive numbers, or a setting is out of range.
    """
    check_settings(steps_per_level, step_size, temperature)
    levels = [float(s) for s in sigmas]
    if not levels or levels[-1] <= 0 or levels != sorted(levels, reverse=True):
        raise ValueError(f"sigmas must be positive and decreasing; got {levels}")
    recorder = Recorder(record_every)
    recorder.see(0, x)
    state: State = {"x": x, "generator": generator, "recorder": recorder}
    steps = len(levels) * steps_per_level
    for step in resumable("annealed Langevin", steps, state):
        level, x = levels[step // steps_per_level], state["x"]
        alpha = step_size * (level / levels[-1]) ** 2
        score = score_at(x, x.new_full((len(x),), level))
        state["x"] = langevin_step(x, score, alpha, standard_normal_like(x, generator), temperature)
        recorder.see(step + 1, state["x"])
    x = state["x"]
    if denoise:
        x = x + levels[-1] ** 2 * score_at(x, x.new_full((len(x),), levels[-1]))
    return Chain(x, recorder.path(), nfe=steps + int(denoise))
