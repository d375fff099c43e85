"""The direction of CD-k, and the machines that it learns, by enumeration."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from replicate.experiments import Run, experiment
from replicate.experiments.rbm import Machine, flat
from replicate.likelihood.enumeration import states
from replicate.model import Estimate
from replicate.tasks.loading import load_task

#: steps of ascent between two machines of its path
KEPT_EVERY = 10


class Enumerated:
    """Every state of a machine of `dim` visible and `hidden` hidden bits, float64."""

    def __init__(self, dim: int, hidden: int, device: torch.device | str = "cpu") -> None:
        self.v = states(dim, 2, 0, 2**dim, device)
        self.h = states(hidden, 2, 0, 2**hidden, device)

    def log_joint(self, machine: Machine) -> Tensor:
        """Return v'W h + b'v + c'h of every pair of states, shape (2^D, 2^H)."""
        w, b, c = machine
        return self.v @ w @ self.h.T + (self.v @ b)[:, None] + self.h @ c

    def distribution(self, machine: Machine) -> Tensor:
        """Return log p(v) of every visible state, shape (2^D,)."""
        return torch.log_softmax(-machine.free_energy(self.v), 0)

    def after_sweeps(self, machine: Machine, start: Tensor, sweeps: int) -> list[Tensor]:
        """Return the distributions p0 T, p0 T^2, .. of the Gibbs chain over visible states from `start` (2^D,)."""
        joint = self.log_joint(machine)
        f = (joint - joint.max()).exp()
        of_v, of_h, found = f.sum(1), f.sum(0), [start]
        for _ in range(sweeps):
            found.append(f @ ((found[-1] / of_v) @ f / of_h))
        return found[1:]

    def statistics(self, machine: Machine, q: Tensor) -> Machine:
        """Return E[v h'], E[v] and E[h] with v ~ q (2^D,) and h ~ p(h | v)."""
        h = machine.hidden_mean(self.v)
        return Machine(self.v.T @ (q[:, None] * h), q @ self.v, q @ h)

    def direction(self, machine: Machine, data: Tensor, k: int | None) -> Machine:
        """Return the expected CD-k direction, or where k is None the gradient of sum_v data(v) log p(v)."""
        negative = self.distribution(machine).exp() if k is None else self.after_sweeps(machine, data, k)[-1]
        return self.statistics(machine, data).plus(self.statistics(machine, negative), -1.0)

    def kl(self, data: Tensor, machine: Machine) -> float:
        """KL(data || machine) in nats."""
        return float((data * (data.log() - self.distribution(machine))).sum())


def patches(count: int, side: int, uniform: float, generator: torch.Generator) -> Tensor:
    """Return the distribution (2^(side^2),), float64, of the patterns of `count` patches of thresholded digits.

    The uniform distribution is mixed in with the weight `uniform`.
    """
    images = load_task("digits-binary").train.view(-1, 8, 8)
    which = torch.randint(len(images), (count,), generator=generator, device=generator.device).cpu()
    place = torch.randint(9 - side, (2, count), generator=generator, device=generator.device).cpu()
    rows, columns = place[..., None] + torch.arange(side)
    bits = images[which[:, None, None], rows[:, :, None], columns[:, None, :]].flatten(1).long()
    index = (bits * 2 ** torch.arange(side**2 - 1, -1, -1)).sum(1)
    frequency = torch.bincount(index, minlength=2**side**2).double() / count
    return (1 - uniform) * frequency + uniform / len(frequency)


class Ascent(NamedTuple):
    """A run of gradient ascent: the machine after each KEPT_EVERY steps, and the last direction's Euclidean norm."""

    path: list[Machine]
    residual: float


def ascend(every_state: Enumerated, start: Machine, data: Tensor, k: int | None, steps: int, rate: float) -> Ascent:
    """Follow the exact likelihood gradient (k = None) or the expected CD-k direction, with momentum 0.9."""
    machine, velocity, path = start, start.map(torch.zeros_like), [start]
    for i in range(steps):
        step = every_state.direction(machine, data, k)
        velocity = velocity.map(lambda part: 0.9 * part).plus(step, rate)
        machine = machine.plus(velocity)
        if (i + 1) % KEPT_EVERY == 0:
            path.append(machine)
    return Ascent(path, float(flat(step).norm()))


def independent(every_state: Enumerated, data: Tensor, scale: float, generator: torch.Generator) -> Machine:
    """Return a machine with visible biases at the data's base rates, weights N(0, scale^2) and hidden biases 0."""
    dim, hidden = every_state.v.shape[1], every_state.h.shape[1]
    weights = scale * torch.randn(dim, hidden, generator=generator, device=generator.device, dtype=torch.float64)
    mean = data @ every_state.v
    return Machine(weights.to(data.device), torch.logit(mean), torch.zeros(hidden, dtype=torch.float64).to(data.device))


def biases(every_state: Enumerated, machine: Machine, data: Tensor, k: int) -> tuple[list[float], list[float]]:
    """Return |CD-j - gradient| / |gradient| and the cosine between the two, for j = 1..k."""
    exact = flat(every_state.direction(machine, data, None))
    positive = every_state.statistics(machine, data)
    relative, cosine = [], []
    for q in every_state.after_sweeps(machine, data, k):
        cd = flat(positive.plus(every_state.statistics(machine, q), -1.0))
        relative.append(float((cd - exact).norm() / exact.norm()))
        cosine.append(float(cd @ exact / (cd.norm() * exact.norm())))
    return relative, cosine


def monte_carlo_deviation(
    every_state: Enumerated, machine: Machine, data: Tensor, k: int, chains: int, run: Run
) -> float:
    """Return the root mean square of (simulated - enumerated) / standard error over the CD-k statistics: about 1.

    The chains are those of the suite's own model, `RBM.gibbs_sweeps`.
    """
    g = run.stream(f"chains-{k}")
    start = every_state.v[torch.multinomial(data, chains, replacement=True, generator=g)]
    with run.initialisation():
        model = machine.model(start, g)
    v = model.gibbs_sweeps(start, k, g)
    h = machine.hidden_mean(v)
    draws = torch.cat([(v[:, :, None] * h[:, None, :]).flatten(1), v, h], 1)
    exact = flat(every_state.statistics(machine, every_state.after_sweeps(machine, data, k)[-1]))
    return float(((draws.mean(0) - exact) / (draws.std(0) / math.sqrt(chains))).square().mean().sqrt())


@dataclass(frozen=True)
class Learning:
    """A small machine, its data and how it learns.

    Attributes:
        side, hidden: visible units along a patch's side, hidden units.
        patches, uniform: as in `patches`.
        scale: standard deviation of the first weights.
        rate, steps: learning rate and steps of ascent.
    """

    side: int = 3
    hidden: int = 6
    patches: int = 1000
    uniform: float = 0.01
    scale: float = 0.1
    rate: float = 1.0
    steps: int = 2500

    def prepare(self, run: Run) -> tuple[Enumerated, Tensor, Machine]:
        """Return the states, the data's distribution and the machine to start from."""
        data = patches(self.patches, self.side, self.uniform, run.stream("data")).to(run.device)
        every_state = Enumerated(self.side**2, self.hidden, run.device)
        return every_state, data, independent(every_state, data, self.scale, run.stream("weights"))


@dataclass(frozen=True)
class Bias(Learning):
    """Learning, the most sweeps k of a direction, and the simulated chains that check it."""

    steps: int = 2000
    k: int = 25
    chains: int = 20_000


ABOUT_BIAS = "expected CD-k direction, k = 1..25, against the enumerated gradient of a half-trained RBM"
ABOUT_REST = "the RBM where the expected CD-1 and CD-10 updates come to rest, against maximum likelihood"
#: of both experiments
EXACT: dict[str, Any] = {"family": "ebm", "tasks": ("digits-binary",), "precision": "float64"}


@experiment("cd-gradient-bias", about=ABOUT_BIAS, **EXACT, smoke={"steps": 100, "chains": 500})
def gradient_bias(run: Run, s: Bias) -> None:
    """Measure the relative bias and the direction of CD-k, k = 1.., on a machine's way to maximum likelihood."""
    every_state, data, start = s.prepare(run)
    path = ascend(every_state, start, data, None, s.steps, s.rate).path
    kl = [every_state.kl(data, machine) for machine in path]
    sweeps, bias_curves, cosine_curves = list(range(1, s.k + 1)), {}, {}
    for label, fraction in (("a quarter", 0.25), ("half", 0.5), ("nine tenths", 0.9)):
        goal = kl[0] - fraction * (kl[0] - kl[-1])
        machine = next(machine for machine, value in zip(path, kl, strict=True) if value <= goal)
        found = biases(every_state, machine, data, s.k)
        bias_curves[f"{label} of the gain"], cosine_curves[f"{label} of the gain"] = ((sweeps, y) for y in found)
        if fraction == 0.5:
            half, (bias, cosine) = machine, found
    shown = [k for k in (1, 2, 3, 5, 10, 25) if k <= s.k]
    run.measure_all({f"relative_bias:{k}": Estimate.exact(bias[k - 1], "ratio") for k in shown})
    run.measure_all({f"cosine:{k}": Estimate.exact(cosine[k - 1], "cosine") for k in shown})
    x, y = (torch.tensor(values, dtype=torch.float64) for values in (sweeps, [math.log(b) for b in bias]))
    x = x - x.mean()
    run.measure("bias_slope", Estimate.exact((x @ y) / (x @ x), "nats per sweep"))
    for k in (1, s.k):
        deviation = monte_carlo_deviation(every_state, half, data, k, s.chains, run)
        run.measure(f"monte_carlo_deviation:{k}", Estimate(deviation, math.nan, "estimate", "ratio", s.chains))
    title, sweep_axis = "CD-k against the enumerated gradient", "Gibbs sweeps k"
    run.curves("bias", title, (sweep_axis, "|CD-k - gradient| / |gradient|"), bias_curves, log="y")
    run.curves("cosine", title, (sweep_axis, "cosine of the two directions"), cosine_curves)


@experiment("cd-fixed-points", about=ABOUT_REST, **EXACT, smoke={"steps": 100})
def fixed_points(run: Run, s: Learning) -> None:
    """Follow CD-1 and CD-10 to rest, and measure what maximum likelihood learning from there on still gains.

    As slow directions let both continue for ever, `steps` steps of exact learning are compared with as many of CD.
    """
    every_state, data, start = s.prepare(run)
    first = every_state.kl(data, start)
    run.measure("kl:start", Estimate.exact(first, "nats"))
    curves = {}
    for k in (1, 10):
        rest = ascend(every_state, start, data, k, s.steps, s.rate).path
        more = ascend(every_state, rest[-1], data, k, s.steps, s.rate)
        exact = ascend(every_state, rest[-1], data, None, s.steps, s.rate)
        for name, way in (("more CD", more), ("then ML", exact)):
            kl = [every_state.kl(data, machine) for machine in rest + way.path[1:]]
            curves[f"CD-{k}, {name}"] = [KEPT_EVERY * i for i in range(len(kl))], kl
        cd, ml = (curves[f"CD-{k}, {name}"][1][-1] for name in ("more CD", "then ML"))
        found = {"kl": cd, "kl_then_ml": ml, "excess_kl": cd - ml, "residual": more.residual}
        run.measure_all({name: Estimate.exact(value, "nats") for name, value in found.items()}, f"cd{k}")
        run.measure(f"excess_fraction:cd{k}", Estimate.exact((cd - ml) / (first - ml), "ratio"))
    run.curves("kl", "CD to rest, then maximum likelihood", ("steps", "KL in nats"), curves, log="y")
