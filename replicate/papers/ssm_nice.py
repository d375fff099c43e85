"""NICE by score matching: Song, Garg, Shi, Ermon 2019, 1905.07088, section 5.1.2 and Table 1.

NICE (Dinh et al. 2015, 1410.8516) has a tractable likelihood and is trained here by maximum likelihood, sliced and
denoising score matching; both the exact score matching loss and the log-likelihood of test images are then measured.
Both belong to the logits that the model sees: no change of variables leads back to pixels, and mass that the clipping
puts on one value of a pixel is a density without bound there.

Deviations: the copy kept is the one with the least validation loss of its own objective, looked at once an epoch
(the released code also reports those that are best by log-likelihood and by the exact loss); the printed five hidden
layers a coupling are four in the released code. Curvature propagation and approximate backpropagation are not here.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from replicate.experiments.batches import Minibatches
from replicate.model import Estimate
from replicate.resume import State, resumable
from replicate.runs.experiment import Context, Experiment, Line, Outcome, Plot
from replicate.score_based import matching
from replicate.score_based.networks import mlp
from replicate.tasks.digits import digits
from replicate.tasks.images import FILES, grey_values

COUPLINGS = 4
#: pixels are clipped to [CLIP, 1 - CLIP] before the logit
CLIP = 1e-3


class NICE(nn.Module):
    """Additive couplings and a diagonal scale to a standard normal.

    Args:
        dim: D, even.
        hidden: units of a hidden layer.
        depth: hidden layers of a coupling.
    """

    order: Tensor

    def __init__(self, dim: int, hidden: int, depth: int) -> None:
        super().__init__()
        if dim % 2:
            raise ValueError(f"NICE needs an even number of dimensions, not {dim}")
        half = dim // 2
        self.shifts = nn.ModuleList(mlp([half, *[hidden] * depth, half], "softplus") for _ in range(COUPLINGS))
        self.log_scale = nn.Parameter(torch.zeros(dim))
        self.register_buffer("order", torch.cat([torch.arange(0, dim, 2), torch.arange(1, dim, 2)]))

    def forward(self, x: Tensor) -> Tensor:
        """x (n, D) -> z (n, D); every coupling moves one half by a function of the other, in turn."""
        kept, moved = x[:, self.order].chunk(2, dim=1)
        for shift in self.shifts:
            kept, moved = moved + shift(kept), kept
        return torch.cat([kept, moved], dim=1) * self.log_scale.exp()

    def log_prob(self, x: Tensor) -> Tensor:
        """Log density in nats of logits x (n, D), shape (n,)."""
        normal = -0.5 * self(x).square().sum(1) - 0.5 * x.shape[1] * math.log(2 * math.pi)
        return normal + self.log_scale.sum()

    def score(self, x: Tensor) -> Tensor:
        """grad_x log p (n, D), differentiable again."""
        x = x if x.requires_grad else x.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(self.log_prob(x).sum(), x, create_graph=True)
        return gradient


def score_matching_loss(net: NICE, x: Tensor, chunk: int) -> Tensor:
    """Exact score matching loss of each x (n, D), shape (n,); unlike the suite's objective it keeps no graph."""
    parts = x.split(chunk)
    state: State = {"values": []}
    for k in resumable("exact score matching loss", len(parts), state):
        at = parts[k].detach().requires_grad_(True)
        score = net.score(at)
        value = 0.5 * score.detach().square().sum(1)
        for i in range(x.shape[1]):
            (row,) = torch.autograd.grad(score[:, i].sum(), at, retain_graph=True)
            value += row[:, i]
        state["values"].append(value)
    return torch.cat(state["values"])


# --- data ------------------------------------------------------------------------------------------------------------


class Images(NamedTuple):
    """Grey levels 0 .. levels - 1 as floats, each part (n, D)."""

    train: Tensor
    validation: Tensor
    test: Tensor
    levels: int


def mnist(draws: torch.Generator) -> Images:
    """MNIST; a random tenth of the training images is for validation, as in the released code.

    Raises:
        UsageError: the files are not in REPLICATE_DATA/mnist.
    """
    train, test = (part.float() for part in grey_values("mnist"))
    shuffled = train[torch.randperm(len(train), generator=draws, device=draws.device).cpu()]
    cut = len(train) - len(train) // 10
    return Images(shuffled[:cut], shuffled[cut:], test, 256)


def small_digits(draws: torch.Generator) -> Images:
    """The suite's 8x8 digits on the textbook's split."""
    task = digits()
    assert task.info.levels is not None
    return Images(task.train, task.valid, task.test, task.info.levels)


SOURCES: Mapping[str, Callable[[torch.Generator], Images]] = {"mnist": mnist, "digits": small_digits}


def to_logits(x: Tensor, levels: int, draws: torch.Generator) -> Tensor:
    """Logits of levels x (n, D) on [0, 1] with noise of one level's width about each, clipped (section 5.1.2)."""
    noise = torch.rand(x.shape, generator=draws, device=x.device) - 0.5
    return torch.logit((x / (levels - 1) + noise / levels).clamp(CLIP, 1 - CLIP))


# --- training --------------------------------------------------------------------------------------------------------

Objective = Callable[[NICE, Tensor, torch.Generator], Tensor]


def likelihood(net: NICE, x: Tensor, draws: torch.Generator) -> Tensor:
    """-log p, shape (n,)."""
    return -net.log_prob(x)


def sliced(net: NICE, x: Tensor, draws: torch.Generator) -> Tensor:
    """Equation 7 with one Rademacher projection an example, shape (n,)."""
    return matching.sliced_score_matching(net.score, x, matching.rademacher(x, draws))


def sliced_vr(net: NICE, x: Tensor, draws: torch.Generator) -> Tensor:
    """Equation 8 with one Rademacher projection an example, shape (n,)."""
    return matching.sliced_score_matching_vr(net.score, x, matching.rademacher(x, draws))


def denoising(sigma: float) -> Objective:
    """Denoising score matching with noise of standard deviation sigma, in logits."""

    def objective(net: NICE, x: Tensor, draws: torch.Generator) -> Tensor:
        z = torch.randn(x.shape, generator=draws, device=x.device)
        return matching.denoising_score_matching(net.score, x, sigma, z)

    return objective


OBJECTIVES: Mapping[str, Objective] = {
    "mle": likelihood,
    "ssm-vr": sliced_vr,
    "ssm": sliced,
    "dsm-0.10": denoising(0.10),
    "dsm-1.74": denoising(1.74),
}


class Trained(NamedTuple):
    """A network with its best weights and the validation losses (step, value) on the way."""

    net: NICE
    validation: list[tuple[int, float]]


def validate(net: NICE, objective: Objective, images: Images, batch: int, draws: torch.Generator) -> float:
    """Mean objective over the validation images with one noise draw."""
    total = 0.0
    for part in images.validation.split(batch):
        total += float(objective(net, to_logits(part, images.levels, draws), draws).detach().sum())
    return total / len(images.validation)


def train(
    net: NICE, objective: Objective, images: Images, settings: Mapping[str, Any], lr: float, draws: torch.Generator
) -> Trained:
    """Adam for a number of epochs; the weights with the least validation loss are kept.

    Args:
        settings: "epochs", "batch" and "validate_every" (epochs).
        lr: Adam's learning rate.
        draws: order of the examples, dequantisation and what is random in the objective.
    """
    optimizer = torch.optim.Adam(net.parameters(), lr=lr)
    batches = Minibatches(images.train, settings["batch"], draws)
    steps, validate_every = (settings[name] * len(batches) for name in ("epochs", "validate_every"))
    state: State = {
        "net": net,
        "optimizer": optimizer,
        "batches": batches,  # and with them their generator, which is that of all draws
        "best": copy.deepcopy(net.state_dict()),
        "least": math.inf,
        "curve": [],
    }
    for step in resumable("training", steps, state):
        optimizer.zero_grad(set_to_none=True)
        objective(net, to_logits(next(batches), images.levels, draws), draws).mean().backward()
        optimizer.step()
        if (step + 1) % validate_every == 0:
            loss = validate(net, objective, images, settings["batch"], draws)
            state["curve"].append((step + 1, loss))
            if loss < state["least"]:
                state |= {"best": copy.deepcopy(net.state_dict()), "least": loss}
        if step + 1 == steps:
            net.load_state_dict(state["best"])
            state |= {"optimizer": None, "best": None}  # what a checkpoint of the rest need not carry
    return Trained(net, state["curve"])


def measure(net: NICE, images: Images, settings: Mapping[str, Any], draws: torch.Generator) -> dict[str, Estimate]:
    """Exact score matching loss and log-likelihood of the test images' logits."""
    x = to_logits(images.test[: settings["test_images"]], images.levels, draws)
    with torch.no_grad():
        log_prob = torch.cat([net.log_prob(part) for part in x.split(settings["batch"])])
    loss = score_matching_loss(net, x, settings["batch"])
    return {
        "sm_loss": Estimate.mean_of(loss, "estimate", "score matching loss"),
        "log_likelihood": Estimate.mean_of(log_prob, "exact", "nats"),
    }


def prepare(context: Context) -> tuple[Images, Callable[[], NICE]]:
    """The images on the context's device and a maker of networks, all with the same initial weights."""
    p = context.params
    read = SOURCES[p["data"]](context.streams.fresh("split"))
    train_part, validation, test = (part.to(context.device) for part in read[:3])
    images = Images(train_part, validation, test, read.levels)

    def make() -> NICE:
        with context.streams.initialisation():
            net = NICE(images.train.shape[1], p["hidden"], p["depth"])
        return net.to(context.device)

    return images, make


def validation_plot(title: str, curves: Mapping[str, list[tuple[int, float]]]) -> Plot:
    """Validation loss of each run against its steps."""
    lines = tuple(Line(name, [s for s, _ in curve], [v for _, v in curve]) for name, curve in curves.items())
    return Plot("validation", title, "training steps", "validation loss of its own objective", lines)


# --- Table 1 ---------------------------------------------------------------------------------------------------------


def table_1(context: Context) -> Outcome:
    """Test score matching loss and log-likelihood of NICE by training objective."""
    images, make = prepare(context)
    estimates: dict[str, Estimate] = {}
    curves: dict[str, list[tuple[int, float]]] = {}
    for name, objective in OBJECTIVES.items():
        draws = context.streams.fresh("training")
        net, curves[name] = train(make(), objective, images, context.params, context.params["lr"], draws)
        found = measure(net, images, context.params, context.streams.fresh("test"))
        estimates |= {f"{metric}:{name}": value for metric, value in found.items()}
    why = "curvature propagation and approximate backpropagation are not implemented"
    missing = {f"{metric}:{name}": why for name in ("cp", "approximate-bp") for metric in ("sm_loss", "log_likelihood")}
    return Outcome(estimates, (validation_plot("NICE by objective", curves),), missing)


NICE_MNIST = Experiment(
    name="ssm-nice-mnist",
    about="NICE on MNIST by maximum likelihood, sliced and denoising score matching",
    family="flow",
    run=table_1,
    params={
        "data": "mnist",
        "hidden": 1000,
        "depth": 5,
        "epochs": 100,
        "batch": 128,
        "lr": 1e-3,
        "validate_every": 1,
        "test_images": 10_000,
    },
    seeds=3,
    profiles=("full",),
    files=FILES["mnist-dynamic"],
    cuda_minutes=10,
)


# --- as printed, as released: the learning rate ----------------------------------------------------------------------

RATES = {"1e-3": 1e-3, "1e-4": 1e-4}


def learning_rates(context: Context) -> Outcome:
    """Sliced score matching at the printed and at the released learning rate, for equal steps and equal noise."""
    images, make = prepare(context)
    estimates: dict[str, Estimate] = {}
    curves: dict[str, list[tuple[int, float]]] = {}
    for name, lr in RATES.items():
        draws = context.streams.fresh("training")
        net, curves[name] = train(make(), sliced, images, context.params, lr, draws)
        found = measure(net, images, context.params, context.streams.fresh("test"))
        estimates |= {f"{metric}:{name}": value for metric, value in found.items()}
    return Outcome(estimates, (validation_plot("NICE by sliced score matching, by Adam's learning rate", curves),))


LEARNING_RATE = Experiment(
    name="ssm-nice-learning-rate",
    about="NICE on 8x8 digits by sliced score matching at learning rates 1e-3 and 1e-4",
    family="flow",
    run=learning_rates,
    params={
        "data": "digits",
        "hidden": 64,
        "depth": 2,
        "epochs": 60,
        "batch": 128,
        "validate_every": 5,
        "test_images": 100,
    },
    seeds=3,
    tasks=("digits",),
)
