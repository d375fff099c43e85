"""Convergent and non-convergent learning of an energy on the ring of eight Gaussians.

Nijkamp, Hill, Han, Zhu, Wu 2019, arXiv:1903.12370, algorithm 1 and section 3. Both learnings descend the same
gradient, that of d = E_data[U] - E_short-run[U], and differ in their Markov chains and optimizer only:

    convergent: SGD, persistent chains, large Langevin noise (epsilon = 0.125).
    non-convergent: Adam, chains that start from a Gaussian each time, small noise (epsilon = 0.01), 100 steps.

Diagnostics of the paper's section 3: d_t, the difference of mean energies, and r_t, the mean length of the gradient
term along the chains, here over the mean length of the noise so that it has no unit.

As printed, x <- x - (epsilon^2 / 2) grad U(x) + epsilon z; as released, x <- x - grad f(x) + epsilon z, with the
coefficient inside the network: U = 2 f / epsilon^2, a factor of 128 for epsilon = 0.125. Both readings are measured:
the model exp(-U), and what exp(-f) would be. In the suite's convention the step size is epsilon^2, the score is
-grad U and T = 1.

Deviations: the ring, the network, epsilon and the starting distributions are those of the released configurations
(radius 1, standard deviation 0.15; 2-32-64-64-64-1 with leaky ReLU), the lengths are not. Convergent: 4,500 in place
of 200,000 updates of 20 in place of 500 steps, 100 persistent chains that all move in place of 100 out of 10,000, and
a learning rate of 1 that falls to 0 along a cosine in place of a constant 0.1. Non-convergent: 600 in place of 100,000
updates, with a learning rate of 2e-3 that falls along a cosine in place of a constant 1e-4. Data are 50,000 fixed
draws, not fresh ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from replicate.experiments.planar import BOX, model_kl, steady_state
from replicate.likelihood.quadrature import log_z
from replicate.metrics.samples import w2
from replicate.model import Estimate
from replicate.resume import State, resumable
from replicate.runs.experiment import Context, Experiment, Line, Outcome, Plot
from replicate.runs.paper import Paper
from replicate.sampling.langevin import Chain, ula
from replicate.tasks.densities import GaussianMixture

GAUSSIANS = 8
LEAK = 0.05
WIDTHS = (2, 32, 64, 64, 64, 1)
DATA = 50_000
#: share of the updates after which the diagnostics are summarised: the last half
LATE = 0.5
#: times at which long-run chains are read
STOPS = 4
METHODS = ("convergent", "nonconvergent")


def ring(radius: float, sd: float) -> GaussianMixture:
    """Equal Gaussians on a circle, evenly spaced."""
    angle = torch.arange(GAUSSIANS, dtype=torch.float64) * (2 * math.pi / GAUSSIANS)
    means = radius * torch.stack([angle.cos(), angle.sin()], dim=1)
    return GaussianMixture(means, sd**2 * torch.eye(2, dtype=torch.float64), torch.ones(GAUSSIANS))


class FoldedEnergy(nn.Module):
    """f(x) = (epsilon^2 / 2) U(x): a multilayer perceptron with leaky ReLU, x (n, 2) -> (n,)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(WIDTHS))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = nn.functional.leaky_relu(layer(x), LEAK)
        out: Tensor = self.layers[-1](x)
        return out.squeeze(1)

    def gradient(self) -> Callable[[Tensor], Tensor]:
        """grad f at the present weights as a function (n, 2) -> (n, 2).

        Written out, because it is nearly all of the cost and autograd doubles it.
        """
        linear = [layer for layer in self.layers if isinstance(layer, nn.Linear)]
        weights, biases = [m.weight.detach() for m in linear], [m.bias.detach() for m in linear]
        turned = [w.T.contiguous() for w in weights]

        def gradient(x: Tensor) -> Tensor:
            hidden = []
            for weight, bias in zip(turned[:-1], biases[:-1], strict=True):
                x = nn.functional.leaky_relu_(torch.addmm(bias, x, weight), LEAK)
                hidden.append(x)
            back = weights[-1].expand(len(x), -1)
            for h, weight in zip(reversed(hidden), reversed(weights[:-1]), strict=True):
                # the sign of a leaky ReLU's result is that of its argument, which is what the last argument says
                back = torch.ops.aten.leaky_relu_backward(back, h, LEAK, True) @ weight
            return back

        return gradient


@dataclass(frozen=True)
class Method:
    """How an energy is learned.

    Attributes:
        updates: of the weights.
        steps: L, Langevin steps before each update.
        epsilon: standard deviation of the noise of a step.
        lr: first learning rate, of f by SGD or Adam.
        anneal: whether it falls to 0 along a cosine.
        chains: persistent chains; 0 starts from N(0, I) each time, and takes Adam, as the released settings do.
    """

    updates: int
    steps: int
    epsilon: float
    lr: float
    anneal: bool
    chains: int

    @property
    def energy_scale(self) -> float:
        """2 / epsilon^2, what takes f to U."""
        return 2 / self.epsilon**2


def method_of(name: str, params: dict[str, Any]) -> Method:
    """The settings of "convergent" or "nonconvergent" from an experiment's flat ones."""
    return Method(**{key.removeprefix(f"{name}_"): v for key, v in params.items() if key.startswith(f"{name}_")})


def langevin(
    energy: FoldedEnergy,
    method: Method,
    x: Tensor,
    steps: int,
    generator: torch.Generator,
    record_every: int = 0,
) -> tuple[Chain, float]:
    """Langevin steps at temperature 1 of U = 2 f / epsilon^2.

    Returns:
        (chain from x (n, 2), r: mean length of the step's gradient term over the mean length of its noise).
    """
    gradient, total = energy.gradient(), torch.zeros((), device=x.device)

    def score(x: Tensor) -> Tensor:
        slope = gradient(x)
        total.add_(slope.norm(dim=1).mean())
        return -method.energy_scale * slope

    chain = ula(score, x, steps, method.epsilon**2, generator, record_every=record_every)
    noise = method.epsilon * math.sqrt(math.pi / 2)  # E|z| of a standard normal in the plane
    return chain, float(total) / (steps * noise)


@dataclass
class Learned:
    """What a learning leaves: the energy, its persistent chains, and d_t (nats) and r_t after every update."""

    energy: FoldedEnergy
    chains: Tensor
    energy_gap: Tensor
    gradient_ratio: Tensor


def starts(chains: Tensor, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
    """(starting states (n, 2), which chains they are): persistent chains in random order, or N(0, I) without any."""
    if not len(chains):
        return torch.randn(n, 2, generator=generator, device=generator.device), None
    chosen = torch.randperm(len(chains), generator=generator, device=generator.device)[:n]
    return chains[chosen], chosen


def learn(method: Method, batch: int, data: Tensor, energy: FoldedEnergy, generator: torch.Generator) -> Learned:
    """Algorithm 1: each update takes data, runs the chains, and descends the difference of mean energies."""
    chains = 2 * torch.rand(method.chains, 2, generator=generator, device=data.device, dtype=data.dtype) - 1
    kind: type[torch.optim.Optimizer] = torch.optim.SGD if method.chains else torch.optim.Adam
    optimizer = kind(energy.parameters(), lr=method.lr)  # type: ignore[call-arg]
    state: State = {
        "energy": energy,
        "optimizer": optimizer,
        "generator": generator,
        "chains": chains,
        "gaps": torch.empty(method.updates),
        "ratios": torch.empty(method.updates),
    }
    for t in resumable("learning an energy", method.updates, state):
        if method.anneal:
            optimizer.param_groups[0]["lr"] = method.lr * (1 + math.cos(math.pi * t / method.updates)) / 2
        positive = data[torch.randint(len(data), (batch,), generator=generator, device=data.device)]
        start, chosen = starts(state["chains"], batch, generator)
        chain, state["ratios"][t] = langevin(energy, method, start, method.steps, generator)
        negative = chain.samples
        if chosen is not None:
            state["chains"][chosen] = negative
        at_data, at_chains = energy(torch.cat([positive, negative])).split([batch, len(negative)])
        gap = at_data.mean() - at_chains.mean()
        optimizer.zero_grad()
        # the released code scales the gradient by 2 / epsilon^2 and SGD's rate by its inverse; Adam has no scale
        gap.backward()
        optimizer.step()
        state["gaps"][t] = method.energy_scale * gap.detach()
    return Learned(energy, state["chains"], state["gaps"], state["ratios"])


def long_run(energy: FoldedEnergy, method: Method, short: Tensor, steps: int, generator: torch.Generator) -> Tensor:
    """n states (n, 2) of n / STOPS chains that go on from short-run samples (n, 2), at STOPS times of the last half."""
    every = max(1, steps // (2 * STOPS))
    chain, _ = langevin(energy, method, short[: math.ceil(len(short) / STOPS)], steps, generator, every)
    assert chain.path is not None
    return chain.path[-STOPS:].reshape(-1, 2)[: len(short)]


def spread(density: GaussianMixture, x: Tensor) -> Estimate:
    """Mean squared distance of x (n, 2) to the centre of its own Gaussian over that of the data: 1 for the data."""
    centres = density.means.to(x.device)[density.mode_of(x)]
    squared = (x.double() - centres).square().sum(1) / density.covariance.trace().item()
    return Estimate.mean_of(squared, "estimate", "ratio")


def standardised_mean(values: Tensor) -> Estimate:
    """Mean over standard deviation of a stretch of a series (t,): near 0 where it is symmetric about 0."""
    return Estimate(float(values.mean() / values.std()), math.nan, "estimate", "standard deviations", len(values))


@dataclass
class Findings:
    """One method's results: estimates by metric name and samples by kind of run."""

    learned: Learned
    estimates: dict[str, Estimate]
    clouds: dict[str, Tensor]


def study(name: str, context: Context, density: GaussianMixture, data: Tensor) -> Findings:
    """Learn by one method, then measure its energy, its short runs, its long runs and its steady state."""
    p, device = dict(context.params), str(context.device)
    method, streams = method_of(name, p), context.streams
    with streams.initialisation():
        energy = FoldedEnergy().to(context.device)
    learned = learn(method, p["batch"], data, energy, streams.fresh(f"{name}-learning"))
    generator = streams.fresh(f"{name}-samples")
    n, points = p["samples"], p["grid"]

    def potential(x: Tensor) -> Tensor:
        return method.energy_scale * energy(x)

    start = starts(learned.chains, n, generator)[0]
    start = start.repeat(math.ceil(n / len(start)), 1)[:n]
    short = langevin(energy, method, start, method.steps, generator)[0].samples
    clouds = {
        "short_run": short,
        "long_run": long_run(energy, method, short, p["long_run"], generator),
        "steady_state": steady_state(potential, n, points, generator),
    }
    reference = density.sample(n, streams.fresh("reference")).to(context.device)
    late = int(LATE * method.updates)
    estimates = {
        f"model_kl:{name}": model_kl(density, potential, points, device),
        f"model_kl:{name}_unscaled": model_kl(density, energy, points, device),
        f"energy_gap:{name}": standardised_mean(learned.energy_gap[late:]),
        f"gradient_ratio:{name}": Estimate.mean_of(learned.gradient_ratio[late:], "estimate", "ratio"),
    }
    for run, cloud in clouds.items():
        estimates[f"{run}_distance:{name}"] = w2(cloud, reference)
        estimates[f"{run}_spread:{name}"] = spread(density, cloud)
    return Findings(learned, estimates, clouds)


def series_plot(name: str, title: str, y_label: str, series: dict[str, Tensor], start: float, level: float) -> Plot:
    """A diagnostic from a share `start` of the updates on, both methods stretched to the same axis."""
    lines = []
    for label, values in series.items():
        first = int(start * len(values))
        share = torch.arange(first, len(values)) / len(values)
        lines.append(Line(label, share.tolist(), values[first:].tolist()))
    return Plot(name, title, "share of all updates", y_label, tuple(lines), levels={f"{level:g}": level})


def energy_plot(density: GaussianMixture, found: dict[str, Findings], params: dict[str, Any], device: str) -> Plot:
    """-log density along the circle through the Gaussians' centres, in nats."""
    angle = torch.linspace(-math.pi, math.pi, 400, dtype=torch.float64)
    circle = params["radius"] * torch.stack([angle.cos(), angle.sin()], dim=1)
    lines = [Line("data", angle.tolist(), (-density.log_prob(circle)).tolist())]
    for name, findings in found.items():
        energy, scale = findings.learned.energy, method_of(name, params).energy_scale
        z = log_z(lambda x, e=energy, s=scale: -s * e(x), BOX, params["grid"], device=device)  # type: ignore[misc]
        with torch.no_grad():
            values = scale * energy(circle.float().to(device)).cpu() + z.value
        lines.append(Line(name, angle.tolist(), values.tolist()))
    return Plot("energy-on-the-ring", "energy along the ring", "angle", "minus log density, nats", tuple(lines))


def samples_plot(data: Tensor, found: dict[str, Findings]) -> Plot:
    """Clouds of samples: the data, then each method's short run, long run and steady state."""
    clouds = {"data": data}
    for name, findings in found.items():
        clouds |= {f"{name}, {run.replace('_', ' ')}": cloud for run, cloud in findings.clouds.items()}
    lines = []
    for label, cloud in clouds.items():
        xy = cloud[:300].cpu()
        lines.append(Line(label, xy[:, 0].tolist(), xy[:, 1].tolist()))
    return Plot("samples", "short runs, long runs and steady states", "x", "y", tuple(lines), style="points")


def compare(context: Context) -> Outcome:
    """Both methods on the same data, from the same initial weights."""
    p, device = dict(context.params), str(context.device)
    density = ring(p["radius"], p["sd"])
    data = density.sample(DATA, context.streams.fresh("data")).to(context.device)
    found = {name: study(name, context, density, data) for name in METHODS}
    again, other = (density.sample(p["samples"], context.streams.fresh(s)) for s in ("reference", "second reference"))
    estimates = {"short_run_distance:data": w2(other, again)}
    for findings in found.values():
        estimates |= findings.estimates
    gaps = {name: f.learned.energy_gap for name, f in found.items()}
    ratios = {name: f.learned.gradient_ratio for name, f in found.items()}
    plots = (
        samples_plot(data, found),
        energy_plot(density, found, p, device),
        series_plot("energy-gap", "energy of data minus energy of short runs", "d_t, nats", gaps, LATE, 0.0),
        series_plot("gradient-ratio", "gradient term over noise", "r_t, ratio", ratios, 0.0, 1.0),
    )
    return Outcome(estimates, plots)


LEARNING = Experiment(
    name="anatomy-learning",
    about="an energy on the ring of eight Gaussians, learned with convergent and with non-convergent chains",
    family="ebm",
    run=compare,
    params={
        "radius": 1.0,
        "sd": 0.15,
        "batch": 100,
        "convergent_updates": 4500,
        "convergent_steps": 20,
        "convergent_epsilon": 0.125,
        "convergent_lr": 1.0,
        "convergent_anneal": True,
        "convergent_chains": 100,
        "nonconvergent_updates": 600,
        "nonconvergent_steps": 100,
        "nonconvergent_epsilon": 0.01,
        "nonconvergent_lr": 2e-3,
        "nonconvergent_anneal": True,
        "nonconvergent_chains": 0,
        "samples": 1000,
        "long_run": 10_000,
        "grid": 400,
    },
    seeds=3,
    overrides={
        "smoke": {
            "convergent_updates": 20,
            "nonconvergent_updates": 5,
            "samples": 200,
            "long_run": 100,
            "grid": 100,
        },
    },
)

PAPER = Paper("anatomy", Path(__file__).with_suffix(".toml"), experiments=(LEARNING,))
