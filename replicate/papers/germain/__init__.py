"""Germain, Gregor, Murray and Larochelle 2015: MADE: Masked Autoencoder for Distribution Estimation, 1502.03509.

Replicated: test NLL on static bits of MNIST of MADE with one and two hidden layers of 8000 units, trained with one set
of masks and with 32 in turn, whose densities are averaged.

The settings are those of the command that the released code (github.com/mgermain/MADE) gives for the best of the four
rows: two layers of 8000 rectified units, a direct connection to the outputs, orthogonal start, AdaGrad at 0.01 with
1e-6 under the root, batches of 100 in the order of the file, training until 30 epochs in a row have not improved the
validation NLL, the best epoch kept, random orders in every set. The settings of the three other rows could not be
checked against a text: they are the same here.

Deviations: output biases start at the training marginals, not at zero. 32 sets are trained and averaged; by its text,
the code with 32 sets trains on 33 and averages 33: it averages one that was never trained, and leaves out the first
that was. Training ends at 1000 epochs at the latest.

`made-static-short` is no row of the paper: 500 units and minutes of one CPU core, with dropout, Adam, averaged weights
and the best validated step, through the suite's own training loop.
"""

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from baselines.made import MaskedAutoencoder
from replicate.experiments import Paper, Run
from replicate.experiments.image_rows import (
    RowSettings,
    exact_nll,
    exact_row,
    full_row,
    log_prob,
    splits,
    validation_plot,
)
from replicate.model import DataInfo
from replicate.resume import State, resumable
from replicate.tasks.images import mnist_static

#: rows scored at a time
CHUNK = 5000


@torch.no_grad()
def adagrad_step(parameters: list[Tensor], squares: list[Tensor], lr: float) -> None:
    """Take a step of AdaGrad as the released code has it, 1e-6 under the root; add to the sums of squares in place."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    torch._foreach_addcmul_(squares, gradients, gradients, 1.0)
    roots = torch._foreach_add(squares, 1e-6)
    torch._foreach_sqrt_(roots)
    torch._foreach_addcdiv_([*parameters], gradients, roots, -lr)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of a row of the paper.

    Attributes:
        epochs, patience: at most, and how many in a row without a better validation NLL end training.
        rows: how many of each part of the data are used; 0 for all.
    """

    layers: int
    masks: int
    hidden: int = 8000
    dropout: float = 0.0
    lr: float = 0.01
    batch_size: int = 100
    epochs: int = 1000
    patience: int = 30
    rows: int = 0


@dataclass(frozen=True, kw_only=True)
class Short(RowSettings):
    """Settings of the small row."""

    hidden: int = 500
    layers: int = 1
    masks: int = 1
    dropout: float = 0.3
    steps: int = 8000
    batch_size: int = 200
    lr: float = 0.01
    warmup: int = 100
    weight_decay: float = 0.1
    ema: float = 0.995
    validate_every: int = 250


def build(info: DataInfo, s: Settings | Short) -> MaskedAutoencoder:
    """Return the untrained model."""
    return MaskedAutoencoder(info, s.hidden, s.layers, s.masks, dropout=s.dropout)


def fit(model: MaskedAutoencoder, train: Tensor, valid: Tensor, run: Run, s: Settings) -> list[tuple[int, float]]:
    """Train by the code's rule, leave the best epoch's weights, and return (epoch, validation NLL) of each epoch."""
    model.initialise(train, run.streams.get("initialise"))
    batches, noise = train.split(s.batch_size), run.streams.get("noise")
    parameters: list[Tensor] = list(model.parameters())
    state: State = {"model": model, "noise": noise, "squares": [torch.zeros_like(p) for p in parameters]}
    state |= {"valid": [], "best": None, "least": math.inf, "best_epoch": 0}
    for step in resumable("training", s.epochs * len(batches), state):
        epoch, i = divmod(step, len(batches))
        model.zero_grad(set_to_none=True)
        model.loss(batches[i], noise).backward()
        adagrad_step(parameters, state["squares"], s.lr)
        model.after_step(noise)
        if i + 1 == len(batches):
            nll = -float(log_prob(model, valid, CHUNK).mean())
            state["valid"].append((epoch + 1, nll))
            if nll < state["least"]:
                state |= {"least": nll, "best_epoch": epoch, "best": copy.deepcopy(model.state_dict())}
            if epoch - state["best_epoch"] >= s.patience:
                break
    model.load_state_dict(state["best"])
    curve: list[tuple[int, float]] = state["valid"]
    return curve


def train_and_score(run: Run, s: Settings) -> None:
    """Train as the released code does and score the test bits exactly."""
    task = mnist_static()
    train, valid, test = splits(task, s.rows, run.device)
    model = run.build(lambda: build(task.info, s))
    curve = fit(model, train, valid, run, s)
    exact_nll(run, model, test, CHUNK)
    run.plot(validation_plot(curve, "epochs"))


ABOUT = "MADE with {} hidden layer(s) of 8000 units and {} set(s) of masks on static bits"
ROWS = tuple(
    full_row(f"made-{layers}-{masks}", minutes, ABOUT.format(layers, masks), Settings(layers=layers, masks=masks))(
        train_and_score
    )
    for layers, masks, minutes in ((1, 1, 5), (2, 1, 12), (1, 32, 10), (2, 32, 25))
)


@full_row("made-static-short")
def train_short(run: Run, s: Short) -> None:
    """MADE with 500 hidden units and one set of masks on static bits, minutes of one CPU core."""
    task = mnist_static()
    exact_row(run, task, lambda: build(task.info, s), s, CHUNK)


PAPER = Paper("germain", __file__, experiments=(*ROWS, train_short))
