"""Geyer 1991, "Markov Chain Monte Carlo Maximum Likelihood": chains that do not cross between modes, and what helps.

Two densities whose score is exact, so that only the sampler is at fault: two Gaussians of weights 1/5 and 4/5, 14
standard deviations apart (Song and Ermon 2019), and eight equal Gaussians on a circle, neighbours 6 standard deviations
apart. All chains start in one mode, the first one, from its own law. Samplers:

    ula, mala: Langevin dynamics, unadjusted and adjusted (Roberts and Tweedie 1996).
    tempering: parallel tempering, MALA at temperatures in geometric progression (Swendsen and Wang 1986; Geyer 1991).
    annealed: Langevin dynamics through noise levels (Song and Ermon 2019), another chain for every number of steps.

The currency is the score evaluation, those of all temperatures and noise levels counted. What is measured: the error of
the modes' weights over the chains when a given number is spent, and for the three that have a stationary law the
integrated autocorrelation time of the modes' indicators after the first quarter of the path, with the modes' true
weights as means, so that a chain that stays in its mode cannot look good (`replicate.metrics.autocorrelation`).

Deviations: Geyer's example is a spatial process and has no gradient; his chains are Metropolis-coupled without it. The
annealed chain has no stationary law and so no autocorrelation time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from replicate.experiments.noise_schedules import ladder
from replicate.experiments.planar import noised
from replicate.metrics.autocorrelation import autocorrelation, autocorrelation_time
from replicate.metrics.samples import mode_weight_error
from replicate.model import Estimate
from replicate.resume import State, resumable
from replicate.runs.experiment import Context, Experiment, Line, Outcome, Plot
from replicate.runs.paper import Paper
from replicate.sampling.annealed import annealed_langevin
from replicate.sampling.langevin import mala, ula
from replicate.sampling.tempering import parallel_tempering
from replicate.tasks.densities import GaussianMixture, eight_gaussians, two_gaussians

DENSITIES: Mapping[str, Callable[[], GaussianMixture]] = {
    "two-gaussians": two_gaussians,
    "eight-gaussians": eight_gaussians,
}
#: states of a path that are kept
KEPT = 1000
#: share of a path that is left out of its autocorrelation time; what is left of the start afterwards makes it longer
BURN = 0.25
#: a sampler has mixed when the error of the modes' weights first falls below this
MIXED = 0.1
#: shares of the whole budget that the annealed chain is given in turn
BUDGETS = (0.01, 0.03, 0.1, 0.3, 1.0)


@dataclass(frozen=True)
class Walk:
    """A chain's modes along its path.

    Attributes:
        modes: the mode of each chain at each recorded state, shape (r, n), the start first.
        stride: score evaluations between two recorded states.
        extras: further estimates by metric.
    """

    modes: Tensor
    stride: float
    extras: Mapping[str, Estimate]


def start(density: GaussianMixture, n: int, generator: torch.Generator) -> Tensor:
    """n draws of the first component, shape (n, D), float64."""
    z = torch.randn(n, density.dim, generator=generator, dtype=torch.float64, device=generator.device)
    return density.means[0].to(z) + z @ density.factor.T.to(z)


def modes_of(density: GaussianMixture, path: Tensor) -> Tensor:
    """Mode of each state of a path (r, n, D), shape (r, n)."""
    return density.mode_of(path.flatten(0, 1)).view(path.shape[:2])


def langevin_walks(density: GaussianMixture, x: Tensor, context: Context) -> dict[str, Walk]:
    """ULA and MALA for the whole budget."""
    p, variance = context.params, density.narrowest**2
    every = max(1, p["nfe"] // KEPT)
    unadjusted = ula(
        density.score, x, p["nfe"], p["ula_step"] * variance, context.streams.fresh("ula"), record_every=every
    )
    adjusted = mala(
        density.log_prob,
        density.score,
        x,
        p["nfe"],
        p["mala_step"] * variance,
        context.streams.fresh("mala"),
        record_every=every,
    )
    assert unadjusted.path is not None
    assert adjusted.path is not None
    assert adjusted.acceptance is not None
    rate = Estimate(adjusted.acceptance, math.nan, "estimate", "probability", p["nfe"])
    return {
        "ula": Walk(modes_of(density, unadjusted.path), every, {}),
        "mala": Walk(modes_of(density, adjusted.path), every, {"acceptance:mala": rate}),
    }


def tempered_walk(density: GaussianMixture, x: Tensor, context: Context) -> Walk:
    """Parallel tempering for the whole budget; every round is recorded."""
    p = context.params
    temperatures = ladder(p["hottest"], 1.0, p["temperatures"]).flip(0)
    stride = len(temperatures) * (p["steps"] + 1)
    rounds = max(2, p["nfe"] // stride)
    found = parallel_tempering(
        density.log_prob,
        density.score,
        x,
        temperatures,
        rounds,
        p["steps"],
        p["mala_step"] * density.narrowest**2,
        context.streams.fresh("tempering"),
        record_every=1,
    )
    assert found.coldest.path is not None
    lowest = Estimate(float(found.swaps.min()), math.nan, "estimate", "probability", rounds * len(x))
    return Walk(modes_of(density, found.coldest.path), stride, {"lowest_exchange_rate:tempering": lowest})


def annealed_errors(density: GaussianMixture, x: Tensor, context: Context) -> tuple[list[float], list[Estimate]]:
    """Evaluations and error of the modes' weights of annealed chains of growing length."""
    p = context.params
    sigmas = ladder(p["sigma_first"] * density.narrowest, p["sigma_last"] * density.narrowest, p["levels"])
    mixtures = {float(s): noised(density, float(s)) for s in sigmas}
    steps = sorted({max(1, round(share * p["nfe"] / len(sigmas))) for share in BUDGETS})
    state: State = {"modes": []}
    for i in resumable("annealed chains", len(steps), state):
        chain = annealed_langevin(
            lambda y, sigma: mixtures[float(sigma[0])].score(y),
            sigmas,
            x,
            steps[i],
            p["annealed_step"] * float(sigmas[-1]) ** 2,
            context.streams.fresh(f"annealed-{i}"),
            denoise=False,
        )
        state["modes"].append(density.mode_of(chain.samples))
    spent = [float(s * len(sigmas)) for s in steps]
    return spent, [mode_weight_error(m, density.mode_weights()) for m in state["modes"]]


def weight_errors(density: GaussianMixture, walk: Walk) -> tuple[list[float], list[Estimate]]:
    """Evaluations and error of the modes' weights over the chains, at about 40 times evenly spaced in the logarithm."""
    last = len(walk.modes) - 1
    times = sorted({max(1, round(last ** (i / 40))) for i in range(41)})
    return [t * walk.stride for t in times], [mode_weight_error(walk.modes[t], density.mode_weights()) for t in times]


def evaluations_to_mix(at: Sequence[float], errors: Sequence[Estimate]) -> Estimate:
    """The first of the evaluations `at` whose error is below MIXED; the last, as a lower bound, where none is."""
    first = next((a for a, e in zip(at, errors, strict=True) if e.value < MIXED), None)
    if first is None:
        return Estimate(float(at[-1]), math.nan, "lower_bound", "score evaluations", errors[-1].n)
    return Estimate(float(first), math.nan, "estimate", "score evaluations", errors[-1].n)


def mixing(context: Context) -> Outcome:
    """Error of the modes' weights against evaluations, and autocorrelation times, of every sampler."""
    p, density = context.params, DENSITIES[context.params["density"]]()
    x = start(density, p["chains"], context.streams.fresh("start")).to(context.device)
    walks = {**langevin_walks(density, x, context), "tempering": tempered_walk(density, x, context)}
    weights = density.mode_weights()
    curves = {name: weight_errors(density, walk) for name, walk in walks.items()}
    curves["annealed"] = annealed_errors(density, x, context)
    estimates: dict[str, Estimate] = {}
    memory = []
    for name, walk in walks.items():
        indicators = one_hot(walk.modes[round(BURN * len(walk.modes)) :], len(weights)).double()
        tau = autocorrelation_time(indicators, weights, "recorded states").times(walk.stride, "score evaluations")
        estimates |= {f"autocorrelation_time:{name}": tau, **walk.extras}
        rho = autocorrelation(indicators, weights)
        memory.append(Line(name, [k * walk.stride for k in range(1, len(rho))], rho[1:].tolist()))
    for name, (at, errors) in curves.items():
        estimates[f"mode_weight_error:{name}"] = errors[-1]
        estimates[f"nfe_to_mix:{name}"] = evaluations_to_mix(at, errors)
        estimates[f"nfe:{name}"] = Estimate.exact(at[-1], "score evaluations")
    lines = [Line(name, at, [e.value for e in errors]) for name, (at, errors) in curves.items()]
    return Outcome(
        estimates, (weight_plot(p["density"], lines, weights, p["chains"]), memory_plot(p["density"], memory))
    )


def weight_plot(density: str, lines: Sequence[Line], weights: Tensor, chains: int) -> Plot:
    """Error of the modes' weights against evaluations, with what no mixing and what exact draws show."""
    stuck = 1 - float(weights[0])
    # half the sum over the modes of the mean size of N(0, w (1 - w) / n)
    noise = 0.5 * float((2 * weights * (1 - weights) / (math.pi * chains)).sqrt().sum())
    return Plot(
        "weight-error",
        f"{density}: error of the modes' weights, all chains started in one mode",
        "score evaluations a chain, all temperatures counted",
        "total variation of the modes' weights",
        tuple(lines),
        log_x=True,
        log_y=True,
        levels={"never left": stuck, "as many exact draws": noise},
    )


def memory_plot(density: str, lines: Sequence[Line]) -> Plot:
    """Autocorrelation of the modes' indicators, whose sum is the integrated time."""
    return Plot(
        "autocorrelation",
        f"{density}: autocorrelation of the modes' indicators, true weights as means",
        "lag, score evaluations",
        "autocorrelation",
        tuple(lines),
        log_x=True,
    )


def mixing_experiment(density: str, **settings: Any) -> Experiment:
    """The comparison on one density."""
    return Experiment(
        name=f"mixing-{density}",
        about=f"{density}: Langevin, parallel tempering and annealing from one mode, with the exact score",
        family="score",
        run=mixing,
        params={
            "density": density,
            "chains": 400,
            "nfe": 5000,
            "ula_step": 0.2,
            "mala_step": 2.0,
            "steps": 5,
            "sigma_last": 0.1,
            "levels": 20,
            "annealed_step": 1.0,
            **settings,
        },
        seeds=3,
        overrides={"smoke": {"chains": 50, "nfe": 600}},
        precision="float64",
    )


TWO = mixing_experiment("two-gaussians", hottest=32.0, temperatures=6, sigma_first=10.0)
EIGHT = mixing_experiment("eight-gaussians", hottest=16.0, temperatures=4, sigma_first=10.0)

PAPER = Paper("geyer", Path(__file__).with_suffix(".toml"), experiments=(TWO, EIGHT))
