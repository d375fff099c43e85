"""One energy on two densities of the plane, by every method, against the truth by quadrature."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from replicate.energies.model import EnergyNet, TrainedEnergy
from replicate.energies.objectives import EnergyFunction, NoiseContrastive, Objective
from replicate.experiments import Run, experiment
from replicate.experiments.planar import BOX, model_kl, steady_state
from replicate.likelihood.quadrature import grid, log_z
from replicate.metrics.divergences import fisher_divergence
from replicate.metrics.samples import w2
from replicate.model import DataInfo, Estimate
from replicate.papers.song_kingma.methods import VARIANTS, Curve, Settings, draw_curves, objective_of, report, train
from replicate.resume import State, resumable
from replicate.sampling.langevin import ula
from replicate.tasks.densities import GaussianMixture, two_gaussians

#: grid points per axis of a learning curve; the final divergence has its own, finer ones
CURVE_POINTS = 64
#: points of a panel
PANEL = 300


@dataclass(frozen=True, kw_only=True)
class PlaneSettings(Settings):
    """Settings of the comparison in the plane, chosen on seeds that are not judged."""

    density: str = "crescent"
    hidden: int = 64
    layers: int = 3
    waves: float = 1.0
    langevin_steps: int = 200
    langevin_step: float = 0.01
    samples: int = 500
    grid: int = 200


def crescent() -> GaussianMixture:
    """Return an arc of radius 1.5 and standard deviation 0.25 over 288 degrees, its weight growing sevenfold.

    Its three thirds are its modes, which shows the weight that a model gives to each.
    """
    place = torch.linspace(-1, 1, 60, dtype=torch.float64)
    angle = 0.8 * math.pi * place
    means = 1.5 * torch.stack([angle.cos(), angle.sin()], 1)
    thirds = (1.5 * (place + 1)).long().clamp(max=2)
    return GaussianMixture(means, 0.25**2 * torch.eye(2, dtype=torch.float64), 1 + 0.75 * place, thirds)


def far_gaussians() -> GaussianMixture:
    """Return the suite's two Gaussians at a fifth of their size: weights 1/5 and 4/5, standard deviation 1/5."""
    original = two_gaussians()
    return GaussianMixture(original.means / 5, original.covariance / 25, original.weights)


DENSITIES: dict[str, Callable[[], GaussianMixture]] = {"crescent": crescent, "two-gaussians": far_gaussians}


def mode_masses(density: GaussianMixture, log_p: Callable[[Tensor], Tensor], points: int, device: str) -> Tensor:
    """Return the shares of exp(log_p) in the regions of the density's modes by the midpoint rule, (M,), float64."""
    nodes = grid(BOX, points, 2)[0].to(device)
    with torch.no_grad():
        share = log_p(nodes).double().softmax(0)
    masses = torch.zeros(len(density.mode_weights()), dtype=torch.float64, device=device)
    return masses.index_add_(0, density.mode_of(nodes), share).cpu()


def mode_error(density: GaussianMixture, energy: EnergyFunction, points: int, device: str) -> Estimate:
    """Return half the L1 distance between energy and density, each as masses of the regions of the density's modes."""
    true, found = (mode_masses(density, f, points, device) for f in (density.log_prob, lambda x: -energy(x)))
    return Estimate(float((true - found).abs().sum() / 2), 0.0, "estimate", "probability", points**2)


def evaluations(objective: Objective, energy: EnergyFunction, batch: Tensor) -> float:
    """Count the energy evaluations of one update per example of its batch (n, D); the objective stays as it is."""
    state: State = {"points": 0}

    def counted(x: Tensor) -> Tensor:
        state["points"] += len(x)
        return energy(x)

    for _ in resumable("counting evaluations", 1, state):  # one step: the chains inside it are not loops of their own
        copy.deepcopy(objective).loss(counted, batch, torch.Generator(batch.device).manual_seed(0))
    return state["points"] / len(batch)


def study(variant: str, run: Run, s: PlaneSettings, density: GaussianMixture, data: Tensor) -> tuple[Curve, Tensor]:
    """Train by one method and measure its energy against the truth; return its learning curve and its samples."""
    device = str(run.device)
    with run.initialisation():  # the network comes first, so that all methods begin at the same weights
        network = EnergyNet(2, s.hidden, s.layers, s.waves)
        model = TrainedEnergy(network, objective_of(variant, 2, s), DataInfo(2, "continuous")).to(run.device)

    def coarse() -> float:
        return model_kl(density, model.energy, CURVE_POINTS, device).value

    curve, seconds = train(variant, model, data, s, run, coarse)
    test = density.sample(s.test_examples, run.stream("test")).to(run.device)
    reference = density.sample(s.samples, run.stream("reference")).to(run.device)
    samples = steady_state(model.energy, s.samples, s.grid, run.stream("steady"))
    generator = run.stream("langevin")
    start = model.base_sample(s.samples, generator)
    chains = ula(model.score, start, s.langevin_steps, s.langevin_step, generator).samples
    cost = evaluations(model.objective, model.energy, data[: s.batch])
    estimates = {
        "kl": model_kl(density, model.energy, s.grid, device),
        "fisher_divergence": fisher_divergence(model.score(test).detach(), density.score(test)),
        "mode_weight_error": mode_error(density, model.energy, s.grid, device),
        "w2": w2(samples, reference),
        "w2_langevin": w2(chains, reference),
        "time_seconds": seconds,
        "evaluations": Estimate.exact(cost, "energy evaluations per example and update"),
    }
    if isinstance(model.objective, NoiseContrastive):
        true = log_z(lambda x: -model.energy(x), BOX, s.grid, device=device)
        error = abs(float(model.objective.log_z.detach()) - true.value)
        estimates["log_z_error"] = Estimate(error, true.stderr, "estimate", "nats", 1)
    report(run, estimates, variant)
    return curve, samples


def compare(run: Run, s: PlaneSettings) -> None:
    """Measure every method on one density."""
    density = DENSITIES[s.density]()
    data = density.sample(s.examples, run.stream("data")).to(run.device)
    again, other = (density.sample(s.samples, run.stream(name)) for name in ("reference", "second reference"))
    report(run, {"w2": w2(other, again)}, "truth")
    found = {variant: study(variant, run, s, density, data) for variant in VARIANTS}
    clouds = {"data": data[:PANEL]} | {name: samples[:PANEL] for name, (_, samples) in found.items()}
    run.scatter("samples", "draws from each energy, by inversion", clouds, ("x", "y"))
    curves = {name: curve for name, (curve, _) in found.items()}
    draw_curves(run, "one energy, every method", "KL(truth || model), nats", curves)


SMOKE = {"examples": 500, "updates": 3, "batch": 32, "hidden": 8, "pcd_k": 2, "short_run_k": 2, "flow_steps": 2}
SMOKE |= {"langevin_steps": 5, "samples": 50, "test_examples": 100, "grid": 60}
_PLANE = "one energy of a crescent trained by every method, against the truth by quadrature"
_MODES = "the same on two Gaussians far apart: which methods see the weights of modes"
_FAR = PlaneSettings(density="two-gaussians", updates=200)
PLANE = experiment("energies-plane", about=_PLANE, family="ebm", seeds=3, smoke=SMOKE)(compare)
MODES = experiment("energies-modes", about=_MODES, family="ebm", settings=_FAR, seeds=3, smoke=SMOKE)(compare)
