"""Algorithm 1 with convergent and with non-convergent chains, and what its energies have learned."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from replicate.experiments import Run, experiment
from replicate.experiments.planar import BOX, model_kl, spread, steady_state
from replicate.likelihood.quadrature import log_z
from replicate.metrics.samples import w2
from replicate.model import Estimate
from replicate.resume import State, resumable
from replicate.sampling.langevin import Chain, ula
from replicate.tasks.densities import GaussianMixture, eight_gaussians

LEAK = 0.05
WIDTHS = (2, 32, 64, 64, 64, 1)
DATA = 50_000
#: share of the updates after which the diagnostics are summarised: the last half
LATE = 0.5
#: times at which long-run chains are recorded
STOPS = 4
METHODS = ("convergent", "nonconvergent")


@dataclass(frozen=True)
class Settings:
    """Settings of the ring, of `Method` for both methods, and of the measurements."""

    radius: float = 1.0
    sd: float = 0.15
    batch: int = 100
    convergent_updates: int = 4500
    convergent_steps: int = 20
    convergent_epsilon: float = 0.125
    convergent_lr: float = 1.0
    convergent_anneal: bool = True
    convergent_chains: int = 100
    nonconvergent_updates: int = 600
    nonconvergent_steps: int = 100
    nonconvergent_epsilon: float = 0.01
    nonconvergent_lr: float = 2e-3
    nonconvergent_anneal: bool = True
    nonconvergent_chains: int = 0
    samples: int = 1000
    long_run: int = 10_000
    grid: int = 400

    def method(self, name: str) -> Method:
        """Return the settings of "convergent" or "nonconvergent"."""
        own = {key.partition("_")[2]: value for key, value in asdict(self).items() if key.startswith(f"{name}_")}
        return Method(**own)


@dataclass(frozen=True)
class Method:
    """A way to learn an energy.

    Attributes:
        updates, steps: of the weights, and L, Langevin steps before each update.
        epsilon: standard deviation of the noise of a step.
        lr, anneal: first learning rate, of f by SGD or Adam, and whether it falls to 0 along a cosine.
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
        """The factor 2 / epsilon^2 from f to U."""
        return 2 / self.epsilon**2


def ring(radius: float, sd: float) -> GaussianMixture:
    """Return eight equal Gaussians on a circle, evenly spaced."""
    means = eight_gaussians().means * (radius / 4)
    return GaussianMixture(means, sd**2 * torch.eye(2, dtype=torch.float64), torch.ones(len(means)))


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
        """Return grad f at the present weights, (n, 2) -> (n, 2), written out: autograd would double the cost."""
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
                # True: h is the result of the leaky ReLU, which has the sign of its argument
                back = torch.ops.aten.leaky_relu_backward(back, h, LEAK, True) @ weight
            return back

        return gradient


def langevin(
    energy: FoldedEnergy, method: Method, x: Tensor, steps: int, generator: torch.Generator, record_every: int = 0
) -> tuple[Chain, float]:
    """Take Langevin steps at temperature 1 of U = 2 f / epsilon^2.

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


class Learned(NamedTuple):
    """A learned energy f, its persistent chains (n, 2), and d_t (nats) and r_t after every update, (updates,) each."""

    energy: FoldedEnergy
    chains: Tensor
    energy_gap: Tensor
    gradient_ratio: Tensor


def starts(chains: Tensor, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
    """Choose n persistent chains, or draw from N(0, I) where there is none; return states (n, 2) and the choice."""
    if not len(chains):
        return torch.randn(n, 2, generator=generator, device=generator.device), None
    chosen = torch.randperm(len(chains), generator=generator, device=generator.device)[:n]
    return chains[chosen], chosen


def learn(method: Method, batch: int, data: Tensor, energy: FoldedEnergy, generator: torch.Generator) -> Learned:
    """Run algorithm 1: each update takes data, runs the chains, and descends the difference of mean energies."""
    chains = 2 * torch.rand(method.chains, 2, generator=generator, device=data.device, dtype=data.dtype) - 1
    kind: type[torch.optim.Optimizer] = torch.optim.SGD if method.chains else torch.optim.Adam
    optimizer = kind(energy.parameters(), lr=method.lr)  # type: ignore[call-arg]
    state: State = {"energy": energy, "optimizer": optimizer, "generator": generator, "chains": chains}
    state |= {"gaps": torch.empty(method.updates), "ratios": torch.empty(method.updates)}
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
    """Continue n / STOPS short-run samples (n, 2); return their states at STOPS times of the last half, (n, 2)."""
    every = max(1, steps // (2 * STOPS))
    chain, _ = langevin(energy, method, short[: math.ceil(len(short) / STOPS)], steps, generator, every)
    assert chain.path is not None
    return chain.path[-STOPS:].reshape(-1, 2)[: len(short)]


def study(
    name: str, run: Run, s: Settings, density: GaussianMixture, data: Tensor
) -> tuple[Learned, dict[str, Tensor]]:
    """Learn by one method and measure its energy, short runs, long runs and steady state; return it and the samples."""
    method, device = s.method(name), str(run.device)
    energy = run.build(FoldedEnergy)
    learned = learn(method, s.batch, data, energy, run.stream(f"{name}-learning"))
    generator = run.stream(f"{name}-samples")

    def potential(x: Tensor) -> Tensor:
        return method.energy_scale * energy(x)

    start, _ = starts(learned.chains, s.samples, generator)
    start = start.repeat(math.ceil(s.samples / len(start)), 1)[: s.samples]
    short = langevin(energy, method, start, method.steps, generator)[0].samples
    clouds = {
        "short_run": short,
        "long_run": long_run(energy, method, short, s.long_run, generator),
        "steady_state": steady_state(potential, s.samples, s.grid, generator),
    }
    reference = density.sample(s.samples, run.stream("reference")).to(run.device)
    late = int(LATE * method.updates)
    gap, ratio = learned.energy_gap[late:], learned.gradient_ratio[late:]
    standardised = float(gap.mean() / gap.std())  # near 0 where the series is symmetric about 0
    run.measure(f"model_kl:{name}", model_kl(density, potential, s.grid, device))
    run.measure(f"model_kl:{name}_unscaled", model_kl(density, energy, s.grid, device))
    run.measure(f"energy_gap:{name}", Estimate(standardised, math.nan, "estimate", "standard deviations", len(gap)))
    run.measure(f"gradient_ratio:{name}", Estimate.mean_of(ratio, "estimate", "ratio"))
    for kind, cloud in clouds.items():
        run.measure(f"{kind}_distance:{name}", w2(cloud, reference))
        run.measure(f"{kind}_spread:{name}", spread(density, cloud))
    return learned, clouds


def draw_series(
    run: Run, name: str, axis: tuple[str, str], series: dict[str, Tensor], start: float, level: float
) -> None:
    """Draw a diagnostic from a share `start` of the updates on, both methods stretched to the same axis."""
    curves = {}
    for label, values in series.items():
        first = int(start * len(values))
        curves[label] = (torch.arange(first, len(values)) / len(values)).tolist(), values[first:].tolist()
    title, y_label = axis
    run.curves(name, title, ("share of all updates", y_label), curves, levels={f"{level:g}": level})


def draw_energies(run: Run, s: Settings, density: GaussianMixture, energies: Mapping[str, FoldedEnergy]) -> None:
    """Draw -log density along the circle through the Gaussians' centres, in nats."""
    angle = torch.linspace(-math.pi, math.pi, 400, dtype=torch.float64)
    circle = s.radius * torch.stack([angle.cos(), angle.sin()], dim=1)
    curves = {"data": (angle.tolist(), (-density.log_prob(circle)).tolist())}
    for name, energy in energies.items():
        scale = s.method(name).energy_scale
        z = log_z(lambda x, e=energy, s=scale: -s * e(x), BOX, s.grid, device=str(run.device))  # type: ignore[misc]
        with torch.no_grad():
            values = scale * energy(circle.float().to(run.device)).cpu() + z.value
        curves[name] = angle.tolist(), values.tolist()
    run.curves("energy-on-the-ring", "energy along the ring", ("angle", "minus log density, nats"), curves)


ABOUT = "an energy on the ring of eight Gaussians, learned with convergent and with non-convergent chains"
SMOKE = {"convergent_updates": 20, "nonconvergent_updates": 5, "samples": 200, "long_run": 100, "grid": 100}


@experiment("anatomy-learning", about=ABOUT, family="ebm", seeds=3, smoke=SMOKE)
def compare(run: Run, s: Settings) -> None:
    """Measure both methods on the same data, from the same initial weights."""
    density = ring(s.radius, s.sd)
    data = density.sample(DATA, run.stream("data")).to(run.device)
    again, other = (density.sample(s.samples, run.stream(name)) for name in ("reference", "second reference"))
    run.measure("short_run_distance:data", w2(other, again))
    found = {name: study(name, run, s, density, data) for name in METHODS}
    clouds = {"data": data[:300]}
    for name, (_, runs) in found.items():
        clouds |= {f"{name}, {kind.replace('_', ' ')}": cloud[:300] for kind, cloud in runs.items()}
    run.scatter("samples", "short runs, long runs and steady states", clouds, ("x", "y"))
    draw_energies(run, s, density, {name: learned.energy for name, (learned, _) in found.items()})
    gaps = {name: learned.energy_gap for name, (learned, _) in found.items()}
    ratios = {name: learned.gradient_ratio for name, (learned, _) in found.items()}
    draw_series(run, "energy-gap", ("energy of data minus energy of short runs", "d_t, nats"), gaps, LATE, 0.0)
    draw_series(run, "gradient-ratio", ("gradient term over noise", "r_t, ratio"), ratios, 0.0, 1.0)
