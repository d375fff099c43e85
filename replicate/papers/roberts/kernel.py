"""Roberts and Tweedie 1996, "Exponential convergence of Langevin distributions and their discrete approximations".

What the step size does to Langevin dynamics. In the suite's convention x <- x + (eps / 2) s(x) + sqrt(eps) z:

    roberts-kernel: the laws that ULA and MALA really converge to, without a chain. The transition kernel is set up on a
        grid and its stationary vector solved for; on N(0, s^2) the answer is N(0, s^2 / (1 - eps / (4 s^2))), elsewhere
        there is no closed form. Densities: a Gaussian, two Gaussians 4 standard deviations apart, and 1 / (pi cosh x),
        whose tails are exponential and whose score is bounded.
    roberts-chains: the samplers themselves against those laws, and where there is none: ULA on a Gaussian at
        eps = 4 s^2 and above, and ULA where the tails are lighter than a Gaussian's, p ~ exp(-x^4 / 4), on which it is
        transient (Theorem 3.2) and MALA is not, though it sticks far out (Theorem 4.2).

The grid: the kernel's columns are normal densities times the spacing h, and sums stand for integrals. For smooth
functions that decay this is exact but for exp(-2 pi^2 eps / h^2), which is why h is a share of sqrt(eps).

What the step does to annealed Langevin's last level is measured in `replicate.papers.ncsn_inpainting` (ncsn-step).

Departure: Roberts and Tweedie prove rates of convergence and give no bias; the order of the bias is that of Talay and
Tubaro 1990 (Stoch. Anal. Appl. 8), the first one in eps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.interpolate import PchipInterpolator
from torch import Tensor

from replicate.model import Estimate
from replicate.runs.experiment import Context, Experiment, Line, Outcome, Plot
from replicate.runs.paper import Paper
from replicate.sampling.langevin import mala, ula


@dataclass(frozen=True)
class Target:
    """A density on the line.

    Attributes:
        log_density: up to a constant, (n,) -> (n,).
        score: its derivative, (n,) -> (n,).
        half_width: nothing that matters is outside [-half_width, half_width], for any step size that is used.
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
#: step sizes of the chains on N(0, 1); ULA has a law below 4, MALA at any
ULA_SIZES = (0.5, 1.0, 2.0, 3.0)
MALA_SIZES = (0.5, 1.0, 2.0, 4.0, 8.0)
#: a start from which ULA's next step on exp(-x^4 / 4) goes further out at once
FAR = 6.0
#: the grid spacing is never above this: the densities are smooth on the scale of 1
COARSEST = 0.1


# -- the laws that the chains converge to


@dataclass(frozen=True)
class Gridded:
    """A density's grid at a step size.

    Attributes:
        x: points, shape (m,), float64.
        p: the density's mass at each, summing to 1, shape (m,).
        proposal: mass that the Langevin step from each point gives to each, shape (m, m), rows summing to 1.
        log_ratio: log of the Metropolis ratio of each such step, shape (m, m).
    """

    x: Tensor
    p: Tensor
    proposal: Tensor
    log_ratio: Tensor

    @classmethod
    def of(cls, target: Target, eps: float, spacing: float) -> Gridded:
        """Set up for step size eps; `spacing` is in units of sqrt(eps)."""
        h = min(spacing * math.sqrt(eps), COARSEST)
        half = math.ceil(target.half_width / h)
        x = h * torch.arange(-half, half + 1, dtype=torch.float64)
        log_p = target.log_density(x)
        log_q = -(x - (x + 0.5 * eps * target.score(x))[:, None]).square() / (2 * eps)
        proposal = log_q.exp() * (h / math.sqrt(2 * math.pi * eps))
        # what the box cuts off goes back to where it came from: only far out is that more than rounding
        proposal = proposal + (1 - proposal.sum(1)).diag()
        return cls(x, log_p.softmax(0), proposal, log_p - log_p[:, None] + log_q.T - log_q)

    def adjusted(self) -> Tensor:
        """MALA's kernel, shape (m, m): proposals that are accepted, the rest stays."""
        moved = self.proposal * self.log_ratio.clamp_max(0).exp()
        moved = moved - moved.diagonal().diag()
        return moved + (1 - moved.sum(1)).diag()

    def acceptance(self) -> float:
        """Mean acceptance of a MALA step from the density."""
        return float(self.p @ (self.proposal * self.log_ratio.clamp_max(0).exp()).sum(1))


def stationary(kernel: Tensor) -> Tensor:
    """The law pi = pi K of a kernel (m, m) with rows that sum to 1, shape (m,)."""
    m = len(kernel)
    system = kernel.T - torch.eye(m, dtype=kernel.dtype)
    system[m // 2] = 1.0  # one equation is the sum of the others; the total mass takes its place
    right = torch.zeros(m, dtype=kernel.dtype)
    right[m // 2] = 1.0
    return torch.linalg.solve(system, right)


def variance(x: Tensor, p: Tensor) -> float:
    """Variance of the law p on points x."""
    return float(p @ x.square() - (p @ x) ** 2)


def kl_divergence(p: Tensor, q: Tensor) -> float:
    """KL(p || q) of two laws on the same points, in nats; rounding below 0 of a solved law counts as no mass."""
    inside = p > 1e-300
    return float((p[inside] * (p[inside].log() - q[inside].clamp_min(1e-300).log())).sum())


def normal_quantile(p: Tensor) -> Tensor:
    """Phi^-1(F) at the points of a grid, F the law's mass before and half of the point's own, shape (m,).

    By the nearer tail, so that far out on either side it keeps its digits.
    """
    below, above = p.cumsum(0) - 0.5 * p, p.flip(0).cumsum(0).flip(0) - 0.5 * p
    lower = below < above
    return torch.where(lower, 1, -1) * torch.special.ndtri(torch.where(lower, below, above).clamp_min(0))


def wasserstein(x: Tensor, p: Tensor, q: Tensor) -> float:
    """2-Wasserstein distance of two smooth laws on the grid x, through their quantile functions.

    W2^2 = int_0^1 (F^-1(u) - G^-1(u))^2 du = int (x - G^-1(F(x)))^2 p(x) dx, with G^-1 by interpolation in the normal
    quantile of the distribution function, in which it is nearly straight (monotone cubics). Mass of p beyond 7 standard
    deviations is left out: a solved law is rounding error there.
    """
    at_p, at_q = normal_quantile(p), normal_quantile(q)
    inside, known = at_p.abs() < 7, at_q.isfinite()
    transported = PchipInterpolator(at_q[known].numpy(), x[known].numpy())(at_p[inside].numpy())
    return math.sqrt(float(p[inside].numpy() @ (x[inside].numpy() - transported) ** 2))


def gaussian_width(eps: float) -> float:
    """Standard deviation of ULA's law on N(0, 1): 1 / sqrt(1 - eps / 4)."""
    return 1 / math.sqrt(1 - eps / 4)


def gaussian_kl(eps: float) -> float:
    """KL(ULA's law || N(0, 1)), in nats."""
    v = gaussian_width(eps) ** 2
    return 0.5 * (v - 1 - math.log(v))


def kernel_bias(context: Context) -> Outcome:
    """Bias of ULA and of MALA in their stationary laws, against step size."""
    sizes = (*SMALL, *LARGE)
    estimates: dict[str, Estimate] = {}
    lines, accepted, variance_errors = [], [], []
    worst = 0.0
    for name, target in TARGETS.items():
        w2, kl, rate = [], [], []
        for eps in sizes:
            grid = Gridded.of(target, eps, context.params["spacing"])
            biased = stationary(grid.proposal)
            w2.append(wasserstein(grid.x, biased, grid.p))
            kl.append(kl_divergence(biased, grid.p))
            rate.append(grid.acceptance())
            worst = max(worst, 0.5 * float((stationary(grid.adjusted()) - grid.p).abs().sum()))
            if name == "gaussian":
                variance_errors.append(abs(variance(grid.x, biased) / gaussian_width(eps) ** 2 - 1))
        for metric, values in (("w2", w2), ("kl", kl)):
            order = float(np.polyfit(np.log(SMALL), np.log(values[: len(SMALL)]), 1)[0])
            estimates[f"order_{metric}:{name}"] = Estimate.exact(order, "power of the step size")
        lines.append(Line(name, sizes, w2))
        accepted.append(Line(name, sizes, rate))
    estimates["largest_variance_error"] = Estimate.exact(max(variance_errors), "ratio")
    estimates["largest_mala_bias"] = Estimate.exact(worst, "total variation")
    fine = np.geomspace(sizes[0], sizes[-1], 60).tolist()
    lines.append(Line("gaussian, closed form", fine, [gaussian_width(eps) - 1 for eps in fine]))
    plots = (
        Plot(
            "bias",
            "Bias of ULA's stationary law, from its kernel on a grid",
            "step size eps, squared units of x",
            "2-Wasserstein distance to the density",
            tuple(lines),
            log_x=True,
            log_y=True,
        ),
        Plot(
            "acceptance",
            "MALA has no bias at any step size and pays in acceptance",
            "step size eps, squared units of x",
            "mean acceptance",
            tuple(accepted),
            log_x=True,
        ),
    )
    return Outcome(estimates, plots)


# -- the chains themselves


def settled(path: Tensor) -> Tensor:
    """The states of a path (r, n, D) after its first tenth, where the slowest chain here has forgotten its start."""
    return path[len(path) // 10 :]


def gaussian_chains(start: Tensor, context: Context) -> dict[str, Estimate]:
    """ULA and MALA on N(0, 1): variance against the closed forms, MALA's acceptance against its kernel's."""
    steps, spacing, n = context.params["steps"], context.params["spacing"], start.numel()
    off = {"ula": 0.0, "mala": 0.0, "acceptance": 0.0}
    rates = {}
    for eps in ULA_SIZES:
        chain = ula(lambda x: -x, start, steps, eps, context.streams.fresh(f"ula-{eps:g}"), record_every=1)
        assert chain.path is not None
        ratio = float(settled(chain.path).square().mean()) / gaussian_width(eps) ** 2
        off["ula"] = max(off["ula"], abs(ratio - 1))
    gaussian = TARGETS["gaussian"]
    for eps in MALA_SIZES:
        chain = mala(
            lambda x: gaussian.log_density(x).squeeze(-1),
            gaussian.score,
            start,
            steps,
            eps,
            context.streams.fresh(f"mala-{eps:g}"),
            record_every=1,
        )
        assert chain.path is not None
        assert chain.acceptance is not None
        off["mala"] = max(off["mala"], abs(float(settled(chain.path).square().mean()) - 1))
        expected = Gridded.of(gaussian, eps, spacing).acceptance()
        off["acceptance"] = max(off["acceptance"], abs(chain.acceptance - expected))
        rates[eps] = Estimate(chain.acceptance, math.nan, "estimate", "probability", n)
    return {
        "largest_variance_error:ula": Estimate(off["ula"], math.nan, "estimate", "ratio", n),
        "largest_variance_error:mala": Estimate(off["mala"], math.nan, "estimate", "ratio", n),
        "largest_acceptance_error": Estimate(off["acceptance"], math.nan, "estimate", "probability", n),
        "acceptance:smallest_step": rates[min(rates)],
        "acceptance:largest_step": rates[max(rates)],
    }


def diverging_chains(start: Tensor, context: Context) -> dict[str, Estimate]:
    """ULA on N(0, 1) at the edge eps = 4, where the variance grows by eps a step, and at 5, by a factor of 9 / 4."""
    steps, n = 200, start.numel()
    edge, beyond = (
        float(ula(lambda x: -x, start, steps, eps, context.streams.fresh(f"ula-{eps:g}")).samples.square().mean())
        for eps in (4.0, 5.0)
    )
    return {
        "growth:edge": Estimate((edge - 1) / steps, edge / steps * math.sqrt(2 / n), "estimate", "squared units", n),
        "growth:beyond": Estimate(math.log(beyond) / steps, math.sqrt(2 / n) / steps, "estimate", "nats per step", n),
    }


def light_tails(context: Context) -> dict[str, Estimate]:
    """ULA and MALA at eps = 1/2 on p ~ exp(-x^4 / 4), from the mode and from far out."""
    n, steps, eps = context.params["light_chains"], context.params["light_steps"], 0.5
    estimates = {}
    for place, x in (("mode", 0.0), ("far", FAR)):
        start = torch.full((n, 1), x, dtype=torch.float64, device=context.device)
        plain = ula(lambda y: -(y**3), start, steps, eps, context.streams.fresh(f"ula-{place}")).samples
        chain = mala(
            lambda y: -0.25 * y.square().square().squeeze(-1),
            lambda y: -(y**3),
            start,
            steps,
            eps,
            context.streams.fresh(f"mala-{place}"),
        )
        assert chain.acceptance is not None
        # a chain beyond this has left for good: its next step multiplies it by more than 100
        for name, end in (("ula", plain), ("mala", chain.samples)):
            left = ~(end.flatten().abs() < 20)  # true for nan
            estimates[f"left_share:{name}_{place}"] = Estimate.mean_of(left.double(), "estimate", "probability")
        estimates[f"acceptance:{place}"] = Estimate(chain.acceptance, math.nan, "estimate", "probability", n * steps)
    return estimates


def chains(context: Context) -> Outcome:
    """The suite's samplers against the laws that the kernels have, and where ULA has none."""
    shape = (context.params["chains"], 1)
    start = torch.randn(shape, generator=context.streams.fresh("start"), dtype=torch.float64, device=context.device)
    return Outcome(gaussian_chains(start, context) | diverging_chains(start, context) | light_tails(context))


KERNEL = Experiment(
    name="roberts-kernel",
    about="stationary laws of ULA and MALA from their transition kernels on a grid, against step size",
    family="score",
    run=kernel_bias,
    params={"spacing": 0.35},
    seeds=1,
    overrides={"smoke": {"spacing": 0.7}},
    precision="float64",
)

CHAINS = Experiment(
    name="roberts-chains",
    about="ULA and MALA on a Gaussian against the closed forms, ULA where it diverges, both under light tails",
    family="score",
    run=chains,
    params={"chains": 4000, "steps": 400, "light_chains": 1000, "light_steps": 2000, "spacing": 0.35},
    seeds=3,
    overrides={"smoke": {"chains": 200, "steps": 50, "light_chains": 50, "light_steps": 50, "spacing": 0.7}},
    precision="float64",
)

PAPER = Paper("roberts", Path(__file__).with_suffix(".toml"), experiments=(KERNEL, CHAINS))
