"""One energy, every way to train it.

Song and Kingma 2021, "How to train your energy-based models" (2101.03288), is a survey: it says what each way costs and
where it fails, and prints no numbers. Here the same network, data, batches, optimizer and number of updates serve every
method of `replicate.energies.objectives`, on densities whose truth is known:

- a crescent whose weight grows along its length: connected, so that every consistent method can find it;
- two Gaussians of weights 1/5 and 4/5, 14 standard deviations apart: the weights are in log Z, which some do not see;
- linear ICA (`replicate.papers.lsd`), where the exact likelihood is known in any dimension;
- the fixed point of contrastive divergence for a Gaussian model of data that are not Gaussian, computed exactly from
  the transition matrix of a Metropolis chain on a grid: its bias without any learning rate or sampling error.

Deviations: the survey has no experiments to replicate; all settings are ours, chosen on seeds that are not judged.
Equal updates are not equal cost: the number of energy evaluations and the seconds stand beside every method. Chains'
step sizes and lengths are each method's own. The weights that are judged are a moving average over updates.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import root
from torch import Tensor, nn

from replicate.energies.model import EnergyNet, TrainedEnergy, build_objective
from replicate.energies.objectives import EnergyFunction, MaximumLikelihood, NoiseContrastive, Objective
from replicate.experiments.ica import SOURCE_STD, Ica, draw_unmixing, rotation, whitening
from replicate.experiments.planar import BOX, model_kl, steady_state
from replicate.likelihood.quadrature import grid, log_z
from replicate.metrics.divergences import fisher_divergence
from replicate.metrics.samples import w2
from replicate.model import DataInfo, Estimate, Training
from replicate.papers.song_kingma_bits import ENERGIES_BITS
from replicate.papers.song_kingma_digits import ENERGIES_DIGITS
from replicate.resume import State, resumable
from replicate.runs.experiment import Context, Experiment, Line, Outcome, Plot
from replicate.runs.paper import Paper
from replicate.runs.training import Batches, learning_rate, make_optimizer, swap
from replicate.sampling.langevin import ula
from replicate.tasks.densities import GaussianMixture, two_gaussians

#: rows of the comparison: the objective of each, whose own settings are those with its name in front
VARIANTS: dict[str, str] = {
    "ml": "ml",
    "cd-1": "cd",
    "cd-5": "cd",
    "pcd": "pcd",
    "pcd-jump": "pcd",
    "short-run": "short-run",
    "ism": "ism",
    "dsm": "dsm",
    "ssm": "ssm",
    "nce": "nce",
    "cnce": "cnce",
    "ksd": "ksd",
    "flow-nce": "flow-nce",
}
#: KL divergences of a learning curve
STOPS = 10
#: grid points per axis of a learning curve; the final divergence has its own, finer ones
CURVE_POINTS = 64
#: points of a panel
PANEL = 300


# -- densities


def crescent() -> GaussianMixture:
    """An arc of radius 1.5 and standard deviation 0.25 over 288 degrees, its weight growing sevenfold along the way.

    Its three thirds are its modes, so that the weight that a model gives to each can be read.
    """
    place = torch.linspace(-1, 1, 60, dtype=torch.float64)
    angle = 0.8 * math.pi * place
    means = 1.5 * torch.stack([angle.cos(), angle.sin()], 1)
    thirds = (1.5 * (place + 1)).long().clamp(max=2)
    return GaussianMixture(means, 0.25**2 * torch.eye(2, dtype=torch.float64), 1 + 0.75 * place, thirds)


def far_gaussians() -> GaussianMixture:
    """The suite's two Gaussians at a fifth of their size: weights 1/5 and 4/5, standard deviation 1/5."""
    original = two_gaussians()
    return GaussianMixture(original.means / 5, original.covariance / 25, original.weights)


DENSITIES: dict[str, Callable[[], GaussianMixture]] = {"crescent": crescent, "two-gaussians": far_gaussians}


# -- training


@dataclass
class Counted:
    """An energy that counts the points at which it is evaluated."""

    energy: EnergyFunction
    points: int = 0

    def __call__(self, x: Tensor) -> Tensor:
        self.points += len(x)
        return self.energy(x)


def evaluations(objective: Objective, energy: EnergyFunction, batch: Tensor) -> float:
    """Energy evaluations of one update per example of its batch (n, D); what the objective owns stays as it is."""
    counted, state = Counted(energy), {"points": 0}
    for _ in resumable("counting evaluations", 1, state):  # one step: the chains inside it are not loops of their own
        copy.deepcopy(objective).loss(counted, batch, torch.Generator(batch.device).manual_seed(0))
        state["points"] = counted.points
    return state["points"] / len(batch)


def fit(
    name: str,
    module: nn.Module,
    step: Callable[[Tensor, torch.Generator], Tensor],
    data: Tensor,
    settings: Training,
    context: Context,
    measure: Callable[[], float],
) -> tuple[list[tuple[int, float]], float]:
    """Follow the gradient of `step` and leave the moving average of the weights in the module.

    Args:
        name: of the loop and of its noise.
        module: everything that is trained.
        step: from a batch (n, D) and a generator to a loss.
        data: shape (N, D).
        settings: as in `replicate.runs.training`.
        context: batches are those of the stream "batches", the same for every method.
        measure: of the average, `STOPS` times on the way.

    Returns:
        (curve of (updates, measure), seconds of the updates).
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = make_optimizer(parameters, settings)
    generator = context.streams.fresh(f"noise-{name}")
    batches = Batches(len(data), settings.batch_size, context.streams.fresh("batches"))
    average = [p.detach().clone() for p in parameters]
    state: State = {
        "module": module,
        "optimizer": optimizer,
        "batches": batches,
        "generator": generator,
        "average": average,
        "curve": [],
        "seconds": 0.0,
    }
    every = max(1, settings.steps // STOPS)
    for t in resumable(f"training by {name}", settings.steps, state):
        begin = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(t, settings)
        loss = step(data[batches.draw()], generator)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        decay = min(settings.ema, (1 + t) / (10 + t))
        torch._foreach_lerp_(state["average"], [p.data for p in parameters], 1 - decay)
        state["seconds"] += time.perf_counter() - begin
        if (t + 1) % every == 0:
            swap(parameters, state["average"])
            state["curve"].append((t + 1, measure()))
            swap(parameters, state["average"])
    swap(parameters, state["average"])
    return state["curve"], state["seconds"]


def settings_of(params: Mapping[str, Any]) -> Training:
    """The optimizer's settings, the same for every method."""
    return Training(params["updates"], params["batch"], params["lr"], betas=(0.9, 0.99), ema=0.99)


def objective_of(variant: str, dim: int, params: Mapping[str, Any]) -> Objective:
    """The objective of a row of the comparison, with its own settings."""
    chosen = {k: params[k] for k in ("sigma", "contrast", "ratio", "bandwidth", "flow_couplings", "flow_steps")}
    if variant == "short-run":
        chosen |= {"k": params["short_run_k"], "move_step": params["short_run_step"], "adjusted": False}
    else:
        k = {"cd-5": 5, "pcd": params["pcd_k"], "pcd-jump": params["jump_k"]}.get(variant, 1)
        chosen |= {"k": k, "move_step": params["move_step"], "chains": params["batch"]}
        chosen["jumps"] = variant == "pcd-jump"
    return build_objective(VARIANTS[variant], dim, **chosen)


def told(estimates: Mapping[str, Estimate], *plots: Plot) -> Outcome:
    """What was found; of a method that diverged, that it did."""
    finite = {k: e for k, e in estimates.items() if math.isfinite(e.value)}
    missing = {k: f"the training diverged: it is {e.value}" for k, e in estimates.items() if k not in finite}
    return Outcome(finite, plots, missing)


# -- the plane


@dataclass
class Found:
    """One method's energy and what was measured of it."""

    model: TrainedEnergy
    curve: list[tuple[int, float]]
    estimates: dict[str, Estimate]
    samples: Tensor


def mode_masses(density: GaussianMixture, log_p: Callable[[Tensor], Tensor], points: int, device: str) -> Tensor:
    """Share of each of the density's modes' regions under exp(log_p), by the midpoint rule; shape (M,), float64."""
    nodes = grid(BOX, points, 2)[0].to(device)
    with torch.no_grad():
        share = log_p(nodes).double().softmax(0)
    masses = torch.zeros(len(density.mode_weights()), dtype=torch.float64, device=device)
    return masses.index_add_(0, density.mode_of(nodes), share).cpu()


def mode_error(density: GaussianMixture, energy: EnergyFunction, points: int, device: str) -> Estimate:
    """Half the L1 distance between the energy's and the density's masses in the regions of the density's modes."""
    true, found = (mode_masses(density, f, points, device) for f in (density.log_prob, lambda x: -energy(x)))
    return Estimate(float((true - found).abs().sum() / 2), 0.0, "estimate", "probability", points**2)


def langevin_samples(model: TrainedEnergy, n: int, params: Mapping[str, Any], generator: torch.Generator) -> Tensor:
    """Where Langevin chains from the Gaussian fit are after `langevin_steps`, (n, 2)."""
    start = model.base_sample(n, generator)
    return ula(model.score, start, params["langevin_steps"], params["langevin_step"], generator).samples


def study(variant: str, context: Context, density: GaussianMixture, data: Tensor) -> Found:
    """Train by one method and measure its energy against the truth."""
    p, streams, device = context.params, context.streams, str(context.device)
    with streams.initialisation():  # the network comes first, so that all methods begin at the same weights
        network = EnergyNet(2, p["hidden"], p["layers"], p["waves"])
        model = TrainedEnergy(network, objective_of(variant, 2, p), DataInfo(2, "continuous")).to(context.device)
    begin = time.perf_counter()
    model.initialise(data, streams.fresh(f"prepare-{variant}"))
    prepared = time.perf_counter() - begin
    cost = evaluations(model.objective, model.energy, data[: p["batch"]])

    def coarse() -> float:
        return model_kl(density, model.energy, CURVE_POINTS, device).value

    curve, seconds = fit(variant, model, model.loss, data, settings_of(p), context, coarse)
    n, points = p["samples"], p["grid"]
    test = density.sample(p["test_examples"], streams.fresh("test")).to(context.device)
    reference = density.sample(n, streams.fresh("reference")).to(context.device)
    samples = steady_state(model.energy, n, points, streams.fresh("steady"))
    chains = langevin_samples(model, n, p, streams.fresh("langevin"))
    estimates = {
        "kl": model_kl(density, model.energy, points, device),
        "fisher_divergence": fisher_divergence(model.score(test).detach(), density.score(test)),
        "mode_weight_error": mode_error(density, model.energy, points, device),
        "w2": w2(samples, reference),
        "w2_langevin": w2(chains, reference),
        "time_seconds": Estimate(prepared + seconds, math.nan, "estimate", "seconds", 1),
        "evaluations": Estimate.exact(cost, "energy evaluations per example and update"),
    }
    if isinstance(model.objective, NoiseContrastive):
        true = log_z(lambda x: -model.energy(x), BOX, points, device=device)
        error = abs(float(model.objective.log_z.detach()) - true.value)
        estimates["log_z_error"] = Estimate(error, true.stderr, "estimate", "nats", 1)
    return Found(model, curve, {f"{k}:{variant}": e for k, e in estimates.items()}, samples)


def compare(context: Context) -> Outcome:
    """Every method on one density."""
    p = context.params
    density = DENSITIES[p["density"]]()
    data = density.sample(p["examples"], context.streams.fresh("data")).to(context.device)
    found = {variant: study(variant, context, density, data) for variant in VARIANTS}
    again, other = (density.sample(p["samples"], context.streams.fresh(s)) for s in ("reference", "second reference"))
    estimates = {"w2:truth": w2(other, again)}
    for f in found.values():
        estimates |= f.estimates
    clouds = {"data": data} | {name: f.samples for name, f in found.items()}
    panels = [Line(name, x[:PANEL, 0].tolist(), x[:PANEL, 1].tolist()) for name, x in clouds.items()]
    plots = (
        Plot("samples", "draws from each energy, by inversion", "x", "y", tuple(panels), style="points"),
        curves({name: f.curve for name, f in found.items()}, "KL(truth || model), nats", "one energy, every method"),
    )
    return told(estimates, *plots)


def curves(found: Mapping[str, list[tuple[int, float]]], y_label: str, title: str) -> Plot:
    """Learning curves on a logarithmic axis, cut below at 1e-5."""
    lines = [Line(n, [float(t) for t, _ in c], [max(v, 1e-5) for _, v in c]) for n, c in found.items()]
    return Plot("curves", title, "updates", y_label, tuple(lines), log_y=True)


# -- linear ICA


class IcaEnergy(nn.Module):
    """f(z) = -sum_i g(m_i z) with g the logistic log density and M to be learned: `lsd.Ica` without its log Z.

    A constant makes the log Z of the start 0, where those that learn it begin, as `lsd` does.
    """

    offset: Tensor

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.m = nn.Parameter(start.clone())
        self.register_buffer("offset", Ica(start).log_z())

    def forward(self, z: Tensor) -> Tensor:
        return self.offset - Ica(self.m).log_density(z)

    def log_z(self) -> Tensor:
        """Exact, in nats, of the energy with its constant."""
        return Ica(self.m).log_z() - self.offset


class IcaTrainer(nn.Module):
    """An ICA energy together with what its objective owns."""

    def __init__(self, energy: IcaEnergy, objective: Objective) -> None:
        super().__init__()
        self.energy, self.objective = energy, objective

    def loss(self, batch: Tensor, generator: torch.Generator) -> Tensor:
        """The objective's, of a batch (n, D)."""
        return self.objective.loss(self.energy, batch, generator)


def ica_log_z(energy: EnergyFunction) -> Tensor:
    """The exact log Z that maximum likelihood asks for."""
    assert isinstance(energy, IcaEnergy)
    return energy.log_z()


@dataclass(frozen=True)
class IcaProblem:
    """What every method is given.

    Attributes:
        data: whitened, shape (n, D).
        start: M at first, shape (D, D).
        test: fresh examples, shape (m, D).
        true: their exact log density, shape (m,).
    """

    data: Tensor
    start: Tensor
    test: Tensor
    true: Tensor

    def gap(self, energy: IcaEnergy) -> Tensor:
        """Log-likelihood that the energy loses at each test example, shape (m,), in nats."""
        return self.true - Ica(energy.m.detach()).log_prob(self.test)


def ica_problem(context: Context) -> IcaProblem:
    """A random unmixing and its data, in whitened coordinates."""
    p, streams = context.params, context.streams
    unmixing = draw_unmixing(p["dim"], streams.fresh("mixing")).to(context.device)
    x = Ica(unmixing).sample(p["examples"], streams.fresh("data"))
    white = whitening(x)
    truth = Ica(unmixing @ torch.linalg.inv(white))
    test = truth.sample(p["test_examples"], streams.fresh("test"))
    start = SOURCE_STD * rotation(p["dim"], streams.fresh("rotation"))
    return IcaProblem(x @ white.T, start, test, truth.log_prob(test))


def ica_study(
    variant: str, context: Context, problem: IcaProblem
) -> tuple[dict[str, Estimate], list[tuple[int, float]]]:
    """(estimates, learning curve of the gap) of one method."""
    p, streams = context.params, context.streams
    energy = IcaEnergy(problem.start)
    if variant == "ml":
        objective: Objective = MaximumLikelihood(ica_log_z)
    else:
        with streams.initialisation():
            objective = objective_of(variant, p["dim"], p)
    trainer = IcaTrainer(energy, objective).to(context.device, torch.float64)
    begin = time.perf_counter()
    objective.prepare(problem.data, streams.fresh(f"prepare-{variant}"))
    prepared = time.perf_counter() - begin

    def mean_gap() -> float:
        return float(problem.gap(energy).mean())

    curve, seconds = fit(variant, trainer, trainer.loss, problem.data, settings_of(p), context, mean_gap)
    estimates = {
        "gap": Estimate.mean_of(problem.gap(energy), "exact", "nats"),
        "time_seconds": Estimate(prepared + seconds, math.nan, "estimate", "seconds", 1),
    }
    if isinstance(objective, NoiseContrastive):
        error = abs(float(objective.log_z.detach()) - float(energy.log_z().detach()))
        estimates["log_z_error"] = Estimate.exact(error, "nats")
    return {f"{k}:{variant}": e for k, e in estimates.items()}, curve


def independent_components(context: Context) -> Outcome:
    """Every method on linear ICA in whitened coordinates; the exact likelihood of fresh examples scores them."""
    problem = ica_problem(context)
    estimates: dict[str, Estimate] = {}
    found = {}
    for variant in VARIANTS:
        measured, found[variant] = ica_study(variant, context, problem)
        estimates |= measured
    title = f"linear ICA in {context.params['dim']} dimensions, every method"
    return told(estimates, curves(found, "gap to the truth (nats, exact)", title))


# -- the bias of contrastive divergence, exactly


def skewed(line: np.ndarray) -> np.ndarray:
    """A mixture of two unequal Gaussians on the points of a line, as probabilities."""
    density = 0.65 / 0.5 * np.exp(-0.5 * ((line + 1.2) / 0.5) ** 2) + 0.35 / 0.8 * np.exp(
        -0.5 * ((line - 1.5) / 0.8) ** 2
    )
    return density / density.sum()


def metropolis(log_p: np.ndarray, line: np.ndarray, step: float) -> np.ndarray:
    """Transition matrix of random-walk Metropolis on the points of a line: it leaves exp(log_p) invariant.

    Args:
        log_p: up to a constant, shape (n,).
        line: equidistant points, shape (n,).
        step: standard deviation of the proposal, which is symmetric.

    Returns:
        (n, n), rows sum to 1.
    """
    proposal = np.exp(-0.5 * ((line[:, None] - line[None, :]) / step) ** 2)
    proposal /= proposal.sum(1).max()  # symmetric; what is missing from a row stays where it is
    np.fill_diagonal(proposal, 0.0)
    move = proposal * np.exp(np.minimum(0.0, log_p[None, :] - log_p[:, None]))
    return move + np.diag(1 - move.sum(1))


def fixed_point(p: np.ndarray, line: np.ndarray, k: int, step: float) -> np.ndarray:
    """Natural parameters (a, b) of exp(a x + b x^2) at which the mean CD-k update on the data p vanishes.

    The update is E_p phi - E_{p T^k} phi with phi = (x, x^2) and T the transition matrix at (a, b). As k goes to
    infinity it is that of maximum likelihood, which matches both moments.

    Raises:
        RuntimeError: none was found.
    """
    phi = np.stack([line, line**2])
    mean = phi[0] @ p
    variance = phi[1] @ p - mean**2

    def update(theta: np.ndarray) -> np.ndarray:
        kernel = metropolis(theta @ phi, line, step)
        moved = p
        for _ in range(k):
            moved = moved @ kernel
        return phi @ (p - moved)

    found = root(update, np.array([mean / variance, -0.5 / variance]), tol=1e-12)
    if not np.abs(update(found.x)).max() < 1e-8:
        raise RuntimeError(f"CD-{k} has no fixed point near maximum likelihood: {found.message}")
    return found.x


def log_mass(theta: np.ndarray, line: np.ndarray) -> np.ndarray:
    """log of the model's probabilities on the points of the line, (n,)."""
    value = theta[0] * line + theta[1] * line**2
    return value - np.logaddexp.reduce(value)


def cd_bias(context: Context) -> Outcome:
    """The KL divergence that CD-k's fixed point loses against maximum likelihood's, for several k."""
    p = context.params
    line = np.linspace(-p["half_width"], p["half_width"], p["points"])
    data = skewed(line)
    mean = float(line @ data)
    variance = float(line**2 @ data) - mean**2
    best = data @ (np.log(data) - log_mass(np.array([mean / variance, -0.5 / variance]), line))
    steps = [2**i for i in range(p["doublings"] + 1)]
    estimates, lost = {}, []
    for k in steps:
        theta = fixed_point(data, line, k, p["step"])
        loss = float(data @ (np.log(data) - log_mass(theta, line)) - best)
        lost.append(loss)
        estimates[f"kl_lost:cd-{k}"] = Estimate.exact(loss, "nats")
        ratio = float(-0.5 / theta[1] / variance)
        estimates[f"variance_ratio:cd-{k}"] = Estimate.exact(ratio, "ratio")
    curve = Line("CD-k", [float(k) for k in steps], lost)
    title = "what contrastive divergence loses, exactly"
    plot = Plot("bias", title, "k", "KL lost against maximum likelihood (nats)", (curve,), log_x=True, log_y=True)
    return Outcome(estimates, (plot,))


# -- experiments

#: settings of the comparison in the plane, chosen on seeds that are not judged
PLANE_PARAMS: Mapping[str, Any] = {
    "examples": 20_000,
    "updates": 400,
    "batch": 256,
    "lr": 1e-2,
    "hidden": 64,
    "layers": 3,
    "waves": 1.0,
    "move_step": 0.05,
    "pcd_k": 5,
    "jump_k": 2,
    "short_run_k": 10,
    "short_run_step": 0.02,
    "sigma": 0.05,
    "contrast": 0.5,
    "ratio": 2,
    "bandwidth": 0.03,
    "flow_couplings": 4,
    "flow_steps": 200,
    "langevin_steps": 200,
    "langevin_step": 0.01,
    "samples": 500,
    "test_examples": 5000,
    "grid": 200,
}
SMOKE: Mapping[str, Any] = {
    "examples": 500,
    "updates": 3,
    "batch": 32,
    "hidden": 8,
    "pcd_k": 2,
    "short_run_k": 2,
    "flow_steps": 2,
    "langevin_steps": 5,
    "samples": 50,
    "test_examples": 100,
    "grid": 60,
}

PLANE = Experiment(
    name="energies-plane",
    about="one energy of a crescent trained by every method, against the truth by quadrature",
    family="ebm",
    run=compare,
    params={"density": "crescent", **PLANE_PARAMS},
    seeds=3,
    overrides={"smoke": SMOKE},
)
MODES = Experiment(
    name="energies-modes",
    about="the same on two Gaussians far apart: which methods see the weights of modes",
    family="ebm",
    run=compare,
    params={"density": "two-gaussians", **PLANE_PARAMS, "updates": 200},
    seeds=3,
    overrides={"smoke": SMOKE},
)
ICA = Experiment(
    name="energies-ica",
    about="linear ICA in 5 dimensions by every method, scored by the exact log-likelihood",
    family="ebm",
    run=independent_components,
    params={
        "dim": 5,
        "examples": 5000,
        "test_examples": 20_000,
        "updates": 400,
        "batch": 250,
        "lr": 0.1,
        "move_step": 1.0,
        "pcd_k": 1,
        "jump_k": 1,
        "short_run_k": 10,
        "short_run_step": 0.2,
        "sigma": 0.1,
        "contrast": 1.0,
        "ratio": 2,
        "bandwidth": 0.3,
        "flow_couplings": 4,
        "flow_steps": 200,
    },
    seeds=3,
    overrides={
        "smoke": {"examples": 300, "test_examples": 500, "updates": 3, "batch": 50, "flow_steps": 2},
    },
    precision="float64",
)
CD_BIAS = Experiment(
    name="energies-cd-bias",
    about="fixed points of contrastive divergence by transition matrices: its bias against k, exactly",
    family="ebm",
    run=cd_bias,
    params={"points": 161, "half_width": 6.0, "step": 0.5, "doublings": 5},
    seeds=1,
    overrides={"smoke": {"points": 81}},
    precision="float64",
)

EXPERIMENTS = (PLANE, MODES, ICA, CD_BIAS, ENERGIES_BITS, ENERGIES_DIGITS)

PAPER = Paper("song_kingma", Path(__file__).with_suffix(".toml"), experiments=EXPERIMENTS)
