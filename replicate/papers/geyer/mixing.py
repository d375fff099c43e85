"""Score evaluations that Langevin dynamics, parallel tempering and annealing need to mix two modes or eight."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from replicate.experiments import Experiment, Run, experiment
from replicate.experiments.noise_schedules import geometric_levels
from replicate.experiments.planar import noised
from replicate.metrics.autocorrelation import autocorrelation, autocorrelation_time
from replicate.metrics.samples import mode_weight_error
from replicate.model import Estimate, Kind
from replicate.sampling.annealed import annealed_langevin
from replicate.sampling.langevin import mala, ula
from replicate.sampling.tempering import Rounds, parallel_tempering
from replicate.tasks.densities import GaussianMixture, eight_gaussians, two_gaussians

DENSITIES = {"two-gaussians": two_gaussians, "eight-gaussians": eight_gaussians}
#: states of a path that are kept
KEPT = 1000
#: share of a path that is left out of its autocorrelation time; a trace of the start after that makes it longer
BURN = 0.25
#: a sampler has mixed when the error of the modes' weights first falls below this
MIXED = 0.1
#: shares of the whole budget that the annealed chain is given in turn
BUDGETS = (0.01, 0.03, 0.1, 0.3, 1.0)


@dataclass(frozen=True)
class Settings:
    """Settings on a density of DENSITIES; step sizes and noise levels are relative to its narrowest width.

    Attributes:
        hottest, temperatures: highest temperature and number of temperatures.
        chains, nfe: of each sampler, and the budget of each of them in score evaluations.
        ula_step, mala_step, annealed_step: step sizes; of the annealed chain that of its last level.
        steps: Langevin steps between two exchanges.
    """

    density: str
    hottest: float
    temperatures: int
    chains: int = 400
    nfe: int = 5000
    ula_step: float = 0.2
    mala_step: float = 2.0
    steps: int = 5
    sigma_first: float = 10.0
    sigma_last: float = 0.1
    levels: int = 20
    annealed_step: float = 1.0


class Walk(NamedTuple):
    """The mode of n chains at each recorded state, shape (r, n), the start first.

    Attributes:
        stride: score evaluations between two recorded states.
        extras: further estimates by metric.
    """

    modes: Tensor
    stride: float
    extras: Mapping[str, Estimate]


def start(density: GaussianMixture, n: int, generator: torch.Generator) -> Tensor:
    """Draw n states of the first component, shape (n, D), float64."""
    z = torch.randn(n, density.dim, generator=generator, dtype=torch.float64, device=generator.device)
    return density.means[0].to(z) + z @ density.factor.T.to(z)


def modes_of(density: GaussianMixture, path: Tensor | None) -> Tensor:
    """Return the mode of each state of a recorded path (r, n, D), shape (r, n)."""
    assert path is not None
    return density.mode_of(path.flatten(0, 1)).view(path.shape[:2])


def langevin_walks(run: Run, s: Settings, density: GaussianMixture, x: Tensor) -> dict[str, Walk]:
    """Run ULA and MALA for the whole budget."""
    every, variance = max(1, s.nfe // KEPT), density.narrowest**2
    plain = ula(density.score, x, s.nfe, s.ula_step * variance, run.stream("ula"), record_every=every)
    eps, generator = s.mala_step * variance, run.stream("mala")
    adjusted = mala(density.log_prob, density.score, x, s.nfe, eps, generator, record_every=every)
    assert adjusted.acceptance is not None
    rate = Estimate(adjusted.acceptance, math.nan, "estimate", "probability", s.nfe)
    free = Walk(modes_of(density, plain.path), every, {})
    return {"ula": free, "mala": Walk(modes_of(density, adjusted.path), every, {"acceptance:mala": rate})}


def tempered_walk(run: Run, s: Settings, density: GaussianMixture, x: Tensor) -> Walk:
    """Run parallel tempering for the whole budget; record every round."""
    temperatures = geometric_levels(s.hottest, 1.0, s.temperatures).flip(0)
    stride = len(temperatures) * (s.steps + 1)
    rounds = Rounds(max(2, s.nfe // stride), s.steps, s.mala_step * density.narrowest**2, record_every=1)
    found = parallel_tempering(density.log_prob, density.score, x, temperatures, rounds, run.stream("tempering"))
    lowest = Estimate(float(found.swaps.min()), math.nan, "estimate", "probability", rounds.count * len(x))
    return Walk(modes_of(density, found.coldest.path), stride, {"lowest_exchange_rate:tempering": lowest})


#: score evaluations of a chain, and the error of the modes' weights when they are spent
Errors = tuple[list[float], list[Estimate]]


def annealed_errors(run: Run, s: Settings, density: GaussianMixture, x: Tensor) -> Errors:
    """Return the errors of annealed chains of growing length."""
    sigmas = geometric_levels(s.sigma_first * density.narrowest, s.sigma_last * density.narrowest, s.levels)
    mixtures = {sigma: noised(density, sigma) for sigma in sigmas.tolist()}
    eps = s.annealed_step * float(sigmas[-1]) ** 2

    def score_at(y: Tensor, sigma: Tensor) -> Tensor:
        return mixtures[float(sigma[0])].score(y)

    steps = sorted({max(1, round(share * s.nfe / len(sigmas))) for share in BUDGETS})
    errors = []
    for i, t in enumerate(steps):
        chain = annealed_langevin(score_at, sigmas, x, t, eps, run.stream(f"annealed-{i}"), denoise=False)
        errors.append(mode_weight_error(density.mode_of(chain.samples), density.mode_weights()))
    return [float(t * len(sigmas)) for t in steps], errors


def weight_errors(density: GaussianMixture, walk: Walk) -> Errors:
    """Return the errors over the chains at about 40 times, evenly spaced in the logarithm."""
    last = len(walk.modes) - 1
    times = sorted({max(1, round(last ** (i / 40))) for i in range(41)})
    return [t * walk.stride for t in times], [mode_weight_error(walk.modes[t], density.mode_weights()) for t in times]


def evaluations_to_mix(at: Sequence[float], errors: Sequence[Estimate]) -> Estimate:
    """Return the first of the evaluations `at` whose error is below MIXED, or the last as a lower bound."""
    first = next((a for a, e in zip(at, errors, strict=True) if e.value < MIXED), None)
    kind: Kind = "lower_bound" if first is None else "estimate"
    return Estimate(float(at[-1] if first is None else first), math.nan, kind, "score evaluations", errors[-1].n)


def mixing(run: Run, s: Settings) -> None:
    """Measure every sampler's error of the modes' weights by evaluations, and its autocorrelation time."""
    density = DENSITIES[s.density]()
    x = start(density, s.chains, run.stream("start")).to(run.device)
    walks = {**langevin_walks(run, s, density, x), "tempering": tempered_walk(run, s, density, x)}
    weights = density.mode_weights()
    errors = {name: weight_errors(density, walk) for name, walk in walks.items()}
    errors["annealed"] = annealed_errors(run, s, density, x)
    memory = {}
    for name, walk in walks.items():
        indicators = one_hot(walk.modes[round(BURN * len(walk.modes)) :], len(weights)).double()
        tau = autocorrelation_time(indicators, weights, "recorded states").times(walk.stride, "score evaluations")
        run.measure_all({f"autocorrelation_time:{name}": tau, **walk.extras})
        rho = autocorrelation(indicators, weights)[1:].tolist()
        memory[name] = [k * walk.stride for k in range(1, len(rho) + 1)], rho
    for name, (at, found) in errors.items():
        spent = Estimate.exact(at[-1], "score evaluations")
        mixed = evaluations_to_mix(at, found)
        run.measure_all({"mode_weight_error": found[-1], "nfe_to_mix": mixed, "nfe": spent}, name)
    # half the sum over the modes of the mean size of N(0, w (1 - w) / n)
    noise = 0.5 * float((2 * weights * (1 - weights) / (math.pi * s.chains)).sqrt().sum())
    levels = {"never left": 1 - float(weights[0]), "as many exact draws": noise}
    title = f"{s.density}: error of the modes' weights, all chains started in one mode"
    axes = "score evaluations a chain, all temperatures counted", "total variation of the modes' weights"
    curves = {name: (at, [e.value for e in found]) for name, (at, found) in errors.items()}
    run.curves("weight-error", title, axes, curves, log="xy", levels=levels)
    title = f"{s.density}: autocorrelation of the modes' indicators, true weights as means"
    run.curves("autocorrelation", title, ("lag, score evaluations", "autocorrelation"), memory, log="x")


def from_one_mode(s: Settings) -> Experiment:
    """Declare the experiment on one density."""
    about = f"{s.density}: Langevin, parallel tempering and annealing from one mode, with the exact score"
    declared: dict[str, Any] = {"seeds": 3, "precision": "float64", "smoke": {"chains": 50, "nfe": 600}}
    return experiment(f"mixing-{s.density}", family="score", about=about, settings=s, **declared)(mixing)


TWO, EIGHT = map(from_one_mode, (Settings("two-gaussians", 32.0, 6), Settings("eight-gaussians", 16.0, 4)))
