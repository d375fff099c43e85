"""Predictor-corrector sampling of a reverse SDE (Song et al. 2021, arXiv:2011.13456, Algorithms 1 to 5).

Predictor: reverse diffusion (Eq. 46),  x_{i} = x_{i+1} - f_{i+1}(x_{i+1}) + G_{i+1}^2 s(x_{i+1}, t_{i+1}) + G_{i+1} z,
with the discretisation x_{i+1} = x_i + f + G z taken from the SDE's own transition kernel: on the VE and VP SDEs these
are the printed updates (G^2 = sigma_{i+1}^2 - sigma_i^2; f = (sqrt(1 - beta) - 1) x, G^2 = beta).

Corrector: Langevin with the step size that keeps the signal-to-noise ratio r (Algorithms 4 and 5). The paper's step
x + eps g + sqrt(2 eps) z with eps = 2 alpha (r ||z|| / ||g||)^2 is this package's convention with step size 2 eps.

The predictor's bias is of first order: on a Gaussian, samples of 200 steps without a corrector are 2 to 4 % too wide.

Deviations: the time grid is `time_grid`, not even in t; ||z|| and ||g|| are means over the batch, as in the released
code (in two dimensions a single ||g|| comes arbitrarily close to 0); alpha = 1 for every SDE.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from replicate.resume import State
from replicate.sampling.langevin import Chain, langevin_step, path_of, recorded, standard_normal_like
from replicate.sde import SDE

#: exponent of `time_grid`
RHO = 7.0
#: (x (n, D), t (n,)) -> score of x at time t, shape (n, D)
ScoreAt = Callable[[Tensor, Tensor], Tensor]


def time_grid(sde: SDE, steps: int, device: torch.device) -> Tensor:
    """Return times from t_max down to t_min, shape (steps + 1,), float64 (Karras et al. 2022, 2206.00364, eq. 5).

    x_t / m(t) is the data plus noise of level sigma(t) = std(t) / m(t). The grid is even in sigma^(1/RHO): fine where
    the noise is small. For a VE SDE with geometric levels it lies between even in t and even in sigma.

    Raises:
        ValueError: steps < 1.
    """
    if steps < 1:
        raise ValueError(f"an SDE sampler needs at least 1 step; got {steps}")
    # on the CPU, so that the grid is the same on every device
    ends = torch.tensor([sde.t_max, sde.t_min], dtype=torch.float64)
    first, last = (sde.log_ratio(ends) / RHO).exp().tolist()
    root = torch.linspace(first, last, steps + 1, dtype=torch.float64)
    times = sde.time_of(RHO * root.log())
    times[0], times[-1] = ends
    return times.to(device)


def transition(sde: SDE, times: Tensor) -> tuple[Tensor, Tensor]:
    """Return the kernel p(x_{t_i} | x_{t_{i+1}}) = N(ratio x, variance I) between neighbours t_i > t_{i+1} of a grid.

    Args:
        times: decreasing, shape (steps + 1,).

    Returns:
        (ratio, variance), each of shape (steps,).
    """
    scale, std = sde.marginal(times)
    ratio = scale[:-1] / scale[1:]
    return ratio, (std[:-1].square() - (ratio * std[1:]).square()).clamp_min(0)


def corrector_step(x: Tensor, score: Tensor, snr: float, noise: Tensor) -> Tensor:
    """Take one Langevin step of the size that gives the signal-to-noise ratio `snr`; return x, shape (n, D)."""
    ratio = noise.norm(dim=-1).mean() / score.norm(dim=-1).mean()
    return langevin_step(x, score, 4 * (snr * ratio).square(), noise)


def posterior_mean(x: Tensor, score: Tensor, scale: Tensor, std: Tensor) -> Tensor:
    """Return E[x_0 | x_t] = (x + std^2 score) / scale, shape (n, D), for scalar scale and std: Tweedie's formula."""
    return (x + std.square() * score) / scale


@dataclass(frozen=True)
class Corrector:
    """Langevin steps at every time of the grid.

    Attributes:
        steps: after each predictor step (M in the paper).
        snr: r; 0.16 in the paper's VE experiments, 0.01 to 0.2 elsewhere.
        predict: False samples by the corrector alone.
    """

    steps: int
    snr: float
    predict: bool = True


@torch.no_grad()
def predictor_corrector(
    score_at: ScoreAt,
    sde: SDE,
    shape: tuple[int, int],
    steps: int,
    corrector: Corrector,
    generator: torch.Generator,
    denoise: bool = True,
    record_every: int = 0,
) -> Chain:
    """Draw samples by predictor and corrector steps down the time grid.

    Args:
        score_at: see `ScoreAt`.
        sde: the forward SDE.
        shape: (n, D) of the samples.
        steps: steps of the time grid.
        corrector: see `Corrector`.
        generator: on the device to sample on.
        denoise: end with Tweedie's mean at t_min.
        record_every: grid steps between two states in `path`; 0 keeps none.

    Raises:
        ValueError: steps < 1, or neither predictor nor corrector is on.

    Example:
        Data N(3, 0.5^2), whose score is known at every time:

        >>> from replicate.sde import VE
        >>> sde, g = VE(0.01, 20.0), torch.Generator().manual_seed(0)
        >>> score = lambda x, t: (3 - x) / (0.25 + sde.marginal(t)[1] ** 2)[:, None]
        >>> chain = predictor_corrector(score, sde, (4000, 1), 100, Corrector(1, 0.1), g)
        >>> chain.nfe, round(float(chain.samples.mean()), 1), round(float(chain.samples.std()), 1)
        (201, 3.0, 0.5)
    """
    if not corrector.predict and corrector.steps < 1:
        raise ValueError("predictor_corrector needs a corrector with predict=True or steps >= 1")
    n = shape[0]
    x = sde.prior_sample(*shape, generator)
    times = time_grid(sde, steps, x.device)
    ratio, variance = (value.to(x.dtype) for value in transition(sde, times))
    scale, std = (value.to(x.dtype) for value in sde.marginal(times))
    times = times.to(x.dtype)
    state: State = {"x": x, "generator": generator}
    for i in recorded("predictor-corrector", steps, state, record_every):
        x = state["x"]
        if corrector.predict:
            score = score_at(x, times[i].expand(n))
            mean = (2 - ratio[i]) * x + variance[i] * score
            x = mean + variance[i].sqrt() * standard_normal_like(x, generator)
        for _ in range(corrector.steps):
            score = score_at(x, times[i + 1].expand(n))
            x = corrector_step(x, score, corrector.snr, standard_normal_like(x, generator))
        state["x"] = x
    x = state["x"]
    if denoise:
        x = posterior_mean(x, score_at(x, times[-1].expand(n)), scale[-1], std[-1])
    return Chain(x, path_of(state), nfe=steps * (int(corrector.predict) + corrector.steps) + int(denoise))


def reverse_sde(
    score_at: ScoreAt, sde: SDE, n: int, dim: int, steps: int, generator: torch.Generator, denoise: bool = True
) -> Chain:
    """Draw n samples by the predictor alone: the reverse SDE, discretised; see `predictor_corrector`.

    Example:
        >>> from replicate.sde import VE
        >>> sde, g = VE(0.01, 20.0), torch.Generator().manual_seed(0)
        >>> score = lambda x, t: -x / (1 + sde.marginal(t)[1] ** 2)[:, None]
        >>> round(float(reverse_sde(score, sde, 4000, 1, 200, g).samples.std()), 1)
        1.0
    """
    return predictor_corrector(score_at, sde, (n, dim), steps, Corrector(0, 0.0), generator, denoise=denoise)
