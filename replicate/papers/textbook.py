"""Tomczak, Deep Generative Modeling (2nd edition, 2024): the public notebooks' numbers on the 8x8 digits.

Replicated: the notebooks' RealNVP, VAE and causal-convolution ARM (github.com/jmtomczak/intro_dgm) on the book's own
split, trained as the notebooks train (Adamax, lr 1e-3, batches of 64, the best validation epoch kept, stopped after
more than 20 epochs without a better one), in three columns: the number as the notebook computes it, a valid bound of
the very same weights, and this suite's model of the same family.

What the notebooks compute is not always a likelihood:
- The RealNVP adds noise from U(0, 0.5] to the integers. The density then lives on half a cell a pixel, and the printed
  mean of -log q(x + u) lies 64 ln 2 = 44.36 nats below the bound on -log P(x) that the same noise gives.
- VAE and ARM clamp each pixel's probability to [1e-5, 1 - 1e-5]: a surprising pixel costs 11.5 nats at most.
- An earlier release of the VAE notebook multiplies the log variance in log q(z | x) by the number of latents L. A wide
  posterior then pays: 16 latents at variance 16 gain hundreds of nats. An experiment of its own shows it.
- An earlier release of the RealNVP notebook trains with noise U[0, 1) and evaluates at the integers without noise: a
  density, not a bound either ("density_at_integers").

Deviations: parameters and batches come from this suite's streams; a split is evaluated as one batch; PyTorch is newer
than the book's 1.7. The book's hierarchical VAE and integer discrete flow are not implemented.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from replicate.experiments.batches import Minibatches
from replicate.likelihood.dequantisation import DequantisedLogit, Preprocessed
from replicate.likelihood.estimator import Effort, log_likelihood
from replicate.likelihood.importance import iw_bound
from replicate.model import DataInfo, Estimate, Model
from replicate.resume import State, resumable
from replicate.runs.experiment import Context, Experiment, Line, Outcome, Plot
from replicate.runs.paper import Paper
from replicate.runs.seeds import Streams
from replicate.tasks.base import Task
from replicate.tasks.loading import load_task

LOG_2PI = math.log(2 * math.pi)
#: the notebooks' clamp of probabilities
CLAMP = 1e-5
#: width of the noise that the RealNVP notebook adds, and of noise that fills a cell
HALF_CELL, WHOLE_CELL = 0.5, 1.0

#: examples (n, D) and a noise source in, the notebook's loss of each (n,) out
Loss = Callable[[Tensor, torch.Generator], Tensor]


# -- training as the notebooks train


def early_stopped(model: nn.Module, loss: Loss, task: Task, context: Context) -> list[float]:
    """Train in place by the notebooks' loop and keep the weights of the best validation epoch.

    An epoch is a walk through a fresh permutation, its last short batch included. Validation draws fresh noise every
    epoch, as the notebooks do. Training stops when more than `patience` epochs in all brought nothing since the best.

    Args:
        model: whose parameters Adamax moves.
        loss: by example, in training and in validation alike.
        context: params "lr", "batch_size", "patience" and "max_epochs"; streams "batches" and "noise".

    Returns:
        Mean validation loss of every epoch in nats; its minimum is the number that the notebooks' figures show.
    """
    p, device = context.params, context.device
    train, valid = task.train.to(device), task.valid.to(device)
    batches = Minibatches(train, p["batch_size"], context.streams.fresh("batches"))
    noise = context.streams.fresh("noise")
    optimizer = torch.optim.Adamax(model.parameters(), lr=p["lr"], foreach=True)
    state: State = {
        "model": model,
        "optimizer": optimizer,
        "batches": batches,
        "noise": noise,
        "history": [],
        "best": math.inf,
        "waited": 0,
        "kept": copy.deepcopy(model.state_dict()),
    }
    for epoch in resumable("training", p["max_epochs"], state):
        if state["waited"] <= p["patience"]:  # else it has stopped
            for _ in range(len(batches)):
                optimizer.zero_grad(set_to_none=True)
                loss(next(batches), noise).mean().backward()
                optimizer.step()
            with torch.no_grad():
                value = float(loss(valid, noise).mean())
            state["history"].append(value)
            if value < state["best"]:
                state |= {"best": value, "waited": 0, "kept": copy.deepcopy(model.state_dict())}
            else:
                state["waited"] += 1
        if epoch + 1 == p["max_epochs"]:
            model.load_state_dict(state["kept"])
            state |= {"optimizer": None, "kept": None}  # what a checkpoint of the evaluation need not carry
    history: list[float] = state["history"]
    return history


def perceptron(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """The notebooks' network: two hidden layers of LeakyReLU."""
    return nn.Sequential(
        nn.Linear(inputs, hidden), nn.LeakyReLU(), nn.Linear(hidden, hidden), nn.LeakyReLU(), nn.Linear(hidden, outputs)
    )


def nats(values: Tensor, bound: bool = False) -> Estimate:
    """Mean of per-example values (n,) in nats."""
    return Estimate.mean_of(values, "upper_bound" if bound else "estimate", "nats")


def epochs(history: list[float]) -> Estimate:
    """How many epochs training took."""
    return Estimate.exact(len(history), "epochs")


def validation_plot(name: str, title: str, curves: Mapping[str, list[float]], levels: Mapping[str, float]) -> Plot:
    """The notebooks' figure: validation loss by epoch, cut above 250 nats where training has only begun."""
    lines = []
    for label, curve in curves.items():
        shown = [(i, v) for i, v in enumerate(curve) if v < 250]
        lines.append(Line(label, [i for i, _ in shown], [v for _, v in shown]))
    return Plot(name, title, "epoch", "validation loss (nats)", tuple(lines), levels=levels)


# -- RealNVP


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
        """log q(x) of real x (n, D), shape (n,)."""
        log_det = x.new_zeros(len(x))
        for scale, shift in zip(self.scale, self.shift, strict=True):
            a, b = x.chunk(2, 1)
            s = scale(a)
            x = torch.cat([a, (b - shift(a)) * torch.exp(-s)], 1).flip(1)
            log_det = log_det - s.sum(1)
        return log_det - 0.5 * x.square().sum(1) - 0.5 * self.dim * LOG_2PI

    def noise(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """u like x, uniform on (0, width]."""
        return self.width * (1 - torch.rand(x.shape, generator=generator, device=x.device, dtype=x.dtype))

    def printed_loss(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """-log q(x + u) of each example with one noise draw: what the notebook calls nll."""
        return -self.log_prob(x + self.noise(x, generator))

    def log_weights(self, x: Tensor, k: int, generator: torch.Generator) -> Tensor:
        y = x.repeat_interleave(k, 0)
        log_noise_density = -self.dim * math.log(self.width)
        return (self.log_prob(y + self.noise(y, generator)) - log_noise_density).view(len(x), k)


def fit_realnvp(task: Task, context: Context, width: float, name: str) -> tuple[RealNVP, list[float]]:
    """A RealNVP trained as the notebook does with noise of a width, on streams of its own by name."""
    own = context.streams
    streams = Streams(own.task, f"{own.model}-{name}", own.seed, context.device.type)
    with streams.initialisation():
        flow = RealNVP(task.info.dim, context.params["couplings"], context.params["hidden"], width)
    flow = flow.to(context.device)
    history = early_stopped(flow, flow.printed_loss, task, Context(context.params, streams, context.device))
    return flow, history


def flow_estimates(flow: RealNVP, x: Tensor, context: Context, suffix: str) -> dict[str, Estimate]:
    """The printed number and the valid bounds of one split x (n, D), with the flow's own noise.

    `nll_as_printed` is one noise draw an example, and `nll_bound_same_noise` the bound at that very draw: the loss has
    such heavy tails that independent draws differ by nats. `nll_bound` is the mean of
    -log q(x + u) + log r(u) over further draws, `nll_iw_bound` the log-mean-exp of the same weights.
    """
    with torch.no_grad():
        printed = flow.printed_loss(x, context.streams.fresh(f"printed-{suffix}"))
    same = iw_bound(flow, x, 1, context.streams.fresh(f"printed-{suffix}"))
    bound = iw_bound(flow, x, context.params["draws"], context.streams.fresh(f"bound-{suffix}"))
    return {
        f"nll_as_printed:{suffix}": nats(printed),
        f"nll_bound_same_noise:{suffix}": -same.details["elbo"],
        f"nll_bound:{suffix}": -bound.details["elbo"],
        f"nll_iw_bound:{suffix}": -bound.mean(),
    }


def realnvp(context: Context) -> Outcome:
    """The notebook's RealNVP with noise of a width: U(0, 0.5] as printed, or U(0, 1], which fills the cell."""
    task, width = load_task("digits"), context.params["width"]
    flow, history = fit_realnvp(task, context, width, "flow")
    test, valid = task.test.to(context.device), task.valid.to(context.device)
    found = {
        "nll_as_printed:valid": Estimate(min(history), math.nan, "estimate", "nats", len(valid)),
        **flow_estimates(flow, test, context, "test"),
        "nll_bound:valid": flow_estimates(flow, valid, context, "valid")["nll_bound:valid"],
        "epochs": epochs(history),
    }
    flow.width = WHOLE_CELL  # the same weights under noise that fills the cell: a bound too, and not the same one
    whole = iw_bound(flow, test, context.params["draws"], context.streams.fresh("bound-whole-cell"))
    found["nll_bound:whole_cell_noise"] = -whole.details["elbo"]
    with torch.no_grad():
        found["density_at_integers:valid"] = nats(-flow.log_prob(valid))
        found["density_at_integers:test"] = nats(-flow.log_prob(test))
    curves = {f"noise of width {width:g}": history}
    plot = validation_plot("validation", "RealNVP on digits: the notebook's loss", curves, {"author's best": 124.06})
    return Outcome(found, (plot,))


# -- VAE


def clamped_log_probability(logits: Tensor, x: Tensor) -> Tensor:
    """log of softmax(logits) (..., L) at levels x (...), with probabilities clamped as the notebooks do."""
    return level_log_probability(logits, x).clamp(math.log(CLAMP), math.log1p(-CLAMP))


def level_log_probability(logits: Tensor, x: Tensor) -> Tensor:
    """log of softmax(logits) (..., L) at levels x (...)."""
    return logits.log_softmax(-1).gather(-1, x.long().unsqueeze(-1)).squeeze(-1)


class VAE(Model):
    """The notebook's VAE: raw integers in, L latents, a free categorical for each pixel out.

    Args:
        info: levels.
        latent, hidden: sizes.
        entropy_factor: what multiplies the log variance in log q(z | x); 1 is right, an early release has `latent`.
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
        shape = (len(x), k, self.latent)
        noise = torch.randn(shape, generator=generator, device=x.device, dtype=x.dtype)
        z = mean[:, None] + (0.5 * log_var).exp()[:, None] * noise
        log_q = (-0.5 * noise.square() - 0.5 * log_var[:, None] - 0.5 * LOG_2PI).sum(-1)
        log_prior = (-0.5 * z.square() - 0.5 * LOG_2PI).sum(-1)
        return self.decode(z).unflatten(-1, (self.dim, self.levels)), log_prior, log_q, log_var.sum(-1)

    def printed_loss(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """The notebook's one-sample negative ELBO of each example, clamped probabilities and all."""
        logits, log_prior, log_q, log_var = self.terms(x, 1, generator)
        log_q = log_q.squeeze(1) - 0.5 * (self.entropy_factor - 1) * log_var
        return -(clamped_log_probability(logits.squeeze(1), x).sum(-1) + log_prior.squeeze(1) - log_q)

    def log_weights(self, x: Tensor, k: int, generator: torch.Generator) -> Tensor:
        logits, log_prior, log_q, _ = self.terms(x, k, generator)
        levels = x[:, None].expand(-1, k, -1)
        return level_log_probability(logits, levels).sum(-1) + log_prior - log_q


def vae_estimates(model: VAE, x: Tensor, context: Context, suffix: str) -> dict[str, Estimate]:
    """The printed number, the negative ELBO without its clamp, and the importance-weighted bound of x (n, D)."""
    with torch.no_grad():
        printed = model.printed_loss(x, context.streams.fresh(f"printed-{suffix}"))
    bound = iw_bound(model, x, context.params["draws"], context.streams.fresh(f"bound-{suffix}"), chunk=2000)
    return {
        f"nll_as_printed:{suffix}": nats(printed),
        f"negative_elbo:{suffix}": -bound.details["elbo"],
        f"nll_iw_bound:{suffix}": -bound.mean(),
    }


def vae(context: Context) -> Outcome:
    """The notebook's VAE, scored as printed, by its ELBO and by the importance-weighted bound."""
    task, p = load_task("digits"), context.params
    with context.streams.initialisation():
        factor = float(p["latent"]) if p["scaled_entropy"] else 1.0
        model = VAE(task.info, p["latent"], p["hidden"], factor)
    model = model.to(context.device)
    history = early_stopped(model, model.printed_loss, task, context)
    found = {
        "nll_as_printed:valid": Estimate(min(history), math.nan, "estimate", "nats", len(task.valid)),
        **vae_estimates(model, task.test.to(context.device), context, "test"),
        "nll_iw_bound:valid": vae_estimates(model, task.valid.to(context.device), context, "valid")[
            "nll_iw_bound:valid"
        ],
        "epochs": epochs(history),
    }
    levels = {"author's best": 100.54}
    plot = validation_plot("validation", "VAE on digits: one-sample negative ELBO", {"VAE": history}, levels)
    return Outcome(found, (plot,))


# -- ARM


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
        """x (n, D) -> (n, D, levels); those of pixel d see x[:, :d] only."""
        h = F.pad(x[:, None, :-1], (1, 0))
        for i, layer in enumerate(self.layers):
            h = layer(F.pad(F.leaky_relu(h) if i else h, (self.kernel - 1, 0)))
        return h.transpose(1, 2)

    def log_prob(self, x: Tensor) -> Tensor:
        return level_log_probability(self.logits(x), x).sum(-1)

    def printed_loss(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """The notebook's NLL with clamped probabilities, shape (n,); it has no noise."""
        return -clamped_log_probability(self.logits(x), x).sum(-1)


def arm(context: Context) -> Outcome:
    """The notebook's ARM, as printed and without its clamp (then exact)."""
    task, p = load_task("digits"), context.params
    with context.streams.initialisation():
        model = ARM(task.info, p["channels"], p["kernel"])
    model = model.to(context.device)
    history = early_stopped(model, model.printed_loss, task, context)
    x, none = task.test.to(context.device), context.streams.fresh("printed")
    with torch.no_grad():
        printed, exact = model.printed_loss(x, none), -model.log_prob(x)
    found = {
        "nll_as_printed:valid": Estimate(min(history), math.nan, "estimate", "nats", len(task.valid)),
        "nll_as_printed:test": nats(printed),
        "nll:test": Estimate.mean_of(exact, "exact", "nats"),
        "epochs": epochs(history),
    }
    plot = validation_plot("validation", "ARM on digits: NLL", {"ARM": history}, {"author's best": 88.72})
    return Outcome(found, (plot,))


# -- the printed dequantisation against a distribution whose entropy is known


def known_patterns(context: Context) -> tuple[Tensor, Tensor]:
    """Four random patterns (4, D) of levels 0..2 and their probabilities (4,): entropy 1.28 nats."""
    p = torch.tensor([0.4, 0.3, 0.2, 0.1])
    generator = context.streams.fresh("patterns")
    x = torch.randint(0, 3, (len(p), context.params["dim"]), generator=generator, device=context.device)
    return x.float(), p.to(context.device)


def pattern_task(patterns: Tensor, p: Tensor, context: Context) -> Task:
    """1000 training and 350 validation draws of the patterns, the book's sizes."""
    rows = torch.multinomial(p, 1350, replacement=True, generator=context.streams.fresh("data"))
    data = patterns[rows]
    info = DataInfo(patterns.shape[1], "levels", 3)
    return Task("known-patterns", "four patterns", info, data[:1000], data[1000:], data[1000:])


def against_entropy(flow: RealNVP, patterns: Tensor, p: Tensor, context: Context, name: str) -> dict[str, Estimate]:
    """Cross-entropy of the known distribution under the printed estimator less its entropy, in nats.

    For any distribution Q of the discrete data, sum_x P(x) (-log Q(x)) >= H(P) and sum_x Q(x) <= 1. An estimator of
    -log Q(x) that comes out lower, or whose exponentials sum to more than 1 over some x, is no bound.
    """
    k, generator = context.params["draws"], context.streams.fresh(f"evaluation-{name}")
    with torch.no_grad():
        printed = flow.printed_loss(patterns.repeat_interleave(k, 0), generator).view(-1, k).double()
    entropy = float(-(p * p.log()).sum())
    spread = float((p.double().square() * printed.var(1) / k).sum().sqrt())
    mass = float((-printed.mean(1)).exp().sum())
    excess = float((p.double() * printed.mean(1)).sum()) - entropy
    return {
        f"excess_over_entropy:{name}": Estimate(excess, spread, "estimate", "nats", k),
        f"total_probability:{name}": Estimate(mass, math.nan, "estimate", "probability", k),
    }


def dequantisation(context: Context) -> Outcome:
    """The notebook's RealNVP and its loss on a discrete distribution of known entropy, with both widths of noise."""
    patterns, p = known_patterns(context)
    task = pattern_task(patterns, p, context)
    found: dict[str, Estimate] = {}
    curves: dict[str, list[float]] = {}
    for name, width in (("half_cell", HALF_CELL), ("whole_cell", WHOLE_CELL)):
        flow, curves[name] = fit_realnvp(task, context, width, name)
        found.update(against_entropy(flow, patterns, p, context, name))
    entropy = float(-(p * p.log()).sum())
    title = "RealNVP on four known patterns: the notebook's loss against the entropy"
    return Outcome(found, (validation_plot("validation", title, curves, {"entropy of the data": entropy}),))


# -- the suite's own dequantised estimator, on densities whose -log P is known


class DataDensity(Model):
    """A density of y = x + u on [0, levels)^D, as the suite's dequantise-logit preprocessing shows it to a model.

    Args:
        transform: that preprocessing, already fitted.
        log_density: y (n, D) -> log q(y) (n,).
    """

    family = "reference"
    capabilities = frozenset({"log_prob"})

    def __init__(self, transform: DequantisedLogit, log_density: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.transform, self.log_density = transform, log_density

    def log_prob(self, x: Tensor) -> Tensor:
        """log q(y) + log |dy/dx| of standardised logits x (n, D), shape (n,)."""
        t = self.transform
        logit = x * t.std + t.mean
        y = t.levels * (torch.sigmoid(logit) - t.alpha) / (1 - 2 * t.alpha)
        log_slope = F.logsigmoid(logit) + F.logsigmoid(-logit) + math.log(t.levels / (1 - 2 * t.alpha)) + t.std.log()
        return self.log_density(y.clamp(0, t.levels)) + log_slope.sum(-1)


def suite_nll(log_density: Callable[[Tensor], Tensor], data: Task, x: Tensor, context: Context) -> Tensor:
    """-log P of integers x (n, D) by the suite's log-mean-exp over noise draws, shape (n,), float64."""
    assert data.info.levels is not None
    transform = DequantisedLogit(data.info.dim, data.info.levels).double().to(context.device)
    noise = context.streams.fresh("evaluation")
    transform.fit(data.train.double().to(context.device), noise)
    model = Preprocessed(DataDensity(transform, log_density), data.info, "logit").to(context.device)
    model.transform = transform
    effort = Effort(dequantisation_draws=context.params["draws"])
    return -log_likelihood(model, x.double().to(context.device), effort, noise).values


def uniform_reference(context: Context) -> Outcome:
    """The uniform density over the cube: every image and every draw must give 64 ln 17."""
    task = load_task("digits")
    exact = task.info.dim * math.log(17)
    values = suite_nll(lambda y: torch.full_like(y[:, 0], -exact), task, task.test, context)
    error = float((values - exact).abs().max())
    return Outcome(
        {
            "nll_uniform": Estimate.exact(values.mean(), "nats", len(values)),
            "nll_uniform_error": Estimate.exact(error, "nats", len(values)),
        }
    )


def cell_noise(context: Context) -> Outcome:
    """A density that falls linearly inside each cell: only noise over the whole cell finds its -log P.

    q(y) = 2 P(x) (1 - f) on y = x + f. Its mean over f ~ U[0, 1) is P(x); over U(0, 0.5] it is 1.5 P(x), so that an
    estimator with half the cell would be -ln 1.5 = -0.41 nats off.
    """
    levels = torch.arange(17, dtype=torch.float64, device=context.device)
    p = (-0.5 * ((levels - 6) / 4).square()).softmax(0)
    x = levels[:, None]
    data = Task("ramp", "one pixel of 17 levels", DataInfo(1, "levels", 17), x, x, x)

    def log_density(y: Tensor) -> Tensor:
        level = y.floor().clamp(max=16).squeeze(1)
        return p[level.long()].log() + math.log(2) + torch.log((1 - (y.squeeze(1) - level)).clamp_min(1e-12))

    found = suite_nll(log_density, data, data.test, context)
    excess = float((p * (found + p.log())).sum())
    return Outcome({"excess_over_entropy": Estimate(excess, math.nan, "estimate", "nats", context.params["draws"])})


_LOOP: dict[str, Any] = {"lr": 1e-3, "batch_size": 64, "patience": 20, "max_epochs": 1000}

REALNVP = Experiment(
    "textbook-realnvp",
    "the textbook's RealNVP on digits with its noise U(0, 0.5]: as printed, and as a valid bound",
    "flow",
    realnvp,
    {**_LOOP, "couplings": 8, "hidden": 256, "draws": 16, "width": HALF_CELL},
    seeds=3,
    tasks=("digits",),
    profiles=("standard", "full"),  # in full beside the model with noise over the whole cell
)
REALNVP_WHOLE_CELL = replace(
    REALNVP,
    name="textbook-realnvp-whole-cell",
    about="the same code with noise that fills the cell, which makes its loss a bound",
    params={**REALNVP.params, "width": WHOLE_CELL},
    profiles=("full",),
)
VARIATIONAL = Experiment(
    "textbook-vae",
    "the textbook's VAE on digits: as printed, its ELBO, and the importance-weighted bound",
    "vae",
    vae,
    {**_LOOP, "latent": 16, "hidden": 256, "draws": 64, "scaled_entropy": False},
    seeds=3,
    tasks=("digits",),
)
VAE_EARLY_RELEASE = replace(
    VARIATIONAL,
    name="textbook-vae-early-release",
    about="the VAE notebook's early release, whose log q(z | x) multiplies the log variance by the number of latents",
    params={**VARIATIONAL.params, "scaled_entropy": True},
    profiles=("full",),
)
AUTOREGRESSIVE = Experiment(
    "textbook-arm",
    "the textbook's ARM on digits: as printed, and exact",
    "autoregressive",
    arm,
    {**_LOOP, "channels": 256, "kernel": 7},
    seeds=3,
    tasks=("digits",),
    profiles=("full",),
)
DEQUANTISATION = Experiment(
    "textbook-dequantisation",
    "the textbook's noise U(0, 0.5] against a discrete distribution of known entropy",
    "flow",
    dequantisation,
    {**_LOOP, "lr": 5e-3, "max_epochs": 20, "dim": 8, "couplings": 4, "hidden": 32, "draws": 2000},
    seeds=3,
)
REFERENCE = Experiment(
    "textbook-reference",
    "the uniform distribution on digits through the suite's dequantised estimator",
    "reference",
    uniform_reference,
    {"draws": 2},
    seeds=1,
    tasks=("digits",),
    precision="float64",
)

CELL_NOISE = Experiment(
    "textbook-cell-noise",
    "the suite's dequantised estimator on a density that varies inside each cell",
    "reference",
    cell_noise,
    {"draws": 5000},
    precision="float64",
)

PAPER = Paper(
    "textbook",
    Path(__file__).with_suffix(".toml"),
    experiments=(
        REALNVP,
        REALNVP_WHOLE_CELL,
        VARIATIONAL,
        VAE_EARLY_RELEASE,
        AUTOREGRESSIVE,
        DEQUANTISATION,
        REFERENCE,
        CELL_NOISE,
    ),
)
