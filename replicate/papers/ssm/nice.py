"""NICE by score matching (section 5.1.2 and Table 1).

NICE (Dinh et al. 2015, 1410.8516) has a tractable likelihood and is trained here by maximum likelihood, sliced and
denoising score matching; both the exact score matching loss and the log-likelihood of test images are then measured.
Both belong to the logits that the model sees: no change of variables leads back to pixels, and the clipping puts mass
on single values of a pixel, where the density has no bound.

Deviations: the kept weights are those with the least validation loss of their own objective, which is computed once per
epoch (the released code also reports the best ones by log-likelihood and by the exact loss); the printed five hidden
layers per coupling are four in the released code.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from replicate.experiments import Check, Run, experiment, fit
from replicate.experiments.batches import Minibatches
from replicate.model import Estimate
from replicate.resume import State, resumable
from replicate.sampling.langevin import standard_normal_like
from replicate.score_based import matching
from replicate.score_based.networks import mlp, score_of
from replicate.tasks.digits import digits
from replicate.tasks.images import FILES, grey_values

COUPLINGS = 4
#: pixels are clipped to [CLIP, 1 - CLIP] before the logit
CLIP = 1e-3


class NICE(nn.Module):
    """Additive couplings, `depth` hidden layers each, and a diagonal scale to a standard normal of even dimension D."""

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
        """Map x (n, D) to z (n, D); the couplings shift the two halves in turn, each by a function of the other."""
        kept, moved = x[:, self.order].chunk(2, dim=1)
        for shift in self.shifts:
            kept, moved = moved + shift(kept), kept
        return torch.cat([kept, moved], dim=1) * self.log_scale.exp()

    def log_prob(self, x: Tensor) -> Tensor:
        """Return the log density in nats of logits x (n, D), shape (n,)."""
        normal = -0.5 * self(x).square().sum(1) - 0.5 * x.shape[1] * math.log(2 * math.pi)
        return normal + self.log_scale.sum()

    def score(self, x: Tensor) -> Tensor:
        """Return grad_x log p (n, D), differentiable again."""
        return score_of(lambda y: -self.log_prob(y))(x)


def score_matching_loss(net: NICE, x: Tensor, chunk: int) -> Tensor:
    """Return the exact score matching loss of each x (n, D), shape (n,), without the graph of the suite's objective."""
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


class Images(NamedTuple):
    """Grey levels 0 .. levels - 1 as floats, each part (n, D)."""

    train: Tensor
    validation: Tensor
    test: Tensor
    levels: int


def mnist(draws: torch.Generator) -> Images:
    """Read MNIST; a random tenth of the training images is for validation, as in the released code.

    Raises:
        UsageError: the files are not in REPLICATE_DATA/mnist.
    """
    train, test = (part.float() for part in grey_values("mnist"))
    shuffled = train[torch.randperm(len(train), generator=draws, device=draws.device).cpu()]
    cut = len(train) - len(train) // 10
    return Images(shuffled[:cut], shuffled[cut:], test, 256)


def small_digits(draws: torch.Generator) -> Images:
    """Return the suite's 8x8 digits on the textbook's split."""
    task = digits()
    assert task.info.levels is not None
    return Images(task.train, task.valid, task.test, task.info.levels)


SOURCES: Mapping[str, Callable[[torch.Generator], Images]] = {"mnist": mnist, "digits": small_digits}


def to_logits(x: Tensor, levels: int, draws: torch.Generator) -> Tensor:
    """Return logits of levels x (n, D) on [0, 1], with noise one level wide and clipped (section 5.1.2)."""
    noise = torch.rand(x.shape, generator=draws, device=x.device) - 0.5
    return torch.logit((x / (levels - 1) + noise / levels).clamp(CLIP, 1 - CLIP))


#: the loss of each logit vector x (n, D), shape (n,), with its random draws
Objective = Callable[[NICE, Tensor, torch.Generator], Tensor]


def sliced(objective: Callable[[matching.Score, Tensor, Tensor], Tensor]) -> Objective:
    """Return a sliced objective with one Rademacher projection per example."""
    return lambda net, x, draws: objective(net.score, x, matching.rademacher(x, draws))


def denoising(net: NICE, x: Tensor, draws: torch.Generator, *, sigma: float) -> Tensor:
    """Return the denoising score matching loss with noise of standard deviation sigma, in logits."""
    return matching.denoising_score_matching(net.score, x, sigma, standard_normal_like(x, draws))


OBJECTIVES: Mapping[str, Objective] = {
    "mle": lambda net, x, draws: -net.log_prob(x),
    "ssm-vr": sliced(matching.sliced_score_matching_vr),
    "ssm": sliced(matching.sliced_score_matching),
    "dsm-0.10": partial(denoising, sigma=0.10),
    "dsm-1.74": partial(denoising, sigma=1.74),
}


@dataclass(frozen=True)
class Settings:
    """Settings of both experiments, by default those on the small digits; they validate every so many epochs."""

    data: str = "digits"
    hidden: int = 64
    depth: int = 2
    epochs: int = 60
    batch: int = 128
    validate_every: int = 5
    test_images: int = 100


@dataclass(frozen=True)
class MnistSettings(Settings):
    """Settings of Table 1, with Adam's learning rate."""

    data: str = "mnist"
    hidden: int = 1000
    depth: int = 5
    epochs: int = 100
    validate_every: int = 1
    test_images: int = 10_000
    lr: float = 1e-3


def train(
    net: NICE, objective: Objective, images: Images, s: Settings, lr: float, draws: torch.Generator
) -> list[tuple[int, float]]:
    """Train by Adam, keep the weights with the least validation loss, and return (step, validation loss).

    The draws are for the order of the examples, dequantisation and the objective.
    """
    batches = Minibatches(images.train, s.batch, draws)

    def loss_of(levels: Tensor) -> Tensor:
        return objective(net, to_logits(levels, images.levels, draws), draws)

    def validation_loss() -> float:
        losses = (float(loss_of(part).detach().sum()) for part in images.validation.split(s.batch))
        return sum(losses) / len(images.validation)

    optimizer = torch.optim.Adam(net.parameters(), lr=lr)
    check = Check(s.validate_every * len(batches), validation_loss)
    state = {"batches": batches}  # which saves its generator, that of all draws
    return fit(net, lambda: loss_of(next(batches)).mean(), optimizer, s.epochs * len(batches), state, check).checks


def measure(net: NICE, images: Images, s: Settings, draws: torch.Generator) -> dict[str, Estimate]:
    """Measure the exact score matching loss and the log-likelihood of the test images' logits."""
    x = to_logits(images.test[: s.test_images], images.levels, draws)
    with torch.no_grad():
        log_prob = torch.cat([net.log_prob(part) for part in x.split(s.batch)])
    loss = Estimate.mean_of(score_matching_loss(net, x, s.batch), "estimate", "score matching loss")
    return {"sm_loss": loss, "log_likelihood": Estimate.mean_of(log_prob, "exact", "nats")}


def compare(run: Run, s: Settings, methods: Mapping[str, tuple[Objective, float]], title: str) -> None:
    """Train NICE by each (objective, learning rate) from the same weights and noise, measure and plot."""
    training, validation, test, levels = SOURCES[s.data](run.stream("split"))
    images = Images(training.to(run.device), validation.to(run.device), test.to(run.device), levels)
    curves = {}
    for name, (objective, lr) in methods.items():
        net = run.build(lambda: NICE(images.train.shape[1], s.hidden, s.depth))
        checks = train(net, objective, images, s, lr, run.stream("training"))
        curves[name] = [step for step, _ in checks], [loss for _, loss in checks]
        run.measure_all(measure(net, images, s, run.stream("test")), name)
    run.curves("validation", title, ("training steps", "validation loss of its own objective"), curves)


@experiment("ssm-nice-mnist", family="flow", seeds=3, profiles=("full",), files=FILES["mnist-dynamic"], cuda_minutes=10)
def table_1(run: Run, s: MnistSettings) -> None:
    """NICE on MNIST by maximum likelihood, sliced and denoising score matching."""
    compare(run, s, {name: (objective, s.lr) for name, objective in OBJECTIVES.items()}, "NICE by objective")
    for name in ("cp", "approximate-bp"):
        for metric in ("sm_loss", "log_likelihood"):
            run.omit(f"{metric}:{name}", "curvature propagation and approximate backpropagation are not implemented")


# the learning rates that are printed and released
@experiment("ssm-nice-learning-rate", family="flow", seeds=3, tasks=("digits",))
def learning_rates(run: Run, s: Settings) -> None:
    """NICE on 8x8 digits by sliced score matching at learning rates 1e-3 and 1e-4."""
    rates = {"1e-3": (OBJECTIVES["ssm"], 1e-3), "1e-4": (OBJECTIVES["ssm"], 1e-4)}
    compare(run, s, rates, "NICE by sliced score matching, by Adam's learning rate")
