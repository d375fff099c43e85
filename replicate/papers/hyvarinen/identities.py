"""The Gaussian example, the partial integration, and models under another normalising constant."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from replicate.experiments import Run, experiment
from replicate.experiments.planar import networks
from replicate.likelihood.quadrature import grid, log_z
from replicate.model import Estimate, Model
from replicate.runs.spec import make_spec
from replicate.runs.subjects import train_model
from replicate.sampling.langevin import ula
from replicate.score_based.matching import Score, explicit_score_matching, implicit_score_matching
from replicate.score_based.networks import score_of
from replicate.tasks.densities import GaussianMixture

# -- sec. 3.1: on a Gaussian model, score matching is maximum likelihood


def skewed_sample(n: int, dim: int, generator: torch.Generator) -> Tensor:
    """Draw n correlated, skewed observations (n, dim) in float64: a random linear map of centred exponentials."""

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64, device=generator.device)

    uniform = torch.rand(n, dim, generator=generator, dtype=torch.float64, device=generator.device)
    mixing = torch.eye(dim, dtype=torch.float64, device=generator.device) + 0.3 * normal(dim, dim)
    return (-torch.log1p(-uniform) - 1) @ mixing.T + normal(dim)


def minimise_score_matching(x: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """Return the Gaussian's mean (D,) and precision (D, D) that minimise the implicit objective on x (n, D)."""
    mean = torch.zeros_like(x[0], requires_grad=True)
    half = (0.5 * torch.eye(len(mean)).to(x)).requires_grad_(True)
    limits: dict[str, Any] = {"max_iter": iterations, "tolerance_grad": 1e-13, "tolerance_change": 0.0}
    optimizer = torch.optim.LBFGS([mean, half], history_size=50, line_search_fn="strong_wolfe", **limits)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = implicit_score_matching(lambda y: -(y - mean) @ (half + half.T), x).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    return mean.detach(), (half + half.T).detach()


@experiment("hyvarinen-gaussian", family="score", precision="float64")
def check_gaussian(run: Run, *, examples: int = 400, dim: int = 5, iterations: int = 500) -> None:
    """Score matching on a Gaussian model against its maximum likelihood estimate."""
    x = skewed_sample(examples, dim, run.stream("data"))
    mean, precision = minimise_score_matching(x, iterations)
    centred = x - x.mean(0)
    covariance = centred.T @ centred / len(x)
    scale = covariance.diagonal().sqrt()
    error_of_mean = ((mean - x.mean(0)) / scale).abs().max()
    error_of_covariance = ((precision.inverse() - covariance) / torch.outer(scale, scale)).abs().max()
    run.measure("mean_error", Estimate.exact(error_of_mean, "standard deviations", len(x)))
    run.measure("covariance_error", Estimate.exact(error_of_covariance, "correlation", len(x)))


# -- theorem 1: the explicit and the implicit objective differ by a constant


def overlapping_mixture() -> GaussianMixture:
    """Return three overlapping correlated Gaussians in the plane: smooth, skewed, and with a known score."""
    means = torch.tensor([[-1.5, -0.5], [1.0, 1.5], [1.2, -1.4]], dtype=torch.float64)
    covariance = torch.tensor([[0.6, 0.25], [0.25, 0.5]], dtype=torch.float64)
    return GaussianMixture(means, covariance, torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64))


@experiment("hyvarinen-objective", family="score", seeds=3, precision="float64")
def check_objective(run: Run, *, cells: int = 160, hidden: int = 32, depth: int = 2) -> None:
    """Explicit minus implicit score matching, for several networks, by quadrature."""
    density = overlapping_mixture()
    # 10 standard deviations: the box leaves out a mass below 1e-22
    half_width = float(density.means.abs().max() + 10 * density.covariance.diagonal().max().sqrt())
    nodes, log_cell = grid(half_width, cells, 2, torch.float64)
    nodes = nodes.to(run.device)
    mass = (density.log_prob(nodes) + log_cell).exp()
    constant = 0.5 * float(density.score(nodes).square().sum(1) @ mass)  # J_explicit - J_implicit by theorem 1
    gaps, objectives = [], []
    for network in networks(run, hidden, depth).values():
        objectives.append(float(explicit_score_matching(network, density.score, nodes).detach() @ mass))
        gaps.append(objectives[-1] - float(implicit_score_matching(network, nodes).detach() @ mass))
    n, unit = len(gaps), "squared score"
    run.measure("gap_spread", Estimate.exact(max(gaps) - min(gaps), unit, n))
    run.measure("gap_error", Estimate.exact(max(abs(g - constant) for g in gaps), unit, n))
    run.measure("constant", Estimate.exact(constant, unit, len(nodes)))
    run.measure("objective_range", Estimate.exact(max(objectives) - min(objectives), unit, n))


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


@dataclass(frozen=True)
class Settings:
    """Settings of the experiment with rescaled models.

    Attributes:
        steps, points: of training, and test points at which the models are compared.
        shift, factor: added to the energy; multiplied with the unnormalised density.
        langevin_steps, langevin_step: number of Langevin steps, and their size.
        half_width, cells: of the grid for log Z, per axis.
    """

    steps: int = 100
    points: int = 500
    shift: float = 37.5
    factor: float = 1e-3
    langevin_steps: int = 200
    langevin_step: float = 0.01
    half_width: float = 20.0
    cells: int = 100


def observe(model: Model, x: Tensor, score: Score, s: Settings, draws: torch.Generator) -> dict[str, Tensor]:
    """Return score (n, D), implicit objective (n,), chain ends (n, D) and -f (n,) at x (n, D), and the grid's log Z."""
    chain = ula(score, x, s.langevin_steps, s.langevin_step, draws)
    normaliser = log_z(lambda y: -model.energy(y), s.half_width, s.cells, 2, torch.float64, device=x.device.type)
    objective = implicit_score_matching(score_of(model.energy), x).detach()
    found = {"score": score(x).detach(), "objective": objective, "samples": chain.samples}
    found["log_z"] = torch.tensor(normaliser.value, dtype=torch.float64)
    return found | {"unnormalised": -model.energy(x).detach()}


SMOKE = {"steps": 10, "points": 100, "langevin_steps": 20}


@experiment("hyvarinen-normaliser", family="score", smoke=SMOKE, seeds=3, tasks=("two-gaussians",), precision="float64")
def check_normaliser(run: Run, s: Settings) -> None:
    """Scores, objectives and Langevin chains of energy models under another normalising constant."""
    # exp and log of the density itself, so that the factor goes through the arithmetic and not only through algebra
    rescalings: dict[str, tuple[float, Callable[[Tensor], Tensor]]] = {
        "shift": (-s.shift, lambda f: f + s.shift),
        "factor": (math.log(s.factor), lambda f: -(s.factor * (-f).exp()).log()),
    }
    worst = dict.fromkeys(("score", "objective", "samples"), 0.0)
    normalised = log_z_error = 0.0
    for name in ("dsm-energy", "neural-ebm"):
        settings = {"steps": s.steps, "validate_every": 0}
        spec = make_spec(name, "two-gaussians", run.streams.seed, device=run.device.type, settings=settings)
        trained, task, _, _ = train_model(spec, run.device)
        trained = trained.double().eval()
        x = task.test[: s.points].double().to(run.device)
        before = observe(trained, x, trained.score, s, run.stream("langevin"))
        for expected, rescale in rescalings.values():
            model = Rescaled(trained, rescale)
            after = observe(model, x, model.score, s, run.stream("langevin"))
            for what in worst:
                change = (after[what] - before[what]).abs().max() / before[what].abs().max()
                worst[what] = max(worst[what], float(change))
            shift = after["unnormalised"] - before["unnormalised"]
            log_shift = float(after["log_z"] - before["log_z"])
            normalised = max(normalised, float((shift - log_shift).abs().max()))
            log_z_error = max(log_z_error, abs(log_shift - expected))
    count = 2 * len(rescalings)
    run.measure_all({f"change:{what}": Estimate.exact(value, "ratio", count) for what, value in worst.items()})
    run.measure("change:normalised", Estimate.exact(normalised, "nats", count))
    run.measure("log_z_error", Estimate.exact(log_z_error, "nats", count))
