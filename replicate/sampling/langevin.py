"""Sample by Langevin dynamics: unadjusted (ULA) and Metropolis-adjusted (MALA).

One convention, here and in every sampler of this package (Welling and Teh 2011, Eq. 4, with a temperature):

    x <- x + (eps / 2T) score(x) + sqrt(eps) z,    z ~ N(0, I)

eps is `step_size`, T is `temperature`, score(x) = grad log p(x). As eps -> 0 the chain's law is proportional to
p(x)^(1/T); T = 1 samples p. Callers convert the parametrisation of their paper.

Sources: Roberts and Tweedie 1996, Bernoulli 2(4), for both chains and the acceptance ratio.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from replicate.resume import State, resumable

Score = Callable[[Tensor], Tensor]
LogDensity = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Chain:
    """The end of a batch of n independent chains.

    Attributes:
        samples: last states, shape (n, D).
        path: recorded states, shape (r, n, D), the starting state first; None where nothing was recorded.
        nfe: sequential score evaluations of one batch.
        acceptance: accepted share of all proposals, None where the sampler has no accept step.
    """

    samples: Tensor
    path: Tensor | None
    nfe: int
    acceptance: float | None = None


def recorded(name: str, steps: int, state: State, every: int) -> Iterator[int]:
    """Run `resumable` and keep state["x"] (n, D), at first and after each `every` steps, in state["path"]."""
    state["path"] = [state["x"].clone()] if every else []
    for step in resumable(name, steps, state):
        yield step
        if every and (step + 1) % every == 0:
            state["path"].append(state["x"].clone())


def path_of(state: State) -> Tensor | None:
    """Return the states that `recorded` kept, shape (r, n, D), or None if there are none."""
    return torch.stack(state["path"]) if state["path"] else None


def standard_normal_like(x: Tensor, generator: torch.Generator) -> Tensor:
    """Draw z ~ N(0, I) of x's shape, dtype and device."""
    return torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)


def langevin_drift(x: Tensor, score: Tensor, step_size: float | Tensor, temperature: float = 1.0) -> Tensor:
    """Return the mean of one step, x + (eps / 2T) score, shape (n, D)."""
    return x + (step_size / (2 * temperature)) * score


def langevin_step(
    x: Tensor, score: Tensor, step_size: float | Tensor, noise: Tensor, temperature: float = 1.0
) -> Tensor:
    """Take one step of the convention in the module's header; return x, shape (n, D).

    Args:
        x, score, noise: state, grad log p(x) and standard normal draw, shape (n, D).
        step_size: eps, in squared units of x; a float or a tensor that broadcasts with x.
        temperature: T.
    """
    return langevin_drift(x, score, step_size, temperature) + step_size**0.5 * noise


def check_settings(steps: int, step_size: float, temperature: float = 1.0) -> None:
    """Refuse settings without a meaning.

    Raises:
        ValueError: steps < 0, step_size <= 0 or temperature <= 0.
    """
    if steps < 0 or not step_size > 0 or not temperature > 0:
        raise ValueError(
            f"Langevin sampling needs steps >= 0, step_size > 0 and temperature > 0; "
            f"got steps={steps}, step_size={step_size}, temperature={temperature}"
        )


@torch.no_grad()
def ula(
    score: Score,
    x: Tensor,
    steps: int,
    step_size: float,
    generator: torch.Generator,
    temperature: float = 1.0,
    record_every: int = 0,
) -> Chain:
    """Run the unadjusted Langevin algorithm; its law is biased by the step size.

    On N(0, s^2) its stationary variance is T s^2 / (1 - eps / (4 T s^2)); it diverges for eps >= 4 T s^2.

    Args:
        score: grad log p, (n, D) -> (n, D).
        x: starting states, shape (n, D); not changed.
        steps: number of steps.
        step_size: eps in squared units of x.
        generator: on x's device.
        temperature: T.
        record_every: steps between two states in `path`; 0 keeps none.

    Raises:
        ValueError: a setting is out of range.

    Example:
        On N(0, 1) the step size 1 gives variance 1 / (1 - 1 / 4):

        >>> g = torch.Generator().manual_seed(0)
        >>> chain = ula(lambda x: -x, torch.zeros(20_000, 1), 50, 1.0, g)
        >>> round(float(chain.samples.var()), 1)
        1.3
    """
    check_settings(steps, step_size, temperature)
    state: State = {"x": x, "generator": generator}
    for _ in recorded("ula", steps, state, record_every):
        x = state["x"]
        state["x"] = langevin_step(x, score(x), step_size, standard_normal_like(x, generator), temperature)
    return Chain(state["x"], path_of(state), nfe=steps)


@torch.no_grad()
def mala(
    log_density: LogDensity,
    score: Score,
    x: Tensor,
    steps: int,
    step_size: float,
    generator: torch.Generator,
    temperature: float = 1.0,
    record_every: int = 0,
) -> Chain:
    """Run the Metropolis-adjusted Langevin algorithm: ULA steps are proposals, accepted so that p^(1/T) is exact.

    A proposal whose log density or score is nan is rejected.

    Args:
        log_density: log p up to a constant, (n, D) -> (n,).
        score: its gradient, (n, D) -> (n, D). A wrong score costs acceptance, not correctness.
        x, steps, step_size, generator, temperature, record_every: as for `ula`.

    Raises:
        ValueError: a setting is out of range.

    Example:
        The same chain as for `ula`, now without bias:

        >>> g = torch.Generator().manual_seed(0)
        >>> normal = lambda x: -0.5 * x.square().sum(-1)
        >>> chain = mala(normal, lambda x: -x, torch.zeros(20_000, 1), 50, 1.0, g)
        >>> round(float(chain.samples.var()), 1)
        1.0
    """
    check_settings(steps, step_size, temperature)
    accepted = torch.zeros((), dtype=torch.float64, device=x.device)
    state: State = {"x": x, "log_p": log_density(x).detach(), "grad": score(x)}
    state |= {"accepted": accepted, "generator": generator}
    for _ in recorded("mala", steps, state, record_every):
        x, log_p, grad = state["x"], state["log_p"], state["grad"]
        proposal = langevin_step(x, grad, step_size, standard_normal_like(x, generator), temperature)
        log_p_new, grad_new = log_density(proposal).detach(), score(proposal)
        # log of p(y)^(1/T) q(x | y) / (p(x)^(1/T) q(y | x)) with q(. | x) = N(x + eps / 2T score(x), eps I)
        there = (proposal - langevin_drift(x, grad, step_size, temperature)).square().sum(-1)
        back = (x - langevin_drift(proposal, grad_new, step_size, temperature)).square().sum(-1)
        log_ratio = (log_p_new - log_p) / temperature + (there - back) / (2 * step_size)
        u = torch.rand(log_ratio.shape, generator=generator, device=x.device, dtype=log_ratio.dtype)
        accept = u.log() < log_ratio
        state["x"] = torch.where(accept[:, None], proposal, x)
        state["grad"] = torch.where(accept[:, None], grad_new, grad)
        state["log_p"] = torch.where(accept, log_p_new, log_p)
        state["accepted"] = state["accepted"] + accept.double().mean()
    rate = float(state["accepted"]) / steps if steps else math.nan
    return Chain(state["x"], path_of(state), nfe=steps + 1, acceptance=rate)
