"""The cells of table 1 and appendix D on MNIST: training by the released code's rule, and the bound on test bits."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from replicate.experiments import Experiment, Run, experiment
from replicate.likelihood.importance import iw_bound
from replicate.papers.burda.autoencoder import ImportanceWeightedAutoencoder
from replicate.resume import State, resumable
from replicate.tasks.images import FILES, TEST_BITS_SEED, binarise, grey_values, mnist_static

STAGES = 8
#: minutes per seed of ten million steps of about a hundred kernels each, if a step takes 0.36 ms. Never measured: the
#: loop launches each kernel by itself, and may take several times as long.
GPU_MINUTES = 60
#: rows for a CPU divide the epochs of every stage by this: 44 epochs are left
SHORTENED = 81
#: examples that the code holds out of MNIST's 60,000; nothing is selected on them
HELD_OUT = 400
#: latent and hidden widths from the data upwards, by number of stochastic layers
LATENTS: dict[int, tuple[int, ...]] = {1: (50,), 2: (100, 50)}
HIDDEN: dict[int, tuple[int, ...]] = {1: (200,), 2: (200, 100)}


@dataclass(frozen=True)
class Settings:
    """Settings of one cell.

    Attributes:
        weighted, draws, doubly: of `ImportanceWeightedAutoencoder`.
        layers: stochastic layers.
        dynamic: draw the training bits afresh for every batch, else take static bits.
        shortened, stages: of `schedule`.
        samples: importance samples of the test bound.
        rows: how many training and test images are used; 0 for all.
    """

    weighted: bool
    draws: int
    layers: int = 1
    dynamic: bool = True
    doubly: bool = False
    shortened: int = 1
    samples: int = 5000
    stages: int = STAGES
    batch_size: int = 20
    rows: int = 0


def training_and_test(dynamic: bool) -> tuple[Tensor, Tensor]:
    """Return training intensities, or static bits, (n, 784), and test bits (10000, 784)."""
    if not dynamic:
        task = mnist_static()
        return task.train, task.test
    train, test = (part.float() / 255 for part in grey_values("mnist"))
    return train[:-HELD_OUT], binarise(test, torch.Generator().manual_seed(TEST_BITS_SEED))


class CodeAdam:
    """Adam as the released code has it: second moments start at 1, and eps = 1e-4 is outside the bias correction."""

    def __init__(self, parameters: Sequence[Tensor], beta1: float = 0.99, beta2: float = 0.999) -> None:
        self.parameters, self.beta1, self.beta2, self.step_number = list(parameters), beta1, beta2, 1
        self.first = [torch.zeros_like(p) for p in self.parameters]
        self.second = [torch.ones_like(p) for p in self.parameters]

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Take a step against the gradients that the parameters hold."""
        rate = lr * math.sqrt(1 - self.beta2**self.step_number) / (1 - self.beta1**self.step_number)
        self.step_number += 1
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        torch._foreach_lerp_(self.first, gradients, 1 - self.beta1)
        torch._foreach_mul_(self.second, self.beta2)
        torch._foreach_addcmul_(self.second, gradients, gradients, 1 - self.beta2)
        scale = torch._foreach_sqrt(self.second)
        torch._foreach_add_(scale, 1e-4)
        change = torch._foreach_mul(self.first, rate)
        torch._foreach_div_(change, scale)
        torch._foreach_sub_(self.parameters, change)

    def state_dict(self) -> dict[str, Any]:
        """Return both moments and the number of the next step."""
        return {"first": self.first, "second": self.second, "step_number": self.step_number}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from such a state."""
        for moment, saved in zip([*self.first, *self.second], [*state["first"], *state["second"]], strict=True):
            moment.copy_(saved)
        self.step_number = state["step_number"]


def schedule(stages: int, shortened: int = 1) -> Iterator[tuple[int, float]]:
    """Yield (epochs, learning rate) of each stage: 3^i at 1e-3 * 10^(-i/7), the rate to two digits as in the code.

    Args:
        stages: how many.
        shortened: the divisor of every stage's epochs, of which at least one stays.
    """
    for i in range(stages):
        yield max(1, 3**i // shortened), 1e-4 * round(10 ** (1 - i / 7), 1)


def fit(model: ImportanceWeightedAutoencoder, train: Tensor, run: Run, s: Settings) -> list[float]:
    """Train through all stages, and return the mean training loss of every stage in nats."""
    noise, bits = run.stream("noise"), run.stream("bits")
    model.initialise(train, noise)
    optimizer = CodeAdam(list(model.parameters()))
    batches = train.split(s.batch_size)
    # of every epoch: its stage's epochs and learning rate, and whether the stage ends with it
    plan = [(n, lr, i + 1 == n) for n, lr in schedule(s.stages, s.shortened) for i in range(n)]
    state: State = {"model": model, "optimizer": optimizer, "noise": noise, "bits": bits}
    state |= {"total": torch.zeros((), device=train.device), "losses": []}
    # an epoch may take minutes, a batch does not
    for step in resumable("training", len(plan) * len(batches), state):
        epoch, i = divmod(step, len(batches))
        epochs, lr, last_of_stage = plan[epoch]
        model.zero_grad(set_to_none=True)
        loss = model.loss(binarise(batches[i], bits) if s.dynamic else batches[i], noise)
        loss.backward()
        optimizer.step(lr)
        state["total"] += loss.detach()
        if last_of_stage and i + 1 == len(batches):
            state["losses"].append(float(state["total"]) / (epochs * len(train)))
            state["total"].zero_()
    losses: list[float] = state["losses"]
    return losses


def train_and_score(run: Run, s: Settings) -> None:
    """Train one cell of table 1, and bound -log p of the test bits with many importance samples."""
    train, test = (part[: s.rows or None].to(run.device) for part in training_and_test(s.dynamic))
    with run.initialisation():
        model = ImportanceWeightedAutoencoder(
            train.shape[1], LATENTS[s.layers], HIDDEN[s.layers], s.draws, s.weighted, s.doubly
        )
    model = model.to(run.device)
    losses = fit(model, train, run, s)
    bound = iw_bound(model, test, s.samples, run.stream("evaluation"))
    run.measure_all({"nll": -bound.mean(), "negative_elbo": -bound.details["elbo"], "ess": bound.details["ess"]})
    epochs = list(itertools.accumulate(float(n) for n, _ in schedule(s.stages, s.shortened)))
    title = "mean training bound of each stage"
    run.curves("training", title, ("epochs", "nats"), {"training bound": (epochs, losses)}, log="x")
    run.keep_examples("mnist-dynamic" if s.dynamic else "mnist-static", bound)


def cell(s: Settings) -> Experiment:
    """Declare the experiment of one cell of the tables."""
    kind, data = ("dreg" if s.doubly else "iwae") if s.weighted else "vae", "dynamic" if s.dynamic else "static"
    words = "IWAE by doubly reparameterised gradients" if s.doubly else kind.upper()
    name = f"burda-{kind}-{s.layers}-k{s.draws}-{data}"
    about = f"{words} with {s.layers} stochastic layer(s), k = {s.draws}, {data} bits of MNIST"
    if s.shortened > 1:
        epochs = sum(n for n, _ in schedule(s.stages, s.shortened))
        name, about = f"{name}-short", f"{about}, {epochs} of the paper's 3280 epochs"
    return experiment(
        name,
        about=about,
        family="vae",
        settings=s,
        seeds=3,
        profiles=("full",),
        files=FILES[f"mnist-{data}"],
        cuda_minutes=0 if s.shortened > 1 else GPU_MINUTES,
    )(train_and_score)


def shortened(weighted: bool, draws: int, doubly: bool = False) -> Settings:
    """Return the settings of a cell for machines without a GPU."""
    return Settings(weighted, draws, doubly=doubly, shortened=SHORTENED, samples=500)


ROWS = tuple(
    cell(s)
    for s in (
        *(
            Settings(weighted, draws, layers)
            for layers in (1, 2)
            for weighted, draws in ((True, 1), (False, 5), (False, 50), (True, 5), (True, 50))
        ),
        *(Settings(True, draws, dynamic=False) for draws in (1, 5, 50)),
        *(Settings(True, draws, doubly=True) for draws in (1, 5, 50)),
        *(shortened(weighted, draws) for weighted, draws in ((True, 1), (False, 5), (True, 5))),
        shortened(True, 5, doubly=True),
    )
)
