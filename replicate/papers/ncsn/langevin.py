"""Langevin dynamics with exact scores: plain and annealed on two separated modes, inpainting and its step on Gaussians.

The toy's target is 1/5 N((-5, -5), I) + 4/5 N((5, 5), I), the start U[-8, 8]^2. The chains are printed, and coded, as
x <- x + (eps / 2) s + sqrt(eps) z, which is the suite's convention at T = 1.

Inpainting (Algorithm 2, App B.3): at each level the known part is replaced by itself plus noise of that level. As
printed and in the code of that paper the noise is drawn once per level and pasted after every step; in the code of its
sequel (Song and Ermon 2020, arXiv:2006.09011) it is redrawn at every step and pasted before it. Step size: Algorithm 1
prints x <- x + (alpha / 2) s + sqrt(alpha) z as well; the released image code takes x <- x + alpha s + sqrt(2 alpha) z,
which is step size 2 alpha. Deviations of these two: x is a Gaussian vector with an image's scale (mean 1/2, standard
deviation 1/4, neighbouring correlation 0.9) and the score is that of x + N(0, sigma^2 I) in closed form; levels, T and
eps are those of the paper's images.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.integrate import trapezoid
from scipy.stats import norm
from torch import Tensor

from replicate.experiments import Run, experiment
from replicate.experiments.noise_schedules import geometric_levels
from replicate.model import Estimate
from replicate.sampling.annealed import annealed_langevin
from replicate.sampling.langevin import langevin_step, standard_normal_like, ula
from replicate.tasks.densities import GaussianMixture, two_gaussians

#: chains start in the square [-BOX, BOX]^2
BOX = 8.0
#: a chain belongs to a mode within this distance of its mean; just under half the distance of the two
REACH = 7.0


def uniform_start(n: int, generator: torch.Generator) -> Tensor:
    """Draw starting states U[-8, 8]^2, shape (n, 2), float64."""
    return BOX * (2 * torch.rand(n, 2, generator=generator, dtype=torch.float64, device=generator.device) - 1)


def share_near(x: Tensor, mode: int) -> Estimate:
    """Return the share of the states (n, 2) within REACH of a mode's mean; mode 0 is the minority, nan is near none."""
    distance = (x - two_gaussians().means[mode].to(x)).norm(dim=1)
    return Estimate.mean_of((distance < REACH).double(), "estimate", "probability")


def in_picture(x: Tensor, limit: float = 100.0, count: int = 400) -> Tensor:
    """Return those of the first states (n, 2) that a plot can show."""
    return x[:count][x[:count].abs().amax(1) < limit]  # false for nan


def pair_score(density: GaussianMixture, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Return the score of w N(-m, I) + (1 - w) N(m, I), m tanh(m'x + log((1 - w) / w) / 2) - x, in few operations.

    It equals `density.score` for the toy mixture and is three times faster: the long chain takes 100,000 steps.
    """
    m = density.means[1].to(device)
    offset = 0.5 * float((density.weights[1] / density.weights[0]).log())
    return lambda x: torch.outer(torch.tanh(x @ m + offset), m) - x


SMOKE = {"chains": 128, "steps": 100, "long_steps": 300}


@experiment("ncsn-langevin", family="score", seeds=3, precision="float64", smoke=SMOKE)
def plain_langevin(
    run: Run, *, chains: int = 1280, steps: int = 1000, long_steps: int = 100_000, eps: float = 0.1
) -> None:
    """Langevin dynamics with the exact score of two separated modes, T = 1000 and 100 times longer."""
    density = two_gaussians()
    start = uniform_start(chains, run.stream("start"))
    chain = ula(pair_score(density, run.device), start, long_steps, eps, run.stream("chains"), record_every=steps)
    assert chain.path is not None
    shares = [share_near(x, 0) for x in chain.path[1:]]
    run.measure("minority_weight:printed", shares[0])
    run.measure("minority_weight:long", share_near(chain.samples, 0))
    curve = [(i + 1) * steps for i in range(len(shares))], [share.value for share in shares]
    title = "Langevin dynamics keeps the weights that the start gave it"
    axes = "steps", "share of the chains in the minority mode"
    run.curves("minority-weight", title, axes, {"Langevin dynamics": curve}, levels={"true weight": 0.2})
    exact = density.sample(chains, run.stream("exact")).to(start)
    clouds = {"exact": in_picture(exact), "Langevin": in_picture(chain.path[1])}
    run.scatter("samples", "Fig 3(a) and (b): samples, and Langevin dynamics after T steps", clouds)


def mean_passage_time(half_distance: float, minority: float) -> float:
    """Return the mean time that dX = (1/2) (log p)' dt + dB takes from the minority mode to the other, by quadrature.

    p = w N(-h, 1) + (1 - w) N(h, 1), w the minority, h half the distance. From a to b it is
    2 int_a^b 1/p(y) int_{-inf}^y p(z) dz dy (Gardiner, Handbook of Stochastic Methods, sec 5.2.7). In the plane the
    coordinate along the axis moves on its own, so this holds there.
    """
    y = np.linspace(-half_distance, half_distance, 40_001)
    p, below = (minority * f(y + half_distance) + (1 - minority) * f(y - half_distance) for f in (norm.pdf, norm.cdf))
    return 2 * float(trapezoid(below / p, y))


@experiment("ncsn-passage", family="score", seeds=1, precision="float64")
def passage(run: Run, *, eps: float = 0.1) -> None:
    """Mean passage time between the two modes, by quadrature."""
    density = two_gaussians()
    half = float((density.means[1] - density.means[0]).norm()) / 2
    halves = np.linspace(1.0, half, 25).tolist()
    steps = [mean_passage_time(h, float(density.weights[0])) / eps for h in halves]
    run.measure("log10_passage_steps", Estimate.exact(math.log10(steps[-1]), "decades of steps"))
    title, curve = "Expected steps from the minority mode to the other", ([2 * h for h in halves], steps)
    axes, levels = ("distance of the modes, standard deviations", "steps"), {"printed T": 1e3, "100 times longer": 1e5}
    run.curves("passage-time", title, axes, {"mean passage time": curve}, log="y", levels=levels)


@dataclass(frozen=True)
class Reading:
    """One way to read the annealed chain's settings: alpha_i = eps (sigma_i / sigma_L)^2 (Algorithm 1).

    T = `steps` are those of each level from sigma_1, the first, to sigma_L; `meanings` of sigma are keys of MEANINGS.
    """

    name: str
    first: float
    last: float
    eps: float
    steps: int
    meanings: tuple[str, ...] = ("added", "replaced")


#: "text": sec 4.3's levels with App B.1's T and eps. At sigma_L = 0.1 that eps is 10 sigma_L^2; "text-scaled" has the
#: appendix's eps / sigma_L^2 instead, "text-long" also N2's T, and "text-images" the eps of the paper's image models.
READINGS = (
    Reading("text", 10.0, 0.1, 0.1, 100),
    Reading("text-scaled", 10.0, 0.1, 1e-3, 100),
    Reading("text-long", 10.0, 0.1, 1e-3, 1000, ("added",)),
    Reading("text-images", 10.0, 0.1, 2e-5, 100),
    Reading("appendix", 20.0, 1.0, 0.1, 100),
)
#: what sigma does to a component's unit variance: noise is added, or sigma takes the standard deviation's place
MEANINGS: dict[str, Callable[[float], float]] = {"added": lambda s: 1 + s * s, "replaced": lambda s: s * s}


def annealed_chain(reading: Reading, meaning: str, start: Tensor, generator: torch.Generator, steps: int = 0) -> Tensor:
    """Return the last states (n, 2) of the annealed chain from `start`; `steps` above 0 replaces T."""
    sigmas, clean, variance = geometric_levels(reading.first, reading.last), two_gaussians(), MEANINGS[meaning]
    mixtures = {s: GaussianMixture(clean.means, variance(s) * clean.covariance, clean.weights) for s in sigmas.tolist()}

    def score_at(x: Tensor, sigma: Tensor) -> Tensor:
        return mixtures[float(sigma[0])].score(x)

    chain = annealed_langevin(score_at, sigmas, start, steps or reading.steps, reading.eps, generator, denoise=False)
    return chain.samples


def spread(x: Tensor) -> Estimate | None:
    """Return a coordinate's standard deviation about its mode's mean; None where no state (n, 2) is near a mode."""
    residuals = torch.cat([x - mean for mean in two_gaussians().means.to(x)])
    inside = residuals[residuals.norm(dim=1) < REACH]
    if not len(inside):
        return None
    sd = float(inside.square().mean().sqrt())
    return Estimate(sd, sd / math.sqrt(2 * inside.numel()), "estimate", "data units", inside.numel())


TINY: dict[str, Any] = {"profiles": ("smoke", "standard"), "smoke": {"chains": 128, "steps": 10}}


@experiment("ncsn-annealed", family="score", precision="float64", **TINY)
def annealed(run: Run, *, chains: int = 1280, steps: int = 0) -> None:
    """Annealed Langevin on two separated modes: levels of the text and of the appendix, two meanings of sigma."""
    start = uniform_start(chains, run.stream("start"))
    clouds = {}
    for reading in READINGS:
        for meaning in reading.meanings:
            variant = f"{reading.name}-{meaning}"
            x = annealed_chain(reading, meaning, start, run.stream(variant), steps)
            minority, majority = share_near(x, 0), share_near(x, 1)
            kept = Estimate(minority.value + majority.value, math.nan, "estimate", "probability", len(x))
            run.measure_all({"minority_weight": minority, "kept_share": kept}, variant)
            if width := spread(x):
                run.measure(f"mode_spread:{variant}", width)
                if reading.name in ("text-scaled", "appendix"):
                    clouds[variant] = in_picture(x)
            else:
                run.omit(f"mode_spread:{variant}", "no chain ended near a mode")
    if clouds:
        run.scatter("annealed-samples", "Fig 3(c): annealed Langevin dynamics, by levels and meaning of sigma", clouds)


#: the paste rules, by when the known part's noise is drawn
RULES = ("once", "redrawn")
#: the suite's step size for a printed alpha of 1
STEPS = {"printed": 1.0, "released": 2.0}


@dataclass(frozen=True)
class Gaussian:
    """N(mean, covariance), (D,) and (D, D), whose first `known` coordinates are observed."""

    mean: Tensor
    covariance: Tensor
    known: int

    def noised_precision(self, sigma: float) -> Tensor:
        """Return the inverse covariance (D, D) after adding N(0, sigma^2 I)."""
        return torch.linalg.inv(self.covariance + sigma**2 * torch.eye(len(self.mean)).to(self.covariance))

    def conditional(self, observed: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and covariance of the hidden part given the observed one (known,)."""
        k = self.known
        gain = torch.linalg.solve(self.covariance[:k, :k], self.covariance[:k, k:]).T
        mean = self.mean[k:] + gain @ (observed - self.mean[:k])
        return mean, self.covariance[k:, k:] - gain @ self.covariance[:k, k:]


def image_like(dim: int, known: int, correlation: float, device: torch.device) -> Gaussian:
    """Return a Gaussian of mean 1/2, standard deviation 1/4 and covariance correlation^|i - j| / 16."""
    index = torch.arange(dim, dtype=torch.float64, device=device)
    return Gaussian(torch.full_like(index, 0.5), correlation ** (index[:, None] - index).abs() / 16, known)


def inpaint(
    density: Gaussian,
    observed: Tensor,
    sigmas: list[float],
    steps: int,
    eps: float,
    rule: str,
    x: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """Inpaint by annealed Langevin, alpha_i = eps (sigma_i / sigma_L)^2; return the last states (n, D).

    The chains start at x (n, D) and take T = `steps` at each of the decreasing levels, with the noised scores of the
    density. The known part, `observed` (known,), is pasted after every step ("once") or before it ("redrawn").
    """
    k = density.known
    for sigma in sigmas:
        alpha, precision = eps * (sigma / sigmas[-1]) ** 2, density.noised_precision(sigma)
        part = observed + sigma * standard_normal_like(x[:, :k], generator)
        x = torch.cat([part, x[:, k:]], 1)
        for _ in range(steps):
            if rule == "redrawn":
                part = observed + sigma * standard_normal_like(x[:, :k], generator)
                x = torch.cat([part, x[:, k:]], 1)
            x = langevin_step(x, (density.mean - x) @ precision, alpha, standard_normal_like(x, generator))
            if rule == "once":
                x = torch.cat([part, x[:, k:]], 1)
    return x


def conditional_errors(samples: Tensor, mean: Tensor, covariance: Tensor) -> dict[str, Estimate]:
    """Measure how far samples (n, d) are from N(mean, covariance), in the units of that distribution.

    With y = L^-1 (x - mean), LL' = covariance: the root mean square of y's mean (conditional standard deviations), and
    the root mean square eigenvalue of y's covariance minus I (relative error of the variance over directions). The
    standard errors are those that exact samples would show.
    """
    n, d = samples.shape
    y = torch.linalg.solve_triangular(torch.linalg.cholesky(covariance), (samples - mean).T, upper=False).T
    shift = float(y.mean(0).square().mean().sqrt())
    excess = float((torch.cov(y.T) - torch.eye(d).to(y)).norm() / math.sqrt(d))
    return {
        "mean_error": Estimate(shift, math.sqrt(1 / n), "estimate", "conditional standard deviations", n),
        "covariance_error": Estimate(excess, math.sqrt((d + 1) / n), "estimate", "ratio", n),
    }


@dataclass(frozen=True)
class InpaintingSettings:
    """Settings of ncsn-inpainting: the Gaussian, the noise levels and the chains."""

    dim: int = 8
    known: int = 4
    correlation: float = 0.9
    first: float = 1.0
    last: float = 0.01
    steps: int = 100
    eps: float = 2e-5
    chains: int = 4096


@experiment("ncsn-inpainting", family="score", precision="float64", smoke={"steps": 10, "chains": 256})
def compare_rules(run: Run, s: InpaintingSettings) -> None:
    """Inpainting a Gaussian by annealed Langevin under two paste rules, against the exact conditional."""
    density = image_like(s.dim, s.known, s.correlation, run.device)
    truth = torch.randn(s.dim, generator=run.stream("truth"), dtype=torch.float64, device=run.device)
    observed = (density.mean + torch.linalg.cholesky(density.covariance) @ truth)[: s.known]
    mean, covariance = density.conditional(observed)
    start = torch.rand(s.chains, s.dim, generator=run.stream("start"), dtype=torch.float64, device=run.device)
    sigmas = geometric_levels(s.first, s.last).tolist()
    at = range(s.known, s.dim)
    curves = {"exact mean": (at, mean.tolist()), "exact sd": (at, covariance.diagonal().sqrt().tolist())}
    for rule in RULES:
        x = inpaint(density, observed, sigmas, s.steps, s.eps, rule, start, run.stream(rule))
        hidden = x[:, s.known :]
        run.measure_all(conditional_errors(hidden, mean, covariance), rule)
        squared = Estimate.mean_of((x[:, : s.known] - observed).square().mean(1), "estimate", "data units")
        rms = math.sqrt(squared.value)
        error = Estimate(rms, squared.stderr / (2 * rms), "estimate", "data units", squared.n)
        run.measure(f"known_part_error:{rule}", error)
        curves |= {f"{rule}: mean": (at, hidden.mean(0).tolist()), f"{rule}: sd": (at, hidden.std(0).tolist())}
    axes = "coordinate", "mean and standard deviation"
    run.curves("completion", "The hidden part given the known one, by paste rule", axes, curves)


@experiment("ncsn-step", family="score", precision="float64", smoke={"chains": 200, "steps": 50})
def step_readings(
    run: Run, *, chains: int = 2000, dim: int = 50, last: float = 0.01, steps: int = 100, eps: float = 2e-5
) -> None:
    """Bias of the last level's Langevin steps with Algorithm 1's step and with the released code's.

    At the last level the noised data are at least sigma_L wide in every direction; across a manifold they are just that
    wide. There alpha = eps = 0.2 sigma_L^2, and a step size of e sigma_L^2 leaves variance sigma_L^2 / (1 - e / 4).
    """
    start = last * torch.randn(chains, dim, generator=run.stream("start"), dtype=torch.float64, device=run.device)
    curves, n = {}, start.numel()
    for reading, factor in STEPS.items():
        chain = ula(lambda x: -x / last**2, start, steps, factor * eps, run.stream(reading), record_every=1)
        assert chain.path is not None
        excess = (chain.path.square().mean((1, 2)) / last**2 - 1).tolist()
        error = Estimate(excess[-1], (1 + excess[-1]) * math.sqrt(2 / n), "estimate", "ratio", n)
        run.measure(f"excess_variance:{reading}", error)
        curves[reading] = range(len(excess)), excess
    levels = {f"closed form, {name}": 1 / (1 - f * eps / (4 * last**2)) - 1 for name, f in STEPS.items()}
    title = "Excess variance at the last level when the same alpha is read in two ways"
    run.curves("step-bias", title, ("steps", "variance over sigma_L^2, minus 1"), curves, levels=levels)
