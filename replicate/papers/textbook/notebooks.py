"""The notebooks' RealNVP, VAE and ARM, trained and scored as they do it and by valid bounds; our own estimator."""

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from replicate.experiments import Check, Run, experiment, fit
from replicate.experiments.batches import Minibatches
from replicate.likelihood.dequantisation import DequantisedLogit, Preprocessed
from replicate.likelihood.estimator import Effort, log_likelihood
from replicate.likelihood.importance import iw_bound
from replicate.model import DataInfo, Estimate, Model
from replicate.runs.seeds import Streams
from replicate.tasks.base import Task
from replicate.tasks.loading import load_task

LOG_2PI = math.log(2 * math.pi)
#: the notebooks' clamp of probabilities
CLAMP = 1e-5
#: width of the noise that the RealNVP notebook adds, and of noise that fills a cell
HALF_CELL, WHOLE_CELL = 0.5, 1.0
on_digits = partial(experiment, seeds=3, tasks=("digits",))

#: examples (n, D) and a noise source in, the notebook's loss of each (n,) out
Loss = Callable[[Tensor, torch.Generator], Tensor]


@dataclass(frozen=True)
class Loop:
    """Settings of the notebooks' loop."""

    lr: float = 1e-3
    batch_size: int = 64
    patience: int = 20
    max_epochs: int = 1000


def early_stopped(
    model: nn.Module, loss: Loss, task: Task, s: Loop, streams: Streams, device: torch.device
) -> list[float]:
    """Train all parameters by the notebooks' loop with Adamax and keep the weights of the best validation epoch.

    An epoch is a walk through a fresh permutation, its last short batch included. Validation draws fresh noise every
    epoch, as the notebooks do. Training stops after more than `patience` epochs in a row without a better one.

    Returns:
        Mean validation loss of every epoch in nats; its minimum is the number that the notebooks' figures show.
    """
    train, valid = task.train.to(device), task.valid.to(device)
    batches, noise = Minibatches(train, s.batch_size, streams.fresh("batches")), streams.fresh("noise")

    @torch.no_grad()
    def validation_loss() -> float:
        return float(loss(valid, noise).mean())

    optimizer = torch.optim.Adamax(model.parameters(), lr=s.lr, foreach=True)
    state, check = {"batches": batches, "noise": noise}, Check(len(batches), validation_loss, patience=s.patience)
    steps = s.max_epochs * len(batches)
    found = fit(model, lambda: loss(next(batches), noise).mean(), optimizer, steps, state, check)
    return [value for _, value in found.checks]


def perceptron(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """Build the notebooks' network: two hidden layers of LeakyReLU."""
    return nn.Sequential(
        nn.Linear(inputs, hidden), nn.LeakyReLU(), nn.Linear(hidden, hidden), nn.LeakyReLU(), nn.Linear(hidden, outputs)
    )


def plot_validation(run: Run, title: str, curves: Mapping[str, list[float]], levels: Mapping[str, float]) -> None:
    """Draw the notebooks' figure: validation loss by epoch, without the first epochs above 250 nats."""
    shown = {label: [(i, v) for i, v in enumerate(curve) if v < 250] for label, curve in curves.items()}
    lines = {label: ([i for i, _ in points], [v for _, v in points]) for label, points in shown.items()}
    run.curves("validation", title, ("epoch", "validation loss (nats)"), lines, levels=levels)


@dataclass(frozen=True)
class FlowSettings(Loop):
    """Settings of a flow, and the noise draws of its evaluation per example."""

    couplings: int = 8
    hidden: int = 256
    draws: int = 16


class RealNVP(Model):
    """The notebook's flow: couplings on halves, exp(-s(a)) (b - t(a)) with s in (-1, 1), and a reversal after each.

    As a `Model` it gives importance weights of the integers x (n, D), D even: at y = x + u with u from
    `width` * U(0, 1], w = q(y) / r(u) averages to the mass that q puts on the part of the cell that u can reach, at
    most P(x). The networks s and t have `hidden` units.
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
        flow = RealNVP(task.info.dim, s.couplings, s.hidden, width).to(run.device)
    return flow, early_stopped(flow, flow.printed_loss, task, s, streams, run.device)


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
    run.measure("nll_as_printed:test", Estimate.mean_of(printed, "estimate", "nats"))
    run.measure("nll_bound_same_noise:test", -iw_bound(flow, test, 1, run.stream("printed-test")).details["elbo"])
    run.measure("nll_bound:test", -bound.details["elbo"])
    run.measure("nll_iw_bound:test", -bound.mean())
    run.measure("nll_bound:valid", -iw_bound(flow, valid, s.draws, run.stream("bound-valid")).details["elbo"])
    run.measure("epochs", Estimate.exact(len(history), "epochs"))
    flow.width = WHOLE_CELL  # the same weights under noise that fills the cell: a bound too, and not the same one
    whole = iw_bound(flow, test, s.draws, run.stream("bound-whole-cell"))
    run.measure("nll_bound:whole_cell_noise", -whole.details["elbo"])
    with torch.no_grad():
        run.measure("density_at_integers:valid", Estimate.mean_of(-flow.log_prob(valid), "estimate", "nats"))
        run.measure("density_at_integers:test", Estimate.mean_of(-flow.log_prob(test), "estimate", "nats"))
    curves = {f"noise of width {s.width:g}": history}
    plot_validation(run, "RealNVP on digits: the notebook's loss", curves, {"author's best": 124.06})


_HALF = "the textbook's RealNVP on digits with its noise U(0, 0.5]: as printed, and as a valid bound"
_WHOLE = "the same code with noise that fills the cell, which makes its loss a bound"
_BOTH = ("standard", "full")  # in full beside the model with noise over the whole cell
_WIDE: dict[str, Any] = {"settings": {"width": WHOLE_CELL}, "profiles": ("full",)}
REALNVP_HALF_CELL = on_digits("textbook-realnvp", family="flow", about=_HALF, profiles=_BOTH)(realnvp)
REALNVP_WHOLE_CELL = on_digits("textbook-realnvp-whole-cell", family="flow", about=_WHOLE, **_WIDE)(realnvp)


@dataclass(frozen=True)
class PatternSettings(FlowSettings):
    """Settings of the flow on patterns of `dim` pixels."""

    dim: int = 8


ABOUT_PATTERNS = "the textbook's noise U(0, 0.5] against a discrete distribution of known entropy"
SMALL = {"lr": 5e-3, "max_epochs": 20, "couplings": 4, "hidden": 32, "draws": 2000}


@experiment("textbook-dequantisation", family="flow", about=ABOUT_PATTERNS, settings=SMALL, seeds=3)
def dequantisation(run: Run, s: PatternSettings) -> None:
    """Compare the notebook's loss, with both widths of noise, with the entropy of four random patterns, 1.28 nats.

    For any distribution Q of the discrete data, sum_x P(x) (-log Q(x)) >= H(P) and sum_x Q(x) <= 1. An estimator of
    -log Q(x) that comes out lower, or whose exponentials sum to more than 1 over some x, is no bound.
    """
    p = torch.tensor([0.4, 0.3, 0.2, 0.1], device=run.device)
    patterns = torch.randint(0, 3, (len(p), s.dim), generator=run.stream("patterns"), device=run.device).float()
    data = patterns[torch.multinomial(p, 1350, replacement=True, generator=run.stream("data"))]
    info = DataInfo(s.dim, "levels", 3)
    task = Task("known-patterns", "four patterns", info, data[:1000], data[1000:], data[1000:])  # the book's sizes
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


def clamped_log_probability(logits: Tensor, x: Tensor) -> Tensor:
    """Log of softmax(logits) (..., L) at levels x (...), with probabilities clamped as the notebooks do."""
    return level_log_probability(logits, x).clamp(math.log(CLAMP), math.log1p(-CLAMP))


def level_log_probability(logits: Tensor, x: Tensor) -> Tensor:
    """Log of softmax(logits) (..., L) at levels x (...)."""
    return logits.log_softmax(-1).gather(-1, x.long().unsqueeze(-1)).squeeze(-1)


@dataclass(frozen=True)
class VAESettings(Loop):
    """Settings of the VAE and its evaluation."""

    latent: int = 16
    hidden: int = 256
    draws: int = 64
    scaled_entropy: bool = False


class VAE(Model):
    """The notebook's VAE: raw integers in, L latents, a free categorical for each pixel out.

    `entropy_factor` multiplies the log variance in log q(z | x); 1 is right, an early release has `latent`.
    """

    family = "vae"
    capabilities = frozenset({"importance_weights"})

    def __init__(self, info: DataInfo, latent: int, hidden: int, entropy_factor: float = 1.0) -> None:
        super().__init__()
        assert info.levels is not None
        self.dim, self.levels, self.latent, self.entropy_factor = info.dim, info.levels, latent, entropy_factor
        self.encode = perceptron(info.dim, hidden, 2 * latent)
        self.decode = perceptron(latent, hidden, info.dim * info.levels)

    def terms(self, x: Tensor, k: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """One draw of z for each of k: logits (n, k, D, levels), log p(z), log q(z | x) and sum of log variances."""
        mean, log_var = self.encode(x).chunk(2, 1)
        noise = torch.randn((len(x), k, self.latent), generator=generator, device=x.device, dtype=x.dtype)
        z = mean[:, None] + (0.5 * log_var).exp()[:, None] * noise
        log_q = (-0.5 * noise.square() - 0.5 * log_var[:, None] - 0.5 * LOG_2PI).sum(-1)
        log_prior = (-0.5 * z.square() - 0.5 * LOG_2PI).sum(-1)
        return self.decode(z).unflatten(-1, (self.dim, self.levels)), log_prior, log_q, log_var.sum(-1)

    def printed_loss(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Return the notebook's one-sample negative ELBO of each example, with clamped probabilities."""
        logits, log_prior, log_q, log_var = self.terms(x, 1, generator)
        log_q = log_q.squeeze(1) - 0.5 * (self.entropy_factor - 1) * log_var
        return -(clamped_log_probability(logits.squeeze(1), x).sum(-1) + log_prior.squeeze(1) - log_q)

    def log_weights(self, x: Tensor, k: int, generator: torch.Generator) -> Tensor:
        logits, log_prior, log_q, _ = self.terms(x, k, generator)
        return level_log_probability(logits, x[:, None].expand(-1, k, -1)).sum(-1) + log_prior - log_q


def vae(run: Run, s: VAESettings) -> None:
    """Train the notebook's VAE; measure the printed number, the ELBO without its clamp and the weighted bound."""
    task = load_task("digits")
    model = run.build(lambda: VAE(task.info, s.latent, s.hidden, float(s.latent) if s.scaled_entropy else 1.0))
    history = early_stopped(model, model.printed_loss, task, s, run.streams, run.device)
    test, valid = task.test.to(run.device), task.valid.to(run.device)
    with torch.no_grad():
        printed = model.printed_loss(test, run.stream("printed-test"))
    bound = iw_bound(model, test, s.draws, run.stream("bound-test"), chunk=2000)
    run.measure("nll_as_printed:valid", Estimate(min(history), math.nan, "estimate", "nats", len(task.valid)))
    run.measure("nll_as_printed:test", Estimate.mean_of(printed, "estimate", "nats"))
    run.measure("negative_elbo:test", -bound.details["elbo"])
    run.measure("nll_iw_bound:test", -bound.mean())
    run.measure("nll_iw_bound:valid", -iw_bound(model, valid, s.draws, run.stream("bound-valid"), chunk=2000).mean())
    run.measure("epochs", Estimate.exact(len(history), "epochs"))
    plot_validation(run, "VAE on digits: one-sample negative ELBO", {"VAE": history}, {"author's best": 100.54})


_RELEASED = "the textbook's VAE on digits: as printed, its ELBO, and the importance-weighted bound"
_EARLY = "the VAE notebook's early release, whose log q(z | x) multiplies the log variance by the number of latents"
_SCALED: dict[str, Any] = {"settings": {"scaled_entropy": True}, "profiles": ("full",)}
VAE_AS_RELEASED = on_digits("textbook-vae", family="vae", about=_RELEASED)(vae)
VAE_EARLY_RELEASE = on_digits("textbook-vae-early-release", family="vae", about=_EARLY, **_SCALED)(vae)


@dataclass(frozen=True)
class ARMSettings(Loop):
    """Settings of the ARM."""

    channels: int = 256
    kernel: int = 7


class ARM(Model):
    """The notebook's autoregressive model: four causal convolutions over the pixels in order, raw integers in."""

    family = "autoregressive"
    capabilities = frozenset({"log_prob"})

    def __init__(self, info: DataInfo, channels: int, kernel: int) -> None:
        super().__init__()
        assert info.levels is not None
        self.kernel = kernel
        sizes = [1, channels, channels, channels, info.levels]
        self.layers = nn.ModuleList(nn.Conv1d(i, o, kernel) for i, o in itertools.pairwise(sizes))

    def logits(self, x: Tensor) -> Tensor:
        """Map x (n, D) to logits (n, D, levels); those of pixel d see x[:, :d] only."""
        h = F.pad(x[:, None, :-1], (1, 0))
        for i, layer in enumerate(self.layers):
            h = layer(F.pad(F.leaky_relu(h) if i else h, (self.kernel - 1, 0)))
        return h.transpose(1, 2)

    def log_prob(self, x: Tensor) -> Tensor:
        return level_log_probability(self.logits(x), x).sum(-1)

    def printed_loss(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Return the notebook's NLL with clamped probabilities, shape (n,); it has no noise."""
        return -clamped_log_probability(self.logits(x), x).sum(-1)


ABOUT_ARM = "the textbook's ARM on digits: as printed, and exact"


@on_digits("textbook-arm", family="autoregressive", about=ABOUT_ARM, profiles=("full",))
def arm(run: Run, s: ARMSettings) -> None:
    """Train the notebook's ARM; measure the printed number and, without its clamp, the exact one."""
    task = load_task("digits")
    model = run.build(lambda: ARM(task.info, s.channels, s.kernel))
    history = early_stopped(model, model.printed_loss, task, s, run.streams, run.device)
    test = task.test.to(run.device)
    with torch.no_grad():
        printed, exact = model.printed_loss(test, run.stream("printed")), -model.log_prob(test)
    run.measure("nll_as_printed:valid", Estimate(min(history), math.nan, "estimate", "nats", len(task.valid)))
    run.measure("nll_as_printed:test", Estimate.mean_of(printed, "estimate", "nats"))
    run.measure("nll:test", Estimate.mean_of(exact, "exact", "nats"))
    run.measure("epochs", Estimate.exact(len(history), "epochs"))
    plot_validation(run, "ARM on digits: NLL", {"ARM": history}, {"author's best": 88.72})


NOTEBOOKS = (REALNVP_HALF_CELL, REALNVP_WHOLE_CELL, VAE_AS_RELEASED, VAE_EARLY_RELEASE, arm, dequantisation)


class DataDensity(Model):
    """A density of y = x + u on [0, levels)^D, as the suite's dequantise-logit preprocessing shows it to a model.

    `log_density` maps y (n, D) to log q(y) (n,); the preprocessing is already fitted.
    """

    family = "reference"
    capabilities = frozenset({"log_prob"})

    def __init__(self, transform: DequantisedLogit, log_density: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.transform, self.log_density = transform, log_density

    def log_prob(self, x: Tensor) -> Tensor:
        """Log q(y) + log |dy/dx| of standardised logits x (n, D), shape (n,)."""
        t = self.transform
        logit = x * t.std + t.mean
        y = t.levels * (torch.sigmoid(logit) - t.alpha) / (1 - 2 * t.alpha)
        log_slope = F.logsigmoid(logit) + F.logsigmoid(-logit) + math.log(t.levels / (1 - 2 * t.alpha)) + t.std.log()
        return self.log_density(y.clamp(0, t.levels)) + log_slope.sum(-1)


def suite_nll(run: Run, log_density: Callable[[Tensor], Tensor], data: Task, x: Tensor, draws: int) -> Tensor:
    """-log P of integers x (n, D) by the suite's log-mean-exp over noise draws, shape (n,), float64."""
    assert data.info.levels is not None
    transform = DequantisedLogit(data.info.dim, data.info.levels).double().to(run.device)
    noise = run.stream("evaluation")
    transform.fit(data.train.double().to(run.device), noise)
    model = Preprocessed(DataDensity(transform, log_density), data.info, "logit").to(run.device)
    model.transform = transform
    return -log_likelihood(model, x.double().to(run.device), Effort(dequantisation_draws=draws), noise).values


ABOUT = "the uniform distribution on digits through the suite's dequantised estimator"
ABOUT_CELLS = "the suite's dequantised estimator on a density that varies inside each cell"
EXACT: dict[str, Any] = {"family": "reference", "precision": "float64"}


@experiment("textbook-reference", about=ABOUT, **EXACT, seeds=1, tasks=("digits",))
def uniform_reference(run: Run, *, draws: int = 2) -> None:
    """Measure the uniform density over the cube: every image and every draw must give 64 ln 17."""
    task = load_task("digits")
    exact = task.info.dim * math.log(17)
    values = suite_nll(run, lambda y: torch.full_like(y[:, 0], -exact), task, task.test, draws)
    run.measure("nll_uniform", Estimate.exact(values.mean(), "nats", len(values)))
    run.measure("nll_uniform_error", Estimate.exact((values - exact).abs().max(), "nats", len(values)))


@experiment("textbook-cell-noise", about=ABOUT_CELLS, **EXACT)
def cell_noise(run: Run, *, draws: int = 5000) -> None:
    """Measure a density that falls linearly inside each cell: only noise over the whole cell finds its -log P.

    q(y) = 2 P(x) (1 - f) on y = x + f. Its mean over f ~ U[0, 1) is P(x); over U(0, 0.5] it is 1.5 P(x), so that an
    estimator with half the cell would be -ln 1.5 = -0.41 nats off.
    """
    levels = torch.arange(17, dtype=torch.float64, device=run.device)
    p = (-0.5 * ((levels - 6) / 4).square()).softmax(0)
    x = levels[:, None]
    data = Task("ramp", "one pixel of 17 levels", DataInfo(1, "levels", 17), x, x, x)

    def log_density(y: Tensor) -> Tensor:
        level = y.floor().clamp(max=16).squeeze(1)
        return p[level.long()].log() + math.log(2) + torch.log((1 - (y.squeeze(1) - level)).clamp_min(1e-12))

    excess = float((p * (suite_nll(run, log_density, data, data.test, draws) + p.log())).sum())
    run.measure("excess_over_entropy", Estimate(excess, math.nan, "estimate", "nats", draws))
