"""Germain, Gregor, Murray and Larochelle 2015: MADE: Masked Autoencoder for Distribution Estimation, 1502.03509.

Replicated: test NLL on static bits of MNIST of MADE with one and two hidden layers of 8000 units, trained with one set
of masks and with 32 in turn, whose densities are averaged.

Followed is the command that the released code (github.com/mgermain/MADE) gives for the best of the four rows: two
layers of 8000 rectified units, a direct connection to the outputs, orthogonal start, AdaGrad at 0.01 with 1e-6 under
the root, batches of 100 in the order of the file, training until 30 epochs in a row have not improved the validation
NLL, the best epoch kept, random orders in every set. The settings of the three other rows could not be checked against
a text: they are the same here.

Deviations: output biases start at the training marginals, not at zero. 32 sets are trained and averaged; the code, told
to take 32, as its text reads trains on 33 and averages 33, of which the last was never trained and the first trained
one is left out. Training ends at 1000 epochs at the latest.

`made-static-short` is no row of the paper: 500 units and minutes of one CPU core, with dropout, Adam, averaged weights
and the best validated step, through the suite's own training loop.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from baselines.made import MaskedAutoencoder
from replicate.experiments.image_rows import STATIC_BITS, exact_nll, splits, training, validation_plot
from replicate.resume import State, resumable
from replicate.runs.experiment import Context, Experiment, Outcome
from replicate.runs.paper import Paper
from replicate.runs.training import train
from replicate.tasks.images import FILES, mnist_static

#: rows scored at a time
CHUNK = 5000


class AdaGrad:
    """AdaGrad as the released code has it: eps under the root."""

    def __init__(self, parameters: Sequence[Tensor], lr: float, eps: float = 1e-6) -> None:
        self.parameters, self.lr, self.eps = list(parameters), lr, eps
        self.squares = [torch.zeros_like(p) for p in self.parameters]

    @torch.no_grad()
    def step(self) -> None:
        """One step against the gradients that the parameters hold."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        torch._foreach_addcmul_(self.squares, gradients, gradients, 1.0)
        roots = torch._foreach_add(self.squares, self.eps)
        torch._foreach_sqrt_(roots)
        torch._foreach_addcdiv_(self.parameters, gradients, roots, -self.lr)

    def state_dict(self) -> dict[str, Any]:
        """Sums of squared gradients."""
        return {"squares": self.squares}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.squares = [s.clone() for s in state["squares"]]


@torch.no_grad()
def log_prob(model: MaskedAutoencoder, x: Tensor) -> Tensor:
    """log p of rows x, (n,)."""
    return torch.cat([model.log_prob(part) for part in x.split(CHUNK)])


def fit(model: MaskedAutoencoder, train_bits: Tensor, valid: Tensor, context: Context) -> list[tuple[int, float]]:
    """Train in place by the code's rule and leave the best epoch's weights; (epoch, validation NLL) of each epoch."""
    p = context.params
    model.initialise(train_bits, context.streams.get("initialise"))
    batches = train_bits.split(p["batch_size"])
    state: State = {
        "model": model,
        "optimizer": AdaGrad(list(model.parameters()), p["lr"]),
        "noise": context.streams.get("noise"),
        "valid": [],
        "best": None,
        "least": math.inf,
        "best_epoch": 0,
        "stopped": False,
    }
    for step in resumable("training", p["epochs"] * len(batches), state):
        if state["stopped"]:  # a resumable loop is not left early
            continue
        epoch, i = divmod(step, len(batches))
        model.zero_grad(set_to_none=True)
        model.loss(batches[i], state["noise"]).backward()
        state["optimizer"].step()
        model.after_step(state["noise"])
        if i + 1 == len(batches):
            nll = -float(log_prob(model, valid).mean())
            state["valid"].append((epoch + 1, nll))
            if nll < state["least"]:
                state |= {"least": nll, "best_epoch": epoch, "best": copy.deepcopy(model.state_dict())}
            state["stopped"] = epoch - state["best_epoch"] >= p["patience"]
    model.load_state_dict(state["best"])
    valid_curve: list[tuple[int, float]] = state["valid"]
    return valid_curve


def build(context: Context) -> MaskedAutoencoder:
    """The untrained model on the device."""
    p = context.params
    with context.streams.initialisation():
        model = MaskedAutoencoder(mnist_static().info, p["hidden"], p["layers"], p["masks"], dropout=p["dropout"])
    return model.to(context.device)


def train_and_score(context: Context) -> Outcome:
    """Train as the released code does and score the test bits exactly."""
    train_bits, valid, test = splits(context)
    model = build(context)
    curve = fit(model, train_bits, valid, context)
    return exact_nll(log_prob(model, test), validation_plot(curve, "epochs"))


def train_short(context: Context) -> Outcome:
    """Train by the suite's loop and score the test bits exactly."""
    train_bits, valid, test = splits(context)
    model = build(context)
    history = train(model, train_bits, valid, training(context.params), context.streams)
    return exact_nll(log_prob(model, test), validation_plot(history.valid))


def row(layers: int, masks: int, minutes: float) -> Experiment:
    """The experiment of one row of the paper."""
    return Experiment(
        f"made-{layers}-{masks}",
        f"MADE with {layers} hidden layer(s) of 8000 units and {masks} set(s) of masks on static bits",
        "autoregressive",
        train_and_score,
        {
            "hidden": 8000,
            "layers": layers,
            "masks": masks,
            "dropout": 0.0,
            "lr": 0.01,
            "batch_size": 100,
            "epochs": 1000,
            "patience": 30,
            "rows": 0,
        },
        seeds=3,
        profiles=("full",),
        files=FILES[STATIC_BITS],
        cuda_minutes=minutes,
    )


ROWS = (row(1, 1, 5), row(2, 1, 12), row(1, 32, 10), row(2, 32, 25))
SHORT = Experiment(
    "made-static-short",
    "MADE with 500 hidden units and one set of masks on static bits, minutes of one CPU core",
    "autoregressive",
    train_short,
    {
        "hidden": 500,
        "layers": 1,
        "masks": 1,
        "dropout": 0.3,
        "steps": 8000,
        "batch_size": 200,
        "lr": 0.01,
        "warmup": 100,
        "weight_decay": 0.1,
        "ema": 0.995,
        "validate_every": 250,
        "rows": 0,
    },
    seeds=3,
    profiles=("full",),
    files=FILES[STATIC_BITS],
)

PAPER = Paper("germain", Path(__file__).with_suffix(".toml"), experiments=(*ROWS, SHORT))
