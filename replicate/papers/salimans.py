"""Salimans and Ho 2021, "Should EBMs model the energy or the score?" (ICLR workshop on energy-based models).

A score network may be any vector field or the gradient of a scalar. The two are compared on densities whose noised
score is known: the same multilayer perceptron but for its last layer, the same data, batches, noise and updates, by
denoising score matching at one noise level. What is asked:

    quality: the Fisher divergence to the exact score of the noised density.
    conservation: |J - J'|_F^2 / |J|_F^2 of the field's Jacobian at noised data: 0 for a gradient, 4 for a rotation.
    consistency: the circulation of the field round triangles of noised data points, in nats. The log-ratio of two
        points is a line integral of the score; where the circulation is not 0 it depends on the path, and the field
        has no density.
    cost: processor time of training, and the operations of one update by count.

salimans-constant takes the other side of the energy: multiplying exp(-f) by a constant moves neither score nor Langevin
chain nor any score matching loss, by not a single bit, and moves the unnormalised log density by that constant: Z is
what the score does not see.

Deviations: two small densities in place of image sets, one noise level in place of a ladder, and an energy that is a
scalar head with a quadratic bowl (`replicate.score_based.networks.EnergyScore`) where the paper builds the energy from
the score network's output as a squared distance. The free network is given the bowl's linear term, so that the
constraint alone makes the difference.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from replicate.experiments.batches import Minibatches
from replicate.experiments.operations import OperationCounter
from replicate.experiments.planar import noised
from replicate.likelihood.quadrature import log_z
from replicate.metrics.divergences import fisher_divergence
from replicate.model import Estimate
from replicate.resume import State, resumable
from replicate.runs.experiment import Context, Experiment, Line, Outcome, Plot
from replicate.runs.paper import Paper
from replicate.sampling.langevin import ula
from replicate.score_based import matching
from replicate.score_based.matching import Score
from replicate.score_based.networks import EnergyScore, FreeScore
from replicate.tasks.densities import GaussianMixture, mixture, two_moons

DENSITIES: Mapping[str, Any] = {"two-moons": two_moons, "mixture-8": lambda: mixture(8)}
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


# -- the two fields


class FreeField(FreeScore):
    """s(x) = MLP(x) - x / bowl^2: free, and with the linear term that the energy's quadratic bowl gives its score."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) - x / BOWL**2


def networks(dim: int, context: Context) -> dict[str, nn.Module]:
    """Both fields, each from the beginning of the same stream of initial weights."""
    p = context.params
    with context.streams.initialisation():
        free = FreeField(dim, p["hidden"], p["depth"])
    with context.streams.initialisation():
        energy = EnergyScore(dim, p["hidden"], p["depth"], bowl=BOWL)
    return {"free": free.to(context.device), "energy": energy.to(context.device)}


def jacobians(score: Score, x: Tensor) -> Tensor:
    """ds_i/dx_j at each x (n, D), shape (n, D, D), by D reverse passes."""
    x = x.detach().requires_grad_(True)
    s = score(x)
    rows = [torch.autograd.grad(s[:, i].sum(), x, retain_graph=True)[0] for i in range(x.shape[1])]
    return torch.stack(rows, 1)


def asymmetry(score: Score, x: Tensor) -> Estimate:
    """E|J - J'|_F^2 / E|J|_F^2 over x (n, D): 0 for a gradient field, 4 for a pure rotation."""
    j = jacobians(score, x)
    twist, size = ((a.square().sum((1, 2))) for a in (j - j.mT, j))
    ratio = float(twist.mean() / size.mean())
    # delta method of a ratio of means
    spread = float((twist - ratio * size).std() / size.mean() / math.sqrt(len(x)))
    return Estimate(ratio, spread, "estimate", "ratio", len(x))


def line_integral(score: Score, a: Tensor, b: Tensor) -> Tensor:
    """int s . dx along the straight lines from a (n, D) to b (n, D), shape (n,), in nats: PANELS Gauss rules each."""
    nodes, weights = np.polynomial.legendre.leggauss(NODES)
    left = torch.arange(PANELS, dtype=a.dtype, device=a.device)[:, None]
    t = ((left + 0.5 * torch.as_tensor(nodes + 1).to(a)) / PANELS).flatten()
    w = torch.as_tensor(weights).to(a).repeat(PANELS) / (2 * PANELS)
    points = a + t[:, None, None] * (b - a)
    along = (score(points.flatten(0, 1)).detach().view(points.shape) * (b - a)).sum(-1)
    return w @ along


def circulation(score: Score, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """int s . dx round the triangles a, b, c, each (n, D), shape (n,), in nats: 0 for a gradient field."""
    return line_integral(score, a, b) + line_integral(score, b, c) + line_integral(score, c, a)


# -- training


@dataclass(frozen=True)
class Trained:
    """A trained field.

    Attributes:
        net: in float64.
        fisher, asymmetry: at LOOKS times during the training, shape (LOOKS,).
        updates: those times.
        seconds: processor time of the updates alone.
    """

    net: nn.Module
    fisher: list[float]
    asymmetry: list[float]
    updates: list[int]
    seconds: float


def operations(net: nn.Module, data: Tensor, context: Context) -> Estimate:
    """Floating-point operations of the matrix products of one update, by count."""
    p = context.params
    x = data[: p["batch"]]
    with OperationCounter() as counter:
        matching.denoising_score_matching(net, x, p["sigma"], torch.zeros_like(x)).mean().backward()
    net.zero_grad()
    return Estimate.exact(counter.total, "floating-point operations")


def train(net: nn.Module, data: Tensor, truth: GaussianMixture, watch: Tensor, context: Context) -> Trained:
    """Denoising score matching by Adam, the rate falling to 0 along half a cosine.

    Args:
        net: the field; trained in place.
        data: clean, shape (n, D).
        truth: the noised density.
        watch: noised points at which the training is looked at, shape (m, D).
    """
    p = context.params
    steps = p["updates"]
    optimizer = torch.optim.Adam(net.parameters(), lr=p["lr"])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    batches = Minibatches(data, p["batch"], context.streams.fresh("batches"), whole=True)
    noise = context.streams.fresh("noise")
    looks = {round(steps * (i + 1) / LOOKS) for i in range(LOOKS)}
    state: State = {
        "net": net,
        "optimizer": optimizer,
        "schedule": schedule,
        "batches": batches,
        "noise": noise,
        "fisher": [],
        "asymmetry": [],
        "updates": [],
        "seconds": 0.0,
    }
    target = truth.score(watch)
    for step in resumable("denoising score matching", steps, state):
        begin = time.process_time()
        x = next(batches)
        z = torch.randn(x.shape, generator=noise, device=x.device)
        loss = matching.denoising_score_matching(net, x, p["sigma"], z).mean()
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
    return Trained(net.double(), *(state[k] for k in ("fisher", "asymmetry", "updates", "seconds")))


def compare(context: Context) -> Outcome:
    """Both fields on the same data, batches and noise."""
    p, streams = context.params, context.streams
    clean = DENSITIES[p["density"]]()
    truth = noised(clean, p["sigma"])
    data = clean.sample(p["examples"], streams.fresh("data")).to(context.device)
    test = truth.sample(p["points"], streams.fresh("test")).to(context.device).double()
    a, b, c = (truth.sample(p["triangles"], streams.fresh(f"corner-{i}")).to(data).double() for i in range(3))
    exact_score = truth.score(test)
    nets = networks(clean.dim, context)
    estimates = {f"operations:{name}": operations(net, data, context) for name, net in nets.items()}
    watch = test[: p["watched"]].float()
    found = {name: train(net, data, truth, watch, context) for name, net in nets.items()}
    for name, trained in found.items():
        with torch.no_grad():
            estimates[f"fisher_divergence:{name}"] = fisher_divergence(trained.net(test), exact_score)
            round_trip = circulation(trained.net, a, b, c).abs()
        estimates[f"asymmetry:{name}"] = asymmetry(trained.net, test)
        estimates[f"circulation:{name}"] = Estimate.mean_of(round_trip, "estimate", "nats")
        estimates[f"time_training:{name}"] = Estimate(trained.seconds, math.nan, "estimate", "seconds", 1)
        weights = sum(w.numel() for w in trained.net.parameters())
        estimates[f"parameters:{name}"] = Estimate.exact(weights, "parameters")
    estimates["score_size"] = Estimate.mean_of(exact_score.square().sum(1), "exact", "squared nats per squared unit")
    return Outcome(estimates, learning_plots(p["density"], found))


def learning_plots(density: str, found: Mapping[str, Trained]) -> tuple[Plot, ...]:
    """Fisher divergence and asymmetry while both train."""
    return (
        Plot(
            "fisher",
            f"{density}: energy and free score learn the same score",
            "updates",
            "Fisher divergence to the exact noised score",
            tuple(Line(name, t.updates, t.fisher) for name, t in found.items()),
            log_y=True,
        ),
        Plot(
            "asymmetry",
            f"{density}: how far the free field is from a gradient (the energy's field: 0 to rounding, not drawn)",
            "updates",
            "|J - J'|^2 / |J|^2",
            (Line("free", found["free"].updates, found["free"].asymmetry),),
            log_y=True,
        ),
    )


# -- the constant that no score sees


class Scaled(EnergyScore):
    """The energy network of exp(log_constant) exp(-f)."""

    log_constant: float = 0.0

    def energy(self, x: Tensor) -> Tensor:
        """f(x) - log_constant, shape (n,), in nats."""
        return super().energy(x) - self.log_constant


def losses(net: EnergyScore, x: Tensor, z: Tensor, v: Tensor) -> Tensor:
    """Every score matching loss that needs no truth, one value an example, shape (4, n)."""
    return torch.stack(
        [
            matching.implicit_score_matching(net, x),
            matching.denoising_score_matching(net, x, 0.3, z),
            matching.sliced_score_matching(net, x, v),
            matching.sliced_score_matching_vr(net, x, v),
        ]
    ).detach()


def seen(net: Scaled, x: Tensor, context: Context) -> dict[str, Tensor]:
    """All that is compared of a network at the points x (n, 2), by name."""
    streams = context.streams
    z = torch.randn(x.shape, generator=streams.fresh("noise"), dtype=x.dtype, device=x.device)
    chain = ula(net, x, context.params["steps"], 0.05, streams.fresh("chain"), record_every=1)
    assert chain.path is not None
    signs = matching.rademacher(x, streams.fresh("signs"))
    z_of = log_z(lambda y: -net.energy(y), BOX, context.params["grid"], dtype=x.dtype, device=str(x.device))
    return {
        "score": net(x).detach(),
        "langevin": chain.path,
        "loss": losses(net, x, z, signs),
        "log_density": -net.energy(x).detach(),
        "log_z": torch.tensor(z_of.value, dtype=torch.float64),
    }


def constant(context: Context) -> Outcome:
    """What multiplying exp(-f) by a constant moves: neither score, chain nor loss; log density and log Z alike."""
    with context.streams.initialisation():
        net = Scaled(2, context.params["hidden"], 2, bowl=BOWL).to(context.device).double()
    x = two_moons().sample(context.params["points"], context.streams.fresh("data")).to(context.device).double()
    plain = seen(net, x, context)
    moved: dict[str, float] = dict.fromkeys(plain, 0.0)
    for shift in CONSTANTS:
        net.log_constant = shift
        for name, now in seen(net, x, context).items():
            expected = plain[name] + shift if name.startswith("log") else plain[name]
            moved[name] = max(moved[name], float((now - expected).abs().max()))
    units = {"score": "nats per unit", "langevin": "units of x", "loss": "squared nats per squared unit"}
    return Outcome({f"moved:{n}": Estimate.exact(v, units.get(n, "nats"), len(x)) for n, v in moved.items()})


def field_experiment(density: str, **settings: Any) -> Experiment:
    """The comparison on one density."""
    return Experiment(
        name=f"salimans-{density}",
        about=f"{density}: the gradient of an energy against a free score network, same size, data and batches",
        family="score",
        run=compare,
        params={
            "density": density,
            "hidden": 64,
            "depth": 2,
            "updates": 800,
            "batch": 256,
            "lr": 2e-2,
            "examples": 20_000,
            "points": 3000,
            "watched": 300,
            "triangles": 300,
            **settings,
        },
        seeds=3,
        overrides={"smoke": {"updates": 20, "examples": 2000, "points": 200, "triangles": 20, "watched": 20}},
    )


MOONS = field_experiment("two-moons", sigma=0.3)
MIXTURE = field_experiment("mixture-8", sigma=0.5)
CONSTANT = Experiment(
    name="salimans-constant",
    about="an energy network and the same one with exp(-f) multiplied by constants",
    family="score",
    run=constant,
    params={"hidden": 64, "points": 500, "steps": 100, "grid": 200},
    seeds=3,
    overrides={"smoke": {"points": 50, "steps": 10, "grid": 50}},
    precision="float64",
)

PAPER = Paper("salimans", Path(__file__).with_suffix(".toml"), experiments=(MOONS, MIXTURE, CONSTANT))
