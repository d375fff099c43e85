"""The toy chains of Song and Ermon 2019 (arXiv:1907.05600): Langevin dynamics, plain and annealed, with exact scores.

The target is 1/5 N((-5, -5), I) + 4/5 N((5, 5), I), the start U[-8, 8]^2. The chains are printed, and coded, as
x <- x + (eps / 2) s + sqrt(eps) z, which is the suite's convention at T = 1.

Deviations: none in the setup. The main text (sec 4.3) leaves T and eps of the annealed chain open; `READINGS` lists
what is run in their place.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.integrate import trapezoid
from scipy.stats import norm
from torch import Tensor

from replicate.experiments.noise_schedules import ladder
from replicate.model import Estimate
from replicate.runs.experiment import Context, Experiment, Line, Outcome, Plot
from replicate.sampling.annealed import annealed_langevin
from replicate.sampling.langevin import ula
from replicate.tasks.densities import GaussianMixture, two_gaussians

#: chains start in the square [-BOX, BOX]^2
BOX = 8.0
#: a chain belongs to a mode within this distance of its mean; just under half the distance of the two
REACH = 7.0


def uniform_start(n: int, context: Context) -> Tensor:
    """Starting states U[-8, 8]^2, shape (n, 2), float64."""
    generator = context.streams.fresh("start")
    return BOX * (2 * torch.rand(n, 2, generator=generator, dtype=torch.float64, device=context.device) - 1)


# -- sec 3.2.2: plain Langevin dynamics


def share_near(x: Tensor, mode: int) -> Estimate:
    """Share of the states (n, 2) within REACH of a mode's mean: 0 is the minority mode. Not finite counts as no."""
    distance = (x - two_gaussians().means[mode].to(x)).norm(dim=1)
    return Estimate.mean_of((distance < REACH).double(), "estimate", "probability")


def cloud(label: str, x: Tensor, limit: float = 100.0, count: int = 400) -> Line:
    """The first states (n, 2) as points of a plot, those that left the picture dropped."""
    seen = x[:count][x[:count].abs().amax(1) < limit].cpu()  # false for nan
    return Line(label, seen[:, 0].tolist(), seen[:, 1].tolist())


def pair_score(density: GaussianMixture, device: torch.device) -> Callable[[Tensor], Tensor]:
    """The score of w N(-m, I) + (1 - w) N(m, I), m tanh(m'x + log((1 - w) / w) / 2) - x, in few operations.

    The same as `density.score` for the toy mixture, three times faster: the long chain takes 100,000 steps.
    """
    m = density.means[1].to(device)
    offset = 0.5 * float((density.weights[1] / density.weights[0]).log())
    return lambda x: torch.outer(torch.tanh(x @ m + offset), m) - x


def langevin(context: Context) -> Outcome:
    """N2: unadjusted Langevin with the exact score; the minority weight after T steps and after far more."""
    p, streams = context.params, context.streams
    density = two_gaussians()
    start = uniform_start(p["chains"], context)
    every = p["steps"]
    chain = ula(
        pair_score(density, context.device),
        start,
        p["long_steps"],
        p["eps"],
        streams.fresh("chains"),
        record_every=every,
    )
    assert chain.path is not None
    weights = [share_near(x, 0) for x in chain.path]
    estimates = {"minority_weight:printed": weights[1], "minority_weight:long": share_near(chain.samples, 0)}
    curve = Line("Langevin dynamics", [i * every for i in range(1, len(weights))], [w.value for w in weights[1:]])
    exact = density.sample(p["chains"], streams.fresh("exact")).to(start)
    plots = (
        Plot(
            "minority-weight",
            "Langevin dynamics keeps the weights that the start gave it",
            "steps",
            "share of the chains in the minority mode",
            (curve,),
            levels={"true weight": 0.2},
        ),
        Plot(
            "samples",
            "Fig 3(a) and (b): samples, and Langevin dynamics after T steps",
            "x1",
            "x2",
            (cloud("exact", exact), cloud("Langevin", chain.path[1])),
            style="points",
        ),
    )
    return Outcome(estimates, plots)


def mean_passage_time(half_distance: float, minority: float) -> float:
    """Mean time that dX = (1/2) (log p)' dt + dB takes from the minority mode to the other, by quadrature.

    p = w N(-h, 1) + (1 - w) N(h, 1). From a to b it is 2 int_a^b 1/p(y) int_{-inf}^y p(z) dz dy (Gardiner, Handbook of
    Stochastic Methods, sec 5.2.7). In the plane the coordinate along the axis moves on its own, so this holds there.

    Args:
        half_distance: h, in standard deviations.
        minority: w.
    """
    y = np.linspace(-half_distance, half_distance, 40_001)
    p, below = (minority * f(y + half_distance) + (1 - minority) * f(y - half_distance) for f in (norm.pdf, norm.cdf))
    return 2 * float(trapezoid(below / p, y))


def passage(context: Context) -> Outcome:
    """N2 explained: steps of size eps until a chain of the minority mode is expected in the other."""
    density = two_gaussians()
    half = float((density.means[1] - density.means[0]).norm()) / 2
    shorter = np.linspace(1.0, half, 25).tolist()
    minority = float(density.weights[0])
    steps = [mean_passage_time(h, minority) / context.params["eps"] for h in shorter]
    plot = Plot(
        "passage-time",
        "Expected steps from the minority mode to the other",
        "distance of the modes, standard deviations",
        "steps",
        (Line("mean passage time", [2 * h for h in shorter], steps),),
        log_y=True,
        levels={"printed T": 1e3, "100 times longer": 1e5},
    )
    measured = Estimate.exact(math.log10(steps[-1]), "decades of steps")
    return Outcome({"log10_passage_steps": measured}, (plot,))


# -- sec 4.3: annealed Langevin dynamics


@dataclass(frozen=True)
class Reading:
    """One way to read the annealed chain's settings: alpha_i = eps (sigma_i / sigma_L)^2 (Algorithm 1).

    Attributes:
        name: in the metrics' names.
        first, last: sigma_1 and sigma_L.
        eps: the step size at the last level.
        steps: T, Langevin steps a level.
        meanings: of sigma, keys of MEANINGS.
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


def noised(variance: float) -> GaussianMixture:
    """The toy mixture with components of another variance."""
    clean = two_gaussians()
    return GaussianMixture(clean.means, variance * clean.covariance, clean.weights)


def annealed_chain(reading: Reading, meaning: str, start: Tensor, generator: torch.Generator, steps: int = 0) -> Tensor:
    """Last states (n, 2) of the annealed chain from `start`; `steps` above 0 replaces T."""
    sigmas = ladder(reading.first, reading.last)
    mixtures = {float(s): noised(MEANINGS[meaning](float(s))) for s in sigmas}

    def score_at(x: Tensor, sigma: Tensor) -> Tensor:
        return mixtures[float(sigma[0])].score(x)

    chain = annealed_langevin(score_at, sigmas, start, steps or reading.steps, reading.eps, generator, denoise=False)
    return chain.samples


def spread(x: Tensor) -> Estimate:
    """Standard deviation of a coordinate about its mode's mean, over the states (n, 2) within REACH of a mode."""
    residuals = torch.cat([x - mean for mean in two_gaussians().means.to(x)])
    inside = residuals[residuals.norm(dim=1) < REACH]
    if not len(inside):
        return Estimate(math.nan, math.nan, "estimate", "data units", 1)
    sd = float(inside.square().mean().sqrt())
    return Estimate(sd, sd / math.sqrt(2 * inside.numel()), "estimate", "data units", inside.numel())


def annealed(context: Context) -> Outcome:
    """N3 and N4: the minority weight, the width of the modes and the chains that were lost, by reading and meaning."""
    p, streams = context.params, context.streams
    start = uniform_start(p["chains"], context)
    estimates: dict[str, Estimate] = {}
    missing: dict[str, str] = {}
    clouds = []
    for reading in READINGS:
        for meaning in reading.meanings:
            variant = f"{reading.name}-{meaning}"
            x = annealed_chain(reading, meaning, start, streams.fresh(variant), p["steps"])
            minority, majority = share_near(x, 0), share_near(x, 1)
            estimates[f"minority_weight:{variant}"] = minority
            estimates[f"kept_share:{variant}"] = Estimate(
                minority.value + majority.value, math.nan, "estimate", "probability", len(x)
            )
            width = spread(x)
            if math.isnan(width.value):
                missing[f"mode_spread:{variant}"] = "no chain ended near a mode"
            else:
                estimates[f"mode_spread:{variant}"] = width
                clouds.append(cloud(variant, x))
    shown = [c for c in clouds if c.label.startswith(("text-scaled", "appendix"))]
    plot = Plot(
        "annealed-samples",
        "Fig 3(c): annealed Langevin dynamics, by levels and meaning of sigma",
        "x1",
        "x2",
        tuple(shown),
        style="points",
    )
    return Outcome(estimates, (plot,) if shown else (), missing)


LANGEVIN = Experiment(
    name="ncsn-langevin",
    about="Langevin dynamics with the exact score of two separated modes, T = 1000 and 100 times longer",
    family="score",
    run=langevin,
    params={"chains": 1280, "steps": 1000, "long_steps": 100_000, "eps": 0.1},
    seeds=3,
    overrides={"smoke": {"chains": 128, "steps": 100, "long_steps": 300}},
    precision="float64",
)

PASSAGE = Experiment(
    name="ncsn-passage",
    about="mean passage time between the two modes, by quadrature",
    family="score",
    run=passage,
    params={"eps": 0.1},
    seeds=1,
    precision="float64",
)

ANNEALED = Experiment(
    name="ncsn-annealed",
    about="annealed Langevin on two separated modes: levels of the text and of the appendix, two meanings of sigma",
    family="score",
    run=annealed,
    params={"chains": 1280, "steps": 0},
    overrides={"smoke": {"chains": 128, "steps": 10}},
    profiles=("smoke", "standard"),
    precision="float64",
)
