"""Carreira-Perpinan & Hinton (2005), On contrastive divergence learning, AISTATS; Hinton (2002), Neural Computation 14.

Contrastive divergence (CD-k) replaces the model's statistics in the gradient of the log-likelihood by those of the data
after k Gibbs sweeps, p0 T^k. Replicated here, all by enumeration of a small restricted Boltzmann machine: that the
expected CD-k direction is biased, that the bias falls with k, and that the machine where CD-1 comes to rest is not the
maximum likelihood one but nearly as good.

The expected CD-k statistics need no Monte Carlo: with 9 visible and 6 hidden units the distribution of the chain after
k sweeps is a vector of 512 numbers. The module also holds the plain machine (`Machine`) that the papers on training and
on annealing share.

Deviations: the data are 3 x 3 patches of the suite's thresholded digits at random places, mixed with 1 % of the uniform
distribution so that the maximum likelihood machine is finite; the papers have other small data. "Half-trained" means
that half of the log-likelihood to be gained has been gained.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from replicate.experiments.rbm import Machine, flat
from replicate.likelihood.enumeration import states
from replicate.model import Estimate
from replicate.runs.experiment import Context, Experiment, Line, Outcome, Plot
from replicate.runs.paper import Paper
from replicate.tasks.loading import load_task


class Enumerated:
    """Every state of a machine of `dim` visible and `hidden` hidden bits, float64."""

    def __init__(self, dim: int, hidden: int, device: torch.device | str = "cpu") -> None:
        self.v = states(dim, 2, 0, 2**dim, device)
        self.h = states(hidden, 2, 0, 2**hidden, device)

    def log_joint(self, machine: Machine) -> Tensor:
        """v'W h + b'v + c'h of every pair of states, shape (2^D, 2^H)."""
        w, b, c = machine
        return self.v @ w @ self.h.T + (self.v @ b)[:, None] + self.h @ c

    def distribution(self, machine: Machine) -> Tensor:
        """log p(v) of every visible state, shape (2^D,)."""
        return torch.log_softmax(-machine.free_energy(self.v), 0)

    def after_sweeps(self, machine: Machine, start: Tensor, sweeps: int) -> list[Tensor]:
        """Distributions p0 T, p0 T^2, .. of the Gibbs chain over visible states from `start` (2^D,)."""
        joint = self.log_joint(machine)
        f = (joint - joint.max()).exp()
        of_v, of_h, found = f.sum(1), f.sum(0), [start]
        for _ in range(sweeps):
            hidden = (found[-1] / of_v) @ f
            found.append(f @ (hidden / of_h))
        return found[1:]

    def statistics(self, machine: Machine, q: Tensor) -> Machine:
        """E[v h'], E[v], E[h] with v ~ q (2^D,) and h ~ p(h | v)."""
        h = machine.hidden_mean(self.v)
        return Machine(self.v.T @ (q[:, None] * h), q @ self.v, q @ h)

    def ml_gradient(self, machine: Machine, data: Tensor) -> Machine:
        """Gradient of sum_v data(v) log p(v)."""
        model = self.statistics(machine, self.distribution(machine).exp())
        return self.statistics(machine, data).plus(model, -1.0)

    def cd_gradient(self, machine: Machine, data: Tensor, k: int) -> Machine:
        """Expected CD-k direction: the data's statistics minus those after k sweeps."""
        after = self.statistics(machine, self.after_sweeps(machine, data, k)[-1])
        return self.statistics(machine, data).plus(after, -1.0)

    def kl(self, data: Tensor, machine: Machine) -> float:
        """KL(data || machine) in nats."""
        return float((data * (data.log() - self.distribution(machine))).sum())


def patches(count: int, side: int, uniform: float, generator: torch.Generator) -> Tensor:
    """Distribution over the 2^(side^2) patterns of `count` patches of thresholded digits, shape (2^(side^2),), float64.

    Args:
        uniform: weight of the uniform distribution that is mixed in.
    """
    images = load_task("digits-binary").train.view(-1, 8, 8)
    which = torch.randint(len(images), (count,), generator=generator, device=generator.device).cpu()
    place = torch.randint(9 - side, (2, count), generator=generator, device=generator.device).cpu()
    inside = torch.arange(side)
    rows, columns = place[0][:, None] + inside, place[1][:, None] + inside
    bits = images[which[:, None, None], rows[:, :, None], columns[:, None, :]].flatten(1).long()
    index = (bits * 2 ** torch.arange(side**2 - 1, -1, -1)).sum(1)
    frequency = torch.bincount(index, minlength=2**side**2).double() / count
    return (1 - uniform) * frequency + uniform / len(frequency)


class Ascent(NamedTuple):
    """A run of gradient ascent: the machine after each `every` steps, and the last direction's Euclidean norm."""

    path: list[Machine]
    residual: float


def ascend(
    every_state: Enumerated, start: Machine, data: Tensor, k: int | None, steps: int, rate: float, every: int = 10
) -> Ascent:
    """Follow the exact likelihood gradient (k = None) or the expected CD-k direction, with momentum 0.9."""
    machine, velocity, path = start, Machine(*(torch.zeros_like(p) for p in start)), [start]
    for i in range(steps):
        step = every_state.ml_gradient(machine, data) if k is None else every_state.cd_gradient(machine, data, k)
        velocity = Machine(*(0.9 * old + rate * new for old, new in zip(velocity, step, strict=True)))
        machine = machine.plus(velocity)
        if (i + 1) % every == 0:
            path.append(machine)
    return Ascent(path, float(flat(step).norm()))


def independent(every_state: Enumerated, data: Tensor, scale: float, generator: torch.Generator) -> Machine:
    """Visible biases at the data's base rates, weights N(0, scale^2), hidden biases 0."""
    dim, hidden = every_state.v.shape[1], every_state.h.shape[1]
    weights = scale * torch.randn(dim, hidden, generator=generator, device=generator.device, dtype=torch.float64)
    mean = data @ every_state.v
    return Machine(weights.to(data.device), torch.logit(mean), torch.zeros(hidden, dtype=torch.float64).to(data.device))


def biases(every_state: Enumerated, machine: Machine, data: Tensor, k: int) -> tuple[list[float], list[float]]:
    """|CD-j - gradient| / |gradient| and the cosine between the two, for j = 1..k."""
    exact = flat(every_state.ml_gradient(machine, data))
    positive = every_state.statistics(machine, data)
    relative, cosine = [], []
    for q in every_state.after_sweeps(machine, data, k):
        cd = flat(positive.plus(every_state.statistics(machine, q), -1.0))
        relative.append(float((cd - exact).norm() / exact.norm()))
        cosine.append(float(cd @ exact / (cd.norm() * exact.norm())))
    return relative, cosine


def monte_carlo_deviation(
    every_state: Enumerated, machine: Machine, data: Tensor, k: int, chains: int, context: Context
) -> float:
    """Root mean square of (simulated - enumerated) / standard error over the CD-k statistics; about 1 if all is right.

    The chains are those of the suite's own model, `RBM.gibbs_sweeps`.
    """
    g = context.streams.fresh(f"chains-{k}")
    start = every_state.v[torch.multinomial(data, chains, replacement=True, generator=g)]
    with context.streams.initialisation():
        model = machine.model(start, g)
    v = model.gibbs_sweeps(start, k, g)
    h = machine.hidden_mean(v)
    draws = torch.cat([(v[:, :, None] * h[:, None, :]).flatten(1), v, h], 1)
    exact = flat(every_state.statistics(machine, every_state.after_sweeps(machine, data, k)[-1]))
    z = (draws.mean(0) - exact) / (draws.std(0) / math.sqrt(chains))
    return float(z.square().mean().sqrt())


def _first_to_gain(every_state: Enumerated, path: list[Machine], data: Tensor, fraction: float) -> Machine:
    """The first machine of a path that has gained this fraction of all that the path gains."""
    kl = [every_state.kl(data, machine) for machine in path]
    goal = kl[0] - fraction * (kl[0] - kl[-1])
    return next(machine for machine, value in zip(path, kl, strict=True) if value <= goal)


def gradient_bias(context: Context) -> Outcome:
    """Relative bias and direction of CD-k, k = 1.., along a machine's way to maximum likelihood."""
    p = context.params
    data = patches(p["patches"], p["side"], p["uniform"], context.streams.fresh("data")).to(context.device)
    every_state = Enumerated(p["side"] ** 2, p["hidden"], context.device)
    start = independent(every_state, data, p["scale"], context.streams.fresh("weights"))
    path = ascend(every_state, start, data, None, p["steps"], p["rate"]).path
    sweeps = list(range(1, p["k"] + 1))
    lines, cosines = [], []
    for label, fraction in (("a quarter", 0.25), ("half", 0.5), ("nine tenths", 0.9)):
        machine = _first_to_gain(every_state, path, data, fraction)
        relative, cosine = biases(every_state, machine, data, p["k"])
        lines.append(Line(f"{label} of the gain", sweeps, relative))
        cosines.append(Line(f"{label} of the gain", sweeps, cosine))
        if fraction == 0.5:
            half, half_bias, half_cosine = machine, relative, cosine
    estimates = {f"relative_bias:{k}": Estimate.exact(half_bias[k - 1], "ratio") for k in _shown(p["k"])}
    estimates |= {f"cosine:{k}": Estimate.exact(half_cosine[k - 1], "cosine") for k in _shown(p["k"])}
    estimates["bias_slope"] = Estimate.exact(_slope(sweeps, [math.log(b) for b in half_bias]), "nats per sweep")
    for k in (1, p["k"]):
        deviation = monte_carlo_deviation(every_state, half, data, k, p["chains"], context)
        estimates[f"monte_carlo_deviation:{k}"] = Estimate(deviation, math.nan, "estimate", "ratio", p["chains"])
    title = "CD-k against the enumerated gradient"
    bias_plot = Plot("bias", title, "Gibbs sweeps k", "|CD-k - gradient| / |gradient|", tuple(lines), log_y=True)
    cosine_plot = Plot("cosine", title, "Gibbs sweeps k", "cosine of the two directions", tuple(cosines))
    return Outcome(estimates, (bias_plot, cosine_plot))


def _shown(k: int) -> list[int]:
    return [i for i in (1, 2, 3, 5, 10, 25) if i <= k]


def _slope(x: list[int], y: list[float]) -> float:
    """Slope of the least squares line."""
    a, b = torch.tensor(x, dtype=torch.float64), torch.tensor(y, dtype=torch.float64)
    a = a - a.mean()
    return float((a @ b) / (a @ a))


def fixed_points(context: Context) -> Outcome:
    """Where CD-1 and CD-10 come to rest, and what maximum likelihood learning from there on still gains.

    Learning has slow directions in which CD and exact learning both go on for ever. So the gain of `steps` steps of
    exact learning is compared with that of as many further steps of CD, from the same machine.
    """
    p = context.params
    data = patches(p["patches"], p["side"], p["uniform"], context.streams.fresh("data")).to(context.device)
    every_state = Enumerated(p["side"] ** 2, p["hidden"], context.device)
    start = independent(every_state, data, p["scale"], context.streams.fresh("weights"))
    first = every_state.kl(data, start)
    estimates, lines = {"kl:start": Estimate.exact(first, "nats")}, []
    for k in (1, 10):
        ways = _ways(every_state, start, data, k, p["steps"], p["rate"])
        kl = {name: [every_state.kl(data, machine) for machine in way.path] for name, way in ways.items()}
        cd, ml = kl["more CD"][-1], kl["then ML"][-1]
        found = {"kl": cd, "kl_then_ml": ml, "excess_kl": cd - ml, "residual": ways["more CD"].residual}
        estimates |= {f"{name}:cd{k}": Estimate.exact(value, "nats") for name, value in found.items()}
        estimates[f"excess_fraction:cd{k}"] = Estimate.exact((cd - ml) / (first - ml), "ratio")
        for name in ("more CD", "then ML"):
            both = kl["CD"] + kl[name][1:]
            lines.append(Line(f"CD-{k}, {name}", [10 * i for i in range(len(both))], both))
    plot = Plot("kl", "CD to rest, then maximum likelihood", "steps", "KL in nats", tuple(lines), log_y=True)
    return Outcome(estimates, (plot,))


def _ways(every_state: Enumerated, start: Machine, data: Tensor, k: int, steps: int, rate: float) -> dict[str, Ascent]:
    """CD-k from the start, and from where it ends as many steps more of CD-k or of exact learning."""
    first = ascend(every_state, start, data, k, steps, rate)
    return {
        "CD": first,
        "more CD": ascend(every_state, first.path[-1], data, k, steps, rate),
        "then ML": ascend(every_state, first.path[-1], data, None, steps, rate),
    }


_SMALL = {"side": 3, "hidden": 6, "patches": 1000, "uniform": 0.01, "scale": 0.1, "rate": 1.0}

GRADIENT_BIAS = Experiment(
    name="cd-gradient-bias",
    about="expected CD-k direction, k = 1..25, against the enumerated gradient of a half-trained RBM",
    family="ebm",
    run=gradient_bias,
    params={**_SMALL, "steps": 2000, "k": 25, "chains": 20_000},
    tasks=("digits-binary",),
    overrides={"smoke": {"steps": 100, "chains": 500}},
    precision="float64",
)

FIXED_POINTS = Experiment(
    name="cd-fixed-points",
    about="the RBM where the expected CD-1 and CD-10 updates come to rest, against maximum likelihood",
    family="ebm",
    run=fixed_points,
    params={**_SMALL, "steps": 2500},
    tasks=("digits-binary",),
    overrides={"smoke": {"steps": 100}},
    precision="float64",
)

PAPER = Paper("carreira", Path(__file__).with_suffix(".toml"), experiments=(GRADIENT_BIAS, FIXED_POINTS))
