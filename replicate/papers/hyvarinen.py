"""Hyvarinen 2005, "Estimation of Non-Normalized Statistical Models by Score Matching", JMLR 6.

Replicated: the partial integration that turns the explicit objective (eq. 2) into the implicit one (eq. 4), with the
expectations by quadrature; the Gaussian example (sec. 3.1), where the score matching estimator is the maximum
likelihood estimator; and what the method rests on: the score, and with it the objective and every Langevin chain, do
not see the normalising constant, while the likelihood does.

Deviations: the paper solves the Gaussian example on paper, here the objective is minimised numerically through the
suite's own loss, on data that are not Gaussian (the identity holds for any sample). The models of the last experiment
are the suite's, briefly trained; Langevin dynamics is no part of the paper.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from replicate.experiments.planar import networks
from replicate.likelihood.quadrature import grid, log_z
from replicate.model import Estimate, Model
from replicate.runs.execute import run
from replicate.runs.experiment import Context, Experiment, Outcome
from replicate.runs.paper import Paper
from replicate.runs.spec import make_spec
from replicate.sampling.langevin import ula
from replicate.score_based.matching import Score, explicit_score_matching, implicit_score_matching
from replicate.score_based.networks import score_of
from replicate.tasks.densities import GaussianMixture

# -- sec. 3.1: on a Gaussian model, score matching is maximum likelihood


def skewed_sample(n: int, dim: int, context: Context) -> Tensor:
    """n correlated, skewed observations (n, dim) in float64: a random linear map of centred exponentials."""
    generator = context.streams.fresh("data")

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64, device=generator.device)

    uniform = torch.rand(n, dim, generator=generator, dtype=torch.float64, device=generator.device)
    mixing = torch.eye(dim, dtype=torch.float64, device=generator.device) + 0.3 * normal(dim, dim)
    return (-torch.log1p(-uniform) - 1) @ mixing.T + normal(dim)


def minimise_score_matching(x: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """The Gaussian's mean (D,) and symmetric precision (D, D) that minimise the implicit objective on x (n, D)."""
    mean = torch.zeros(x.shape[1], dtype=x.dtype, device=x.device, requires_grad=True)
    half = (0.5 * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)).requires_grad_(True)
    optimizer = torch.optim.LBFGS(
        [mean, half],
        max_iter=iterations,
        tolerance_grad=1e-13,
        tolerance_change=0.0,
        history_size=50,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = implicit_score_matching(lambda y: -(y - mean) @ (half + half.T), x).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    return mean.detach(), (half + half.T).detach()


def check_gaussian(context: Context) -> Outcome:
    """The score matching estimate against the sample mean and the sample covariance (divided by n)."""
    x = skewed_sample(context.params["examples"], context.params["dim"], context)
    mean, precision = minimise_score_matching(x, context.params["iterations"])
    centred = x - x.mean(0)
    covariance = centred.T @ centred / len(x)
    scale = covariance.diagonal().sqrt()
    error_of_mean = ((mean - x.mean(0)) / scale).abs().max()
    error_of_covariance = ((precision.inverse() - covariance) / torch.outer(scale, scale)).abs().max()
    return Outcome(
        {
            "mean_error": Estimate.exact(error_of_mean, "standard deviations", len(x)),
            "covariance_error": Estimate.exact(error_of_covariance, "correlation", len(x)),
        }
    )


# -- theorem 1: the explicit and the implicit objective differ by a constant


def overlapping_mixture() -> GaussianMixture:
    """Three overlapping correlated Gaussians in the plane: smooth, skewed, and with a known score."""
    means = torch.tensor([[-1.5, -0.5], [1.0, 1.5], [1.2, -1.4]], dtype=torch.float64)
    covariance = torch.tensor([[0.6, 0.25], [0.25, 0.5]], dtype=torch.float64)
    return GaussianMixture(means, covariance, torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64))


def check_objective(context: Context) -> Outcome:
    """J_explicit - J_implicit of three networks against E|grad log p|^2 / 2, by the midpoint rule."""
    density = overlapping_mixture()
    # 10 standard deviations: the box leaves out a mass below 1e-22
    half_width = float(density.means.abs().max() + 10 * density.covariance.diagonal().max().sqrt())
    nodes, log_cell = grid(half_width, context.params["cells"], 2, torch.float64)
    nodes = nodes.to(context.device)
    mass = (density.log_prob(nodes) + log_cell).exp()
    constant = 0.5 * float(density.score(nodes).square().sum(1) @ mass)
    gaps, objectives = [], []
    for network in networks(context).values():
        explicit = float(explicit_score_matching(network, density.score, nodes).detach() @ mass)
        implicit = float(implicit_score_matching(network, nodes).detach() @ mass)
        gaps.append(explicit - implicit)
        objectives.append(explicit)
    n = len(gaps)
    unit = "squared score"
    return Outcome(
        {
            "gap_spread": Estimate.exact(max(gaps) - min(gaps), unit, n),
            "gap_error": Estimate.exact(max(abs(g - constant) for g in gaps), unit, n),
            "constant": Estimate.exact(constant, unit, len(nodes)),
            "objective_range": Estimate.exact(max(objectives) - min(objectives), unit, n),
        }
    )


# -- sec. 1 and 2: the normalising constant drops out


class Rescaled(Model):
    """A model with another unnormalised density, exp(-f) -> exp(-rescale(f)), and its score by differentiation."""

    family = "ebm"
    capabilities = frozenset({"energy", "score"})

    def __init__(self, inner: Model, rescale: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.rescale = inner, rescale

    def energy(self, x: Tensor) -> Tensor:
        return self.rescale(self.inner.energy(x))


def _relative(change: Tensor, reference: Tensor) -> float:
    return float((change - reference).abs().max() / reference.abs().max())


def check_normaliser(context: Context) -> Outcome:
    """What changes when a constant is added to the energy, or the unnormalised density multiplied by one."""
    p = context.params
    # exp and log of the density itself, so that the factor goes through the arithmetic and not only through algebra
    rescalings: dict[str, Callable[[Tensor], Tensor]] = {
        "shift": lambda f: f + p["shift"],
        "factor": lambda f: -(p["factor"] * (-f).exp()).log(),
    }
    moves = {"shift": -p["shift"], "factor": math.log(p["factor"])}
    worst = dict.fromkeys(("score", "objective", "samples", "normalised"), 0.0)
    log_normaliser = 0.0
    for name in ("dsm-energy", "neural-ebm"):
        settings = {"steps": p["steps"], "validate_every": 0}
        spec = make_spec(name, "two-gaussians", context.streams.seed, device=context.device.type, settings=settings)
        trained, task, _, _ = run(spec, context.device)
        trained = trained.double().eval()
        x = task.test[: p["points"]].double().to(context.device)
        before = _observe(trained, x, trained.score, context)
        for kind, rescale in rescalings.items():
            model = Rescaled(trained, rescale)
            after = _observe(model, x, model.score, context)
            for what in ("score", "objective", "samples"):
                worst[what] = max(worst[what], _relative(after[what], before[what]))
            shift = after["unnormalised"] - before["unnormalised"]
            log_shift = float(after["log_z"] - before["log_z"])
            worst["normalised"] = max(worst["normalised"], float((shift - log_shift).abs().max()))
            log_normaliser = max(log_normaliser, abs(log_shift - moves[kind]))
    count = 2 * len(rescalings)
    estimates = {f"change:{k}": Estimate.exact(v, "ratio", count) for k, v in worst.items() if k != "normalised"}
    estimates["change:normalised"] = Estimate.exact(worst["normalised"], "nats", count)
    estimates["log_z_error"] = Estimate.exact(log_normaliser, "nats", count)
    return Outcome(estimates)


def _observe(model: Model, x: Tensor, score: Score, context: Context) -> dict[str, Tensor]:
    """Score (n, D), implicit objective (n,), chain ends (n, D), -f (n,) and log Z by quadrature, at x (n, D)."""
    p = context.params
    chain = ula(score, x, p["langevin_steps"], p["langevin_step"], context.streams.fresh("langevin"))
    normaliser = log_z(
        lambda y: -model.energy(y), p["half_width"], p["cells"], 2, torch.float64, device=context.device.type
    )
    return {
        "score": score(x).detach(),
        "objective": implicit_score_matching(score_of(model.energy), x).detach(),
        "samples": chain.samples,
        "unnormalised": -model.energy(x).detach(),
        "log_z": torch.tensor(normaliser.value, dtype=torch.float64),
    }


GAUSSIAN = Experiment(
    name="hyvarinen-gaussian",
    about="score matching on a Gaussian model against its maximum likelihood estimate",
    family="score",
    run=check_gaussian,
    params={"examples": 400, "dim": 5, "iterations": 500},
    seeds=5,
    precision="float64",
)

OBJECTIVE = Experiment(
    name="hyvarinen-objective",
    about="explicit minus implicit score matching, for several networks, by quadrature",
    family="score",
    run=check_objective,
    params={"cells": 160, "hidden": 32, "depth": 2},
    seeds=3,
    precision="float64",
)

NORMALISER = Experiment(
    name="hyvarinen-normaliser",
    about="scores, objectives and Langevin chains of energy models under another normalising constant",
    family="score",
    run=check_normaliser,
    params={
        "steps": 100,
        "points": 500,
        "shift": 37.5,
        "factor": 1e-3,
        "langevin_steps": 200,
        "langevin_step": 0.01,
        "half_width": 20.0,
        "cells": 100,
    },
    overrides={"smoke": {"steps": 10, "points": 100, "langevin_steps": 20}},
    seeds=3,
    tasks=("two-gaussians",),
    precision="float64",
)

PAPER = Paper("hyvarinen", Path(__file__).with_suffix(".toml"), experiments=(GAUSSIAN, OBJECTIVE, NORMALISER))
