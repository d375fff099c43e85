"""The samplers themselves: against the laws of their kernels, and where ULA has no law."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from replicate.experiments import Run, experiment
from replicate.model import Estimate
from replicate.papers.roberts.kernel import TARGETS, Gridded, Target, gaussian_width
from replicate.sampling.langevin import Chain, mala, ula

#: step sizes of the chains on N(0, 1); ULA has a law below 4, MALA at any
ULA_SIZES = (0.5, 1.0, 2.0, 3.0)
MALA_SIZES = (0.5, 1.0, 2.0, 4.0, 8.0)
#: p ~ exp(-x^4 / 4), whose tails are lighter than a Gaussian's
LIGHT = Target(lambda x: -0.25 * x.square().square(), lambda x: -(x**3), half_width=4.0)
#: a start from which ULA's next step on `LIGHT` goes further out at once
FAR = 6.0


def accepted(target: Target, start: Tensor, steps: int, eps: float, generator: torch.Generator) -> tuple[Chain, float]:
    """Run MALA from `start`, shape (n, 1); return the chain with every state, and its acceptance."""
    chain = mala(
        lambda x: target.log_density(x).squeeze(-1), target.score, start, steps, eps, generator, record_every=1
    )
    assert chain.acceptance is not None
    return chain, chain.acceptance


def settled_variance(chain: Chain) -> float:
    """Return the second moment of a chain's path after its first tenth, when every chain here has lost its start."""
    assert chain.path is not None
    return float(chain.path[len(chain.path) // 10 :].square().mean())


def gaussian_chains(run: Run, start: Tensor, steps: int, spacing: float) -> None:
    """Measure ULA and MALA on N(0, 1): variance against the closed forms, MALA's acceptance against its kernel's."""
    gaussian, n = TARGETS["gaussian"], start.numel()
    ula_errors, mala_errors, rate_errors, rates = [], [], [], []
    for eps in ULA_SIZES:
        chain = ula(gaussian.score, start, steps, eps, run.stream(f"ula-{eps:g}"), record_every=1)
        ula_errors.append(abs(settled_variance(chain) / gaussian_width(eps) ** 2 - 1))
    for eps in MALA_SIZES:
        chain, rate = accepted(gaussian, start, steps, eps, run.stream(f"mala-{eps:g}"))
        mala_errors.append(abs(settled_variance(chain) - 1))
        rate_errors.append(abs(rate - Gridded.of(gaussian, eps, spacing).acceptance()))
        rates.append(rate)
    for metric, value, unit in (
        ("largest_variance_error:ula", max(ula_errors), "ratio"),
        ("largest_variance_error:mala", max(mala_errors), "ratio"),
        ("largest_acceptance_error", max(rate_errors), "probability"),
        ("acceptance:smallest_step", rates[0], "probability"),
        ("acceptance:largest_step", rates[-1], "probability"),
    ):
        run.measure(metric, Estimate(value, math.nan, "estimate", unit, n))


def diverging_chains(run: Run, start: Tensor) -> None:
    """Measure ULA on N(0, 1) at the edge eps = 4, where the variance grows by eps per step, and at 5, by 9 / 4."""
    steps, n = 200, start.numel()
    ends = (ula(lambda x: -x, start, steps, eps, run.stream(f"ula-{eps:g}")).samples for eps in (4.0, 5.0))
    edge, beyond = (float(x.square().mean()) for x in ends)
    growth = Estimate((edge - 1) / steps, edge / steps * math.sqrt(2 / n), "estimate", "squared units", n)
    run.measure("growth:edge", growth)
    growth = Estimate(math.log(beyond) / steps, math.sqrt(2 / n) / steps, "estimate", "nats per step", n)
    run.measure("growth:beyond", growth)


def light_tails(run: Run, n: int, steps: int) -> None:
    """Measure ULA and MALA at eps = 1/2 on p ~ exp(-x^4 / 4), from the mode and from far out."""
    for place, x in (("mode", 0.0), ("far", FAR)):
        start = torch.full((n, 1), x, dtype=torch.float64, device=run.device)
        plain = ula(LIGHT.score, start, steps, 0.5, run.stream(f"ula-{place}"))
        adjusted, rate = accepted(LIGHT, start, steps, 0.5, run.stream(f"mala-{place}"))
        # a chain beyond 20 has left for good: its next step multiplies it by more than 100
        for name, chain in (("ula", plain), ("mala", adjusted)):
            left = ~(chain.samples.flatten().abs() < 20)  # true for nan
            run.measure(f"left_share:{name}_{place}", Estimate.mean_of(left.double(), "estimate", "probability"))
        run.measure(f"acceptance:{place}", Estimate(rate, math.nan, "estimate", "probability", n * steps))


SMOKE = {"chains": 200, "steps": 50, "light_chains": 50, "light_steps": 50, "spacing": 0.7}


@experiment("roberts-chains", family="score", seeds=3, smoke=SMOKE, precision="float64")
def check_chains(
    run: Run,
    *,
    chains: int = 4000,
    steps: int = 400,
    light_chains: int = 1000,
    light_steps: int = 2000,
    spacing: float = 0.35,
) -> None:
    """ULA and MALA on a Gaussian against the closed forms, ULA where it diverges, both under light tails."""
    start = torch.randn(chains, 1, generator=run.stream("start"), dtype=torch.float64, device=run.device)
    gaussian_chains(run, start, steps, spacing)
    diverging_chains(run, start)
    light_tails(run, light_chains, light_steps)
