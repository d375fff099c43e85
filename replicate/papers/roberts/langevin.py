"""The laws that ULA and MALA converge to, from their transition kernels on a grid, and the samplers against them.

The kernel's columns are normal densities times the spacing h, and sums replace integrals. For smooth functions that
decay this is exact but for exp(-2 pi^2 eps / h^2), which is why h is a share of sqrt(eps).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from scipy.interpolate import PchipInterpolator
from torch import Tensor

from replicate.experiments import Run, experiment
from replicate.model import Estimate
from replicate.sampling.langevin import Chain, mala, ula


@dataclass(frozen=True)
class Target:
    """A density on the line: its log up to a constant and the derivative of that, both (n,) -> (n,).

    Nothing that matters is outside [-half_width, half_width], for any step size that is used.
    """

    log_density: Callable[[Tensor], Tensor]
    score: Callable[[Tensor], Tensor]
    half_width: float


#: half the distance of the two Gaussians, in their standard deviations
HALF_DISTANCE = 2.0
TARGETS: Mapping[str, Target] = {
    "gaussian": Target(lambda x: -0.5 * x.square(), lambda x: -x, 18.0),
    "two-gaussians": Target(
        lambda x: torch.logaddexp(-0.5 * (x - HALF_DISTANCE).square(), -0.5 * (x + HALF_DISTANCE).square()),
        lambda x: HALF_DISTANCE * torch.tanh(HALF_DISTANCE * x) - x,
        20.0,
    ),
    "cosh": Target(lambda x: -torch.log(torch.cosh(x)), lambda x: -torch.tanh(x), 36.0),
}
#: step sizes over which the order of the bias is measured, in squared units of x: small enough for one order to show
SMALL = (0.05, 0.1, 0.2)
#: further step sizes of the curves
LARGE = (0.5, 1.0, 2.0, 3.0)
#: the grid spacing is never above this: the densities are smooth on the scale of 1
COARSEST = 0.1


@dataclass(frozen=True)
class Gridded:
    """A density's grid at a step size: points x (m,), float64, and the density's mass p (m,) at each, summing to 1.

    The `proposal` (m, m) is the mass that the Langevin step from each point gives to each, its rows summing to 1, and
    `log_ratio` (m, m) the log of the Metropolis ratio of each such step.
    """

    x: Tensor
    p: Tensor
    proposal: Tensor
    log_ratio: Tensor

    @classmethod
    def of(cls, target: Target, eps: float, spacing: float) -> Gridded:
        """Compute the kernel for step size eps; `spacing` is in units of sqrt(eps)."""
        h = min(spacing * math.sqrt(eps), COARSEST)
        half = math.ceil(target.half_width / h)
        x = h * torch.arange(-half, half + 1, dtype=torch.float64)
        log_p = target.log_density(x)
        log_q = -(x - (x + 0.5 * eps * target.score(x))[:, None]).square() / (2 * eps)
        proposal = log_q.exp() * (h / math.sqrt(2 * math.pi * eps))
        # mass that leaves the box returns to its origin: only far out is that more than rounding
        proposal = proposal + (1 - proposal.sum(1)).diag()
        return cls(x, log_p.softmax(0), proposal, log_p - log_p[:, None] + log_q.T - log_q)

    def adjusted(self) -> Tensor:
        """Return MALA's kernel, shape (m, m): accepted proposals move, rejected ones stay."""
        moved = self.proposal * self.log_ratio.clamp_max(0).exp()
        moved = moved - moved.diagonal().diag()
        return moved + (1 - moved.sum(1)).diag()

    def acceptance(self) -> float:
        """Return the mean acceptance of a MALA step from the density."""
        return float(self.p @ (self.proposal * self.log_ratio.clamp_max(0).exp()).sum(1))


def stationary(kernel: Tensor) -> Tensor:
    """Solve for the law pi = pi K of a kernel (m, m) with rows that sum to 1, shape (m,)."""
    m = len(kernel)
    system, right = kernel.T - torch.eye(m, dtype=kernel.dtype), torch.zeros(m, dtype=kernel.dtype)
    system[m // 2] = right[m // 2] = 1.0  # one equation is the sum of the others; the total mass takes its place
    return torch.linalg.solve(system, right)


def variance(x: Tensor, p: Tensor) -> float:
    """Return the variance of the law p on points x."""
    return float(p @ x.square() - (p @ x) ** 2)


def kl_divergence(p: Tensor, q: Tensor) -> float:
    """Return KL(p || q) of laws on the same points, in nats; rounding below 0 of a solved law counts as no mass."""
    inside = p > 1e-300
    return float((p[inside] * (p[inside].log() - q[inside].clamp_min(1e-300).log())).sum())


def normal_quantile(p: Tensor) -> Tensor:
    """Return Phi^-1(F) at the points of a grid, F the law's mass before and half of the point's own, shape (m,).

    By the nearer tail, so that far out on either side it keeps its digits.
    """
    below, above = p.cumsum(0) - 0.5 * p, p.flip(0).cumsum(0).flip(0) - 0.5 * p
    lower = below < above
    return torch.where(lower, 1, -1) * torch.special.ndtri(torch.where(lower, below, above).clamp_min(0))


def wasserstein(x: Tensor, p: Tensor, q: Tensor) -> float:
    """Return the 2-Wasserstein distance of two smooth laws on the grid x, through their quantile functions.

    W2^2 = int_0^1 (F^-1(u) - G^-1(u))^2 du = int (x - G^-1(F(x)))^2 p(x) dx, with G^-1 by interpolation in the normal
    quantile of the distribution function, in which it is nearly straight (monotone cubics). Mass of p beyond 7 standard
    deviations is left out: a solved law is rounding error there.
    """
    at_p, at_q = normal_quantile(p), normal_quantile(q)
    inside, known = at_p.abs() < 7, at_q.isfinite()
    transported = PchipInterpolator(at_q[known].numpy(), x[known].numpy())(at_p[inside].numpy())
    return math.sqrt(float(p[inside].numpy() @ (x[inside].numpy() - transported) ** 2))


def gaussian_width(eps: float) -> float:
    """Return the standard deviation of ULA's law on N(0, 1): 1 / sqrt(1 - eps / 4)."""
    return 1 / math.sqrt(1 - eps / 4)


@experiment("roberts-kernel", family="score", seeds=1, smoke={"spacing": 0.7}, precision="float64")
def kernel_bias(run: Run, *, spacing: float = 0.35) -> None:
    """Stationary laws of ULA and MALA from their transition kernels on a grid, against step size."""
    sizes = (*SMALL, *LARGE)
    bias, acceptance, variance_errors, mala_biases = {}, {}, [], []
    for name, target in TARGETS.items():
        w2, kl, rates = [], [], []
        for eps in sizes:
            grid = Gridded.of(target, eps, spacing)
            law = stationary(grid.proposal)
            w2.append(wasserstein(grid.x, law, grid.p))
            kl.append(kl_divergence(law, grid.p))
            rates.append(grid.acceptance())
            mala_biases.append(0.5 * float((stationary(grid.adjusted()) - grid.p).abs().sum()))
            if name == "gaussian":
                variance_errors.append(abs(variance(grid.x, law) / gaussian_width(eps) ** 2 - 1))
        for metric, values in (("w2", w2), ("kl", kl)):
            order = float(np.polyfit(np.log(SMALL), np.log(values[: len(SMALL)]), 1)[0])
            run.measure(f"order_{metric}:{name}", Estimate.exact(order, "power of the step size"))
        bias[name], acceptance[name] = (sizes, w2), (sizes, rates)
    run.measure("largest_variance_error", Estimate.exact(max(variance_errors), "ratio"))
    run.measure("largest_mala_bias", Estimate.exact(max(mala_biases), "total variation"))
    fine = tuple(np.geomspace(sizes[0], sizes[-1], 60).tolist())
    bias["gaussian, closed form"] = fine, [gaussian_width(eps) - 1 for eps in fine]
    title, x_label = "Bias of ULA's stationary law, from its kernel on a grid", "step size eps, squared units of x"
    run.curves("bias", title, (x_label, "2-Wasserstein distance to the density"), bias, log="xy")
    title = "MALA has no bias at any step size and pays in acceptance"
    run.curves("acceptance", title, (x_label, "mean acceptance"), acceptance, log="x")


#: step sizes of the chains on N(0, 1); ULA has a law below 4, MALA at any
ULA_SIZES = (0.5, 1.0, 2.0, 3.0)
MALA_SIZES = (0.5, 1.0, 2.0, 4.0, 8.0)
#: p ~ exp(-x^4 / 4), whose tails are lighter than a Gaussian's
LIGHT = Target(lambda x: -0.25 * x.square().square(), lambda x: -(x**3), half_width=4.0)
#: a start from which ULA's next step on `LIGHT` goes further out at once
FAR = 6.0


def accepted(target: Target, start: Tensor, steps: int, eps: float, draws: torch.Generator) -> tuple[Chain, float]:
    """Run MALA from `start`, shape (n, 1); return the chain with every state, and its acceptance."""
    chain = mala(lambda x: target.log_density(x).squeeze(-1), target.score, start, steps, eps, draws, record_every=1)
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
    found = {"largest_variance_error:ula": max(ula_errors), "largest_variance_error:mala": max(mala_errors)}
    run.measure_all({m: Estimate(v, math.nan, "estimate", "ratio", n) for m, v in found.items()})
    found = {"largest_acceptance_error": max(rate_errors)}
    found |= {"acceptance:smallest_step": rates[0], "acceptance:largest_step": rates[-1]}
    run.measure_all({m: Estimate(v, math.nan, "estimate", "probability", n) for m, v in found.items()})


def diverging_chains(run: Run, start: Tensor) -> None:
    """Measure ULA on N(0, 1) at the edge eps = 4, where the variance grows by eps per step, and at 5, by 9 / 4."""
    steps, n = 200, start.numel()
    ends = (ula(lambda x: -x, start, steps, eps, run.stream(f"ula-{eps:g}")).samples for eps in (4.0, 5.0))
    edge, beyond = (float(x.square().mean()) for x in ends)
    at_edge = Estimate((edge - 1) / steps, edge / steps * math.sqrt(2 / n), "estimate", "squared units", n)
    past = Estimate(math.log(beyond) / steps, math.sqrt(2 / n) / steps, "estimate", "nats per step", n)
    run.measure_all({"growth:edge": at_edge, "growth:beyond": past})


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
