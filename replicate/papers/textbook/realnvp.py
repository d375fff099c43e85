"""The notebook's RealNVP, and its noise against a distribution whose entropy is known."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from replicate.experiments import Run, experiment
from replicate.likelihood.importance import iw_bound
from replicate.model import DataInfo, Estimate, Model
from replicate.papers.textbook.training import LOG_2PI, Loop, early_stopped, nats, perceptron, plot_validation
from replicate.runs.seeds import Streams
from replicate.tasks.base import Task
from replicate.tasks.loading import load_task

#: width of the noise that the RealNVP notebook adds, and of noise that fills a cell
HALF_CELL, WHOLE_CELL = 0.5, 1.0


@dataclass(frozen=True)
class FlowSettings(Loop):
    """Settings of a flow, and the noise draws of its evaluation per example."""

    couplings: int = 8
    hidden: int = 256
    draws: int = 16


class RealNVP(Model):
    """The notebook's flow: couplings on halves, exp(-s(a)) (b - t(a)) with s in (-1, 1), and a reversal after each.

    As a `Model` it gives importance weights of the integers x: at y = x + u with u from `width` * U(0, 1],
    w = q(y) / r(u) averages to the mass that q puts on the part of the cell that u can reach, at most P(x).

    Args:
        dim: D, even.
        couplings: how many.
        hidden: width of the networks s and t.
        width: of the noise.
    """

    family = "flow"
    capabilities = frozenset({"importance_weights"})

    def __init__(self, dim: int, couplings: int, hidden: int, width: float) -> None:
        super().__init__()
        self.dim, self.width = dim, width
        half = dim // 2
        self.scale = nn.ModuleList(nn.Sequential(perceptron(half, hidden, half), nn.Tanh()) for _ in range(couplings))
        self.shift = nn.ModuleList(perceptron(half, hidden, half) for _ in range(couplings))

    def log_prob(self, x: Tensor) -> Tensor:
        """Log q(x) of real x (n, D), shape (n,)."""
        log_det = x.new_zeros(len(x))
        for scale, shift in zip(self.scale, self.shift, strict=True):
            a, b = x.chunk(2, 1)
            s = scale(a)
            x = torch.cat([a, (b - shift(a)) * torch.exp(-s)], 1).flip(1)
            log_det = log_det - s.sum(1)
        return log_det - 0.5 * x.square().sum(1) - 0.5 * self.dim * LOG_2PI

    def noise(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Draw u like x, uniform on (0, width]."""
        return self.width * (1 - torch.rand(x.shape, generator=generator, device=x.device, dtype=x.dtype))

    def printed_loss(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """-log q(x + u) of each example with one noise draw, which the notebook calls nll."""
        return -self.log_prob(x + self.noise(x, generator))

    def log_weights(self, x: Tensor, k: int, generator: torch.Generator) -> Tensor:
        y = x.repeat_interleave(k, 0)
        log_noise_density = -self.dim * math.log(self.width)
        return (self.log_prob(y + self.noise(y, generator)) - log_noise_density).view(len(x), k)


def fit_realnvp(run: Run, s: FlowSettings, task: Task, width: float, name: str) -> tuple[RealNVP, list[float]]:
    """Train a RealNVP as the notebook does with noise of a width, on streams of its own by name."""
    own = run.streams
    streams = Streams(own.task, f"{own.model}-{name}", own.seed, run.device.type)
    with streams.initialisation():
        flow = RealNVP(task.info.dim, s.couplings, s.hidden, width)
    flow = flow.to(run.device)
    return flow, early_stopped(flow, flow.printed_loss, task, s, streams, run.device)


# -- the digits


@dataclass(frozen=True)
class DigitFlowSettings(FlowSettings):
    """Settings of the flow on the digits, with the width of its noise."""

    width: float = HALF_CELL


def realnvp(run: Run, s: DigitFlowSettings) -> None:
    """Train the notebook's RealNVP with noise U(0, 0.5] as printed, or U(0, 1], which fills the cell; bound its nll.

    `nll_as_printed` is one noise draw an example, and `nll_bound_same_noise` the bound at that very draw: the loss has
    such heavy tails that independent draws differ by nats. `nll_bound` is the mean of
    -log q(x + u) + log r(u) over further draws, `nll_iw_bound` the log-mean-exp of the same weights.
    """
    task = load_task("digits")
    flow, history = fit_realnvp(run, s, task, s.width, "flow")
    test, valid = task.test.to(run.device), task.valid.to(run.device)
    with torch.no_grad():
        printed = flow.printed_loss(test, run.stream("printed-test"))
    bound = iw_bound(flow, test, s.draws, run.stream("bound-test"))
    run.measure("nll_as_printed:valid", Estimate(min(history), math.nan, "estimate", "nats", len(task.valid)))
    run.measure("nll_as_printed:test", nats(printed))
    run.measure("nll_bound_same_noise:test", -iw_bound(flow, test, 1, run.stream("printed-test")).details["elbo"])
    run.measure("nll_bound:test", -bound.details["elbo"])
    run.measure("nll_iw_bound:test", -bound.mean())
    run.measure("nll_bound:valid", -iw_bound(flow, valid, s.draws, run.stream("bound-valid")).details["elbo"])
    run.measure("epochs", Estimate.exact(len(history), "epochs"))
    flow.width = WHOLE_CELL  # the same weights under noise that fills the cell: a bound too, and not the same one
    whole = iw_bound(flow, test, s.draws, run.stream("bound-whole-cell"))
    run.measure("nll_bound:whole_cell_noise", -whole.details["elbo"])
    with torch.no_grad():
        run.measure("density_at_integers:valid", nats(-flow.log_prob(valid)))
        run.measure("density_at_integers:test", nats(-flow.log_prob(test)))
    curves = {f"noise of width {s.width:g}": history}
    plot_validation(run, "RealNVP on digits: the notebook's loss", curves, {"author's best": 124.06})


REALNVP_HALF_CELL = experiment(
    "textbook-realnvp",
    family="flow",
    about="the textbook's RealNVP on digits with its noise U(0, 0.5]: as printed, and as a valid bound",
    seeds=3,
    tasks=("digits",),
    profiles=("standard", "full"),  # in full beside the model with noise over the whole cell
)(realnvp)
REALNVP_WHOLE_CELL = experiment(
    "textbook-realnvp-whole-cell",
    family="flow",
    about="the same code with noise that fills the cell, which makes its loss a bound",
    settings={"width": WHOLE_CELL},
    seeds=3,
    tasks=("digits",),
    profiles=("full",),
)(realnvp)


# -- a distribution whose entropy is known


@dataclass(frozen=True)
class PatternSettings(FlowSettings):
    """Settings of the flow on patterns of `dim` pixels."""

    dim: int = 8


def known_patterns(run: Run, dim: int) -> tuple[Task, Tensor, Tensor]:
    """Draw four random patterns of levels 0..2, of entropy 1.28 nats, and the book's sizes of data from them.

    Returns:
        (a task of 1000 training and 350 validation examples, the patterns (4, dim), their probabilities (4,)).
    """
    p = torch.tensor([0.4, 0.3, 0.2, 0.1], device=run.device)
    generator = run.stream("patterns")
    patterns = torch.randint(0, 3, (len(p), dim), generator=generator, device=run.device).float()
    data = patterns[torch.multinomial(p, 1350, replacement=True, generator=run.stream("data"))]
    task = Task("known-patterns", "four patterns", DataInfo(dim, "levels", 3), data[:1000], data[1000:], data[1000:])
    return task, patterns, p


@experiment(
    "textbook-dequantisation",
    family="flow",
    about="the textbook's noise U(0, 0.5] against a discrete distribution of known entropy",
    settings={"lr": 5e-3, "max_epochs": 20, "couplings": 4, "hidden": 32, "draws": 2000},
    seeds=3,
)
def dequantisation(run: Run, s: PatternSettings) -> None:
    """Compare the notebook's loss with the entropy of a discrete distribution, with both widths of noise.

    For any distribution Q of the discrete data, sum_x P(x) (-log Q(x)) >= H(P) and sum_x Q(x) <= 1. An estimator of
    -log Q(x) that comes out lower, or whose exponentials sum to more than 1 over some x, is no bound.
    """
    task, patterns, p = known_patterns(run, s.dim)
    entropy = float(-(p * p.log()).sum())
    curves: dict[str, list[float]] = {}
    for name, width in (("half_cell", HALF_CELL), ("whole_cell", WHOLE_CELL)):
        flow, curves[name] = fit_realnvp(run, s, task, width, name)
        with torch.no_grad():
            draws = flow.printed_loss(patterns.repeat_interleave(s.draws, 0), run.stream(f"evaluation-{name}"))
        printed = draws.view(-1, s.draws).double()
        excess = float((p.double() * printed.mean(1)).sum()) - entropy
        spread = float((p.double().square() * printed.var(1) / s.draws).sum().sqrt())
        mass = float((-printed.mean(1)).exp().sum())
        run.measure(f"excess_over_entropy:{name}", Estimate(excess, spread, "estimate", "nats", s.draws))
        run.measure(f"total_probability:{name}", Estimate(mass, math.nan, "estimate", "probability", s.draws))
    title = "RealNVP on four known patterns: the notebook's loss against the entropy"
    plot_validation(run, title, curves, {"entropy of the data": entropy})
