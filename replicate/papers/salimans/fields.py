"""An energy's gradient and a free score network, trained alike; and the constant that no score sees."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from replicate.experiments import Experiment, Run, experiment
from replicate.experiments.batches import Minibatches
from replicate.experiments.operations import OperationCounter
from replicate.experiments.planar import noised
from replicate.likelihood.quadrature import log_z
from replicate.metrics.divergences import fisher_divergence
from replicate.model import Estimate
from replicate.resume import State, resumable
from replicate.sampling.langevin import standard_normal_like, ula
from replicate.score_based import matching
from replicate.score_based.matching import Score
from replicate.score_based.networks import EnergyScore, FreeScore
from replicate.tasks.densities import GaussianMixture, mixture, two_moons

DENSITIES: Mapping[str, Callable[[], GaussianMixture]] = {"two-moons": two_moons, "mixture-8": lambda: mixture(8)}
#: logarithms of the constants that exp(-f) is multiplied by, in nats
CONSTANTS = (-50.0, 1.0, 1000.0)
#: standard deviation of the bowl in every field here
BOWL = 3.0
#: half width of the box on which exp(-f) is normalised: eight times the bowl's
BOX = 24.0
#: times at which a training is looked at
LOOKS = 20
#: Gauss-Legendre nodes of a panel, and panels of an edge
NODES, PANELS = 8, 16


@dataclass(frozen=True)
class Settings:
    """Settings of the comparison on one density: the networks, their training on `examples`, and their evaluation.

    `points` noised examples are for testing, of which the training is looked at on `watched`.
    """

    density: str
    sigma: float
    hidden: int = 64
    depth: int = 2
    updates: int = 800
    batch: int = 256
    lr: float = 2e-2
    examples: int = 20_000
    points: int = 3000
    watched: int = 300
    triangles: int = 300


class FreeField(FreeScore):
    """s(x) = MLP(x) - x / bowl^2: free, and with the linear term that the energy's quadratic bowl gives its score."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) - x / BOWL**2


def networks(run: Run, s: Settings, dim: int) -> dict[str, nn.Module]:
    """Build both fields, each from the beginning of the same stream of initial weights."""
    free = run.build(lambda: FreeField(dim, s.hidden, s.depth))
    return {"free": free, "energy": run.build(lambda: EnergyScore(dim, s.hidden, s.depth, bowl=BOWL))}


def jacobians(score: Score, x: Tensor) -> Tensor:
    """Return ds_i/dx_j at each x (n, D), shape (n, D, D), by D reverse passes."""
    x = x.detach().requires_grad_(True)
    s = score(x)
    return torch.stack([torch.autograd.grad(s[:, i].sum(), x, retain_graph=True)[0] for i in range(x.shape[1])], 1)


def asymmetry(score: Score, x: Tensor) -> Estimate:
    """E|J - J'|_F^2 / E|J|_F^2 over x (n, D): 0 for a gradient field, 4 for a pure rotation."""
    j = jacobians(score, x)
    twist, size = ((a.square().sum((1, 2))) for a in (j - j.mT, j))
    ratio = float(twist.mean() / size.mean())
    # delta method of a ratio of means
    spread = float((twist - ratio * size).std() / size.mean() / math.sqrt(len(x)))
    return Estimate(ratio, spread, "estimate", "ratio", len(x))


def line_integral(score: Score, a: Tensor, b: Tensor) -> Tensor:
    """Integrate s . dx along the straight lines from a (n, D) to b (n, D) by PANELS Gauss rules; (n,), in nats."""
    nodes, weights = np.polynomial.legendre.leggauss(NODES)
    left = torch.arange(PANELS, dtype=a.dtype, device=a.device)[:, None]
    t = ((left + 0.5 * torch.as_tensor(nodes + 1).to(a)) / PANELS).flatten()
    w = torch.as_tensor(weights).to(a).repeat(PANELS) / (2 * PANELS)
    points = a + t[:, None, None] * (b - a)
    return w @ (score(points.flatten(0, 1)).detach().view(points.shape) * (b - a)).sum(-1)


def circulation(score: Score, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Integrate s . dx round the triangles a, b, c, each (n, D), shape (n,), in nats: 0 for a gradient field."""
    return line_integral(score, a, b) + line_integral(score, b, c) + line_integral(score, c, a)


class Trained(NamedTuple):
    """Fisher divergence and asymmetry at LOOKS `updates` of a training, and processor time of its updates alone."""

    updates: list[int]
    fisher: list[float]
    asymmetry: list[float]
    seconds: float


def operations(net: nn.Module, x: Tensor, sigma: float) -> Estimate:
    """Count the floating-point operations of the matrix products of one update on a batch x (n, D)."""
    with OperationCounter() as counter:
        matching.denoising_score_matching(net, x, sigma, torch.zeros_like(x)).mean().backward()
    net.zero_grad()
    return Estimate.exact(counter.total, "floating-point operations")


def train(run: Run, s: Settings, net: nn.Module, data: Tensor, truth: GaussianMixture, watch: Tensor) -> Trained:
    """Train a field in place by denoising score matching and Adam, the rate falling to 0 along half a cosine.

    `data` (n, D) are clean, `truth` is the noised density, and `watch` (m, D) are noised points to look at.
    """
    optimizer = torch.optim.Adam(net.parameters(), lr=s.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, s.updates)
    batches = Minibatches(data, s.batch, run.stream("batches"), whole=True)
    noise = run.stream("noise")
    trained = {"net": net, "optimizer": optimizer, "schedule": schedule, "batches": batches, "noise": noise}
    state: State = {**trained, "updates": [], "fisher": [], "asymmetry": [], "seconds": 0.0}
    looks = {round(s.updates * (i + 1) / LOOKS) for i in range(LOOKS)}
    target = truth.score(watch)
    for step in resumable("denoising score matching", s.updates, state):
        begin = time.process_time()
        x = next(batches)
        loss = matching.denoising_score_matching(net, x, s.sigma, standard_normal_like(x, noise)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        state["seconds"] += time.process_time() - begin
        if step + 1 in looks:
            state["updates"].append(step + 1)
            with torch.no_grad():
                state["fisher"].append(fisher_divergence(net(watch), target).value)
            state["asymmetry"].append(asymmetry(net, watch).value)
    return Trained(*(state[k] for k in ("updates", "fisher", "asymmetry", "seconds")))


def compare(run: Run, s: Settings) -> None:
    """Train both fields on the same data, batches and noise; measure quality, conservation, consistency and cost."""
    clean = DENSITIES[s.density]()
    truth = noised(clean, s.sigma)
    data = clean.sample(s.examples, run.stream("data")).to(run.device)
    test = truth.sample(s.points, run.stream("test")).to(run.device).double()
    corners = [truth.sample(s.triangles, run.stream(f"corner-{i}")).to(data).double() for i in range(3)]
    exact_score = truth.score(test)
    nets = networks(run, s, clean.dim)
    for name, net in nets.items():
        run.measure(f"operations:{name}", operations(net, data[: s.batch], s.sigma))
    found = {name: train(run, s, net, data, truth, test[: s.watched].float()) for name, net in nets.items()}
    for name, net in nets.items():
        net.double()
        with torch.no_grad():
            run.measure(f"fisher_divergence:{name}", fisher_divergence(net(test), exact_score))
            round_trip = circulation(net, *corners).abs()
        run.measure(f"asymmetry:{name}", asymmetry(net, test))
        run.measure(f"circulation:{name}", Estimate.mean_of(round_trip, "estimate", "nats"))
        run.measure(f"time_training:{name}", Estimate(found[name].seconds, math.nan, "estimate", "seconds", 1))
        run.measure(f"parameters:{name}", Estimate.exact(sum(w.numel() for w in net.parameters()), "parameters"))
    run.measure("score_size", Estimate.mean_of(exact_score.square().sum(1), "exact", "squared nats per squared unit"))
    title = f"{s.density}: energy and free score learn the same score"
    fisher = {name: (t.updates, t.fisher) for name, t in found.items()}
    run.curves("fisher", title, ("updates", "Fisher divergence to the exact noised score"), fisher, log="y")
    title = f"{s.density}: how far the free field is from a gradient (the energy's field: 0 to rounding, not drawn)"
    free = {"free": (found["free"].updates, found["free"].asymmetry)}
    run.curves("asymmetry", title, ("updates", "|J - J'|^2 / |J|^2"), free, log="y")


def on_density(s: Settings) -> Experiment:
    """Declare the comparison on one density."""
    about = f"{s.density}: the gradient of an energy against a free score network, same size, data and batches"
    smoke = {"updates": 20, "examples": 2000, "points": 200, "triangles": 20, "watched": 20}
    declared = experiment(f"salimans-{s.density}", family="score", about=about, settings=s, seeds=3, smoke=smoke)
    return declared(compare)


MOONS, MIXTURE = on_density(Settings("two-moons", 0.3)), on_density(Settings("mixture-8", 0.5))


class Scaled(EnergyScore):
    """The energy network of exp(log_constant) exp(-f)."""

    log_constant: float = 0.0

    def energy(self, x: Tensor) -> Tensor:
        """Return f(x) - log_constant, shape (n,), in nats."""
        return super().energy(x) - self.log_constant


def seen(run: Run, net: Scaled, x: Tensor, steps: int, grid: int) -> dict[str, Tensor]:
    """Return all that is compared of a network at the points x (n, 2), by name."""
    z = standard_normal_like(x, run.stream("noise"))
    chain = ula(net, x, steps, 0.05, run.stream("chain"), record_every=1)
    assert chain.path is not None
    v = matching.rademacher(x, run.stream("signs"))
    losses = (  # every score matching loss that needs no truth
        matching.implicit_score_matching(net, x),
        matching.denoising_score_matching(net, x, 0.3, z),
        matching.sliced_score_matching(net, x, v),
        matching.sliced_score_matching_vr(net, x, v),
    )
    z_of = log_z(lambda y: -net.energy(y), BOX, grid, dtype=x.dtype, device=str(x.device))
    found = {"score": net(x).detach(), "langevin": chain.path, "loss": torch.stack(losses).detach()}
    return found | {"log_density": -net.energy(x).detach(), "log_z": torch.tensor(z_of.value, dtype=torch.float64)}


ABOUT = "an energy network and the same one with exp(-f) multiplied by constants"
SMOKE = {"points": 50, "steps": 10, "grid": 50}


@experiment("salimans-constant", family="score", about=ABOUT, seeds=3, smoke=SMOKE, precision="float64")
def constant(run: Run, *, hidden: int = 64, points: int = 500, steps: int = 100, grid: int = 200) -> None:
    """Multiply exp(-f) by constants: score, chain and losses do not move; log density and log Z move alike."""
    net = run.build(lambda: Scaled(2, hidden, 2, bowl=BOWL)).double()
    x = two_moons().sample(points, run.stream("data")).to(run.device).double()
    plain = seen(run, net, x, steps, grid)
    moved: dict[str, float] = dict.fromkeys(plain, 0.0)
    for shift in CONSTANTS:
        net.log_constant = shift
        for name, now in seen(run, net, x, steps, grid).items():
            expected = plain[name] + shift if name.startswith("log") else plain[name]
            moved[name] = max(moved[name], float((now - expected).abs().max()))
    units = {"score": "nats per unit", "langevin": "units of x", "loss": "squared nats per squared unit"}
    run.measure_all({f"moved:{n}": Estimate.exact(v, units.get(n, "nats"), len(x)) for n, v in moved.items()})
