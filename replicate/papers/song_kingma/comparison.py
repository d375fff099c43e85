"""One energy in the plane and linear ICA by every method: with the same optimizer, batches and number of updates.

In the plane the truth is by quadrature; ICA, in whitened coordinates, is scored by the exact likelihood of fresh
examples.
"""

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from replicate.energies.model import EnergyNet, TrainedEnergy, build_objective
from replicate.energies.objectives import EnergyFunction, MaximumLikelihood, NoiseContrastive, Objective
from replicate.experiments import Run, experiment
from replicate.experiments.ica import SOURCE_STD, Ica, draw_unmixing, rotation, whitening
from replicate.experiments.planar import BOX, model_kl, steady_state
from replicate.likelihood.quadrature import grid, log_z
from replicate.metrics.divergences import fisher_divergence
from replicate.metrics.samples import w2
from replicate.model import DataInfo, Estimate, Model, Training
from replicate.resume import State, resumable
from replicate.runs.training import Batches, learning_rate, make_optimizer, swap
from replicate.sampling.langevin import ula
from replicate.tasks.densities import GaussianMixture, two_gaussians

#: methods of the comparison
VARIANTS = ("ml", "cd-1", "cd-5", "pcd", "pcd-jump", "short-run", "ism", "dsm", "ssm", "nce", "cnce", "ksd", "flow-nce")
#: points of a learning curve
STOPS = 10

Curve = Sequence[tuple[int, float]]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Data, optimizer and the methods' own settings, as `build_objective` explains them; defaults are the plane's."""

    examples: int = 20_000
    test_examples: int = 5000
    updates: int = 400
    batch: int = 256
    lr: float = 1e-2
    move_step: float = 0.05
    pcd_k: int = 5
    jump_k: int = 2
    short_run_k: int = 10
    short_run_step: float = 0.02
    sigma: float = 0.05
    contrast: float = 0.5
    ratio: int = 2
    bandwidth: float = 0.03
    flow_couplings: int = 4
    flow_steps: int = 200


def objective_of(variant: str, dim: int, s: Settings) -> Objective:
    """Build the objective of a method, with its own settings."""
    names = ("sigma", "contrast", "ratio", "bandwidth", "flow_couplings", "flow_steps")
    own: dict[str, Any] = {name: getattr(s, name) for name in names}
    if variant == "short-run":
        own |= {"k": s.short_run_k, "move_step": s.short_run_step, "adjusted": False}
    else:
        k = {"cd-5": 5, "pcd": s.pcd_k, "pcd-jump": s.jump_k}.get(variant, 1)
        own |= {"k": k, "move_step": s.move_step, "chains": s.batch, "jumps": variant == "pcd-jump"}
    name = {"cd-1": "cd", "cd-5": "cd", "pcd-jump": "pcd"}.get(variant, variant)
    return build_objective(name, dim, **own)


def train(
    name: str, model: Model, data: Tensor, s: Settings, run: Run, value: Callable[[], float]
) -> tuple[Curve, Estimate]:
    """Train on data (N, D), in batches that all methods share; leave the moving average of the weights in the model.

    Returns:
        (curve of `STOPS` pairs of updates and the average's value, seconds of preparation and updates).
    """
    begin = time.perf_counter()
    model.initialise(data, run.stream(f"prepare-{name}"))
    prepared = time.perf_counter() - begin
    settings = Training(s.updates, s.batch, s.lr, betas=(0.9, 0.99), ema=0.99)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer, generator = make_optimizer(parameters, settings), run.stream(f"noise-{name}")
    batches = Batches(len(data), s.batch, run.stream("batches"))
    state: State = {"model": model, "optimizer": optimizer, "batches": batches, "generator": generator}
    state |= {"average": [p.detach().clone() for p in parameters], "curve": [], "seconds": 0.0}
    for t in resumable(f"training by {name}", s.updates, state):
        begin = time.perf_counter()
        optimizer.param_groups[0]["lr"] = learning_rate(t, settings)
        optimizer.zero_grad(set_to_none=True)
        model.loss(data[batches.draw()], generator).backward()
        optimizer.step()
        torch._foreach_lerp_(state["average"], [p.data for p in parameters], 1 - min(settings.ema, (1 + t) / (10 + t)))
        state["seconds"] += time.perf_counter() - begin
        if (t + 1) % max(1, s.updates // STOPS) == 0:
            swap(parameters, state["average"])
            state["curve"].append((t + 1, value()))
            swap(parameters, state["average"])
    swap(parameters, state["average"])
    return state["curve"], Estimate(prepared + state["seconds"], math.nan, "estimate", "seconds", 1)


def report(run: Run, estimates: Mapping[str, Estimate], variant: str) -> None:
    """Measure a method; omit the numbers that its divergence left infinite."""
    for metric, estimate in estimates.items():
        if math.isfinite(estimate.value):
            run.measure(f"{metric}:{variant}", estimate)
        else:
            run.omit(f"{metric}:{variant}", f"the training diverged: it is {estimate.value}")


def draw_curves(run: Run, title: str, y_label: str, curves: Mapping[str, Curve]) -> None:
    """Draw learning curves on a logarithmic axis, cut below at 1e-5."""
    lines = {name: ([t for t, _ in curve], [max(v, 1e-5) for _, v in curve]) for name, curve in curves.items()}
    run.curves("curves", title, ("updates", y_label), lines, log="y")


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


def study_plane(
    variant: str, run: Run, s: PlaneSettings, density: GaussianMixture, data: Tensor
) -> tuple[Curve, Tensor]:
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
    samples, generator = steady_state(model.energy, s.samples, s.grid, run.stream("steady")), run.stream("langevin")
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
    found = {variant: study_plane(variant, run, s, density, data) for variant in VARIANTS}
    clouds = {"data": data[:PANEL]} | {name: samples[:PANEL] for name, (_, samples) in found.items()}
    run.scatter("samples", "draws from each energy, by inversion", clouds, ("x", "y"))
    curves = {name: curve for name, (curve, _) in found.items()}
    draw_curves(run, "one energy, every method", "KL(truth || model), nats", curves)


PLANE_SMOKE = {"examples": 500, "updates": 3, "batch": 32, "hidden": 8, "pcd_k": 2, "short_run_k": 2, "flow_steps": 2}
PLANE_SMOKE |= {"langevin_steps": 5, "samples": 50, "test_examples": 100, "grid": 60}
_PLANE = "one energy of a crescent trained by every method, against the truth by quadrature"
_MODES = "the same on two Gaussians far apart: which methods see the weights of modes"
_FAR = PlaneSettings(density="two-gaussians", updates=200)
PLANE = experiment("energies-plane", about=_PLANE, family="ebm", seeds=3, smoke=PLANE_SMOKE)(compare)
MODES = experiment("energies-modes", about=_MODES, family="ebm", settings=_FAR, seeds=3, smoke=PLANE_SMOKE)(compare)


@dataclass(frozen=True, kw_only=True)
class IcaSettings(Settings):
    """Settings of the comparison in `dim` dimensions, chosen on seeds that are not judged."""

    dim: int = 5
    examples: int = 5000
    test_examples: int = 20_000
    batch: int = 250
    lr: float = 0.1
    move_step: float = 1.0
    pcd_k: int = 1
    jump_k: int = 1
    short_run_step: float = 0.2
    sigma: float = 0.1
    contrast: float = 1.0
    bandwidth: float = 0.3


class IcaModel(Model):
    """f(z) = -sum_i g(m_i z) with g the logistic log density and M to be learned: `Ica` without its log Z.

    A constant makes the log Z of the start (D, D) 0, where the methods that learn it begin. Without an objective it
    trains by maximum likelihood.
    """

    offset: Tensor

    def __init__(self, start: Tensor, objective: Objective | None = None) -> None:
        super().__init__()
        self.m = nn.Parameter(start.clone())
        self.register_buffer("offset", Ica(start).log_z())
        self.objective = objective or MaximumLikelihood(lambda energy: self.log_z())

    def initialise(self, train: Tensor, generator: torch.Generator) -> None:
        self.objective.prepare(train, generator)

    def loss(self, batch: Tensor, generator: torch.Generator) -> Tensor:
        return self.objective.loss(self.energy, batch, generator)

    def energy(self, x: Tensor) -> Tensor:
        return self.offset - Ica(self.m).log_density(x)

    def log_z(self) -> Tensor:
        """Return the exact log Z in nats of the energy with its constant."""
        return Ica(self.m).log_z() - self.offset


def study_ica(
    variant: str, run: Run, s: IcaSettings, data: Tensor, start: Tensor, gap: Callable[[Tensor], Tensor]
) -> Curve:
    """Train on whitened data (n, D) by one method from M = `start` (D, D) and measure it; return its learning curve.

    `gap` of M is the log-likelihood in nats that it loses at each test example.
    """
    with run.initialisation():
        objective = None if variant == "ml" else objective_of(variant, s.dim, s)
    model = IcaModel(start, objective).to(run.device, torch.float64)
    curve, seconds = train(variant, model, data, s, run, lambda: float(gap(model.m.detach()).mean()))
    estimates = {"gap": Estimate.mean_of(gap(model.m.detach()), "exact", "nats"), "time_seconds": seconds}
    if isinstance(objective, NoiseContrastive):
        error = abs(float(objective.log_z.detach()) - float(model.log_z().detach()))
        estimates["log_z_error"] = Estimate.exact(error, "nats")
    report(run, estimates, variant)
    return curve


ICA_SMOKE = {"examples": 300, "test_examples": 500, "updates": 3, "batch": 50, "flow_steps": 2}


@experiment("energies-ica", family="ebm", seeds=3, smoke=ICA_SMOKE, precision="float64")
def independent_components(run: Run, s: IcaSettings) -> None:
    """Linear ICA in 5 dimensions by every method, scored by the exact log-likelihood."""
    unmixing = draw_unmixing(s.dim, run.stream("mixing")).to(run.device)
    x = Ica(unmixing).sample(s.examples, run.stream("data"))
    white = whitening(x)
    truth = Ica(unmixing @ torch.linalg.inv(white))
    test = truth.sample(s.test_examples, run.stream("test"))
    true = truth.log_prob(test)
    start = SOURCE_STD * rotation(s.dim, run.stream("rotation"))

    def gap(m: Tensor) -> Tensor:
        return true - Ica(m).log_prob(test)

    curves = {variant: study_ica(variant, run, s, x @ white.T, start, gap) for variant in VARIANTS}
    draw_curves(run, f"linear ICA in {s.dim} dimensions, every method", "gap to the truth (nats, exact)", curves)
