"""Larochelle and Murray 2011: The Neural Autoregressive Distribution Estimator, AISTATS.

Replicated: test NLL of NADE with 500 hidden units on static bits of MNIST, whose files the paper made.

Deviations: stochastic gradient descent in batches of 100 with momentum 0.9 and a learning rate that falls to zero,
where the paper takes one example a step. Neither its learning rate for these bits nor its order of the pixels could be
checked against a text: rows from top to bottom here. The best of the validated steps is kept.

Here also stands what the rows of NADE's descendants on these bits share: `replicate.papers.uria` and
`replicate.papers.germain`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from baselines.nade import FixedOrderNADE
from replicate.model import LogLikelihood, Training
from replicate.papers.base import Paper
from replicate.runs.experiment import Context, Experiment, Line, Outcome, Plot
from replicate.runs.training import train
from replicate.tasks.images import FILES, mnist_static

TASK = "mnist-static"
_TRAINING = {f.name for f in fields(Training)}


# -- what the three papers share


def splits(context: Context) -> list[Tensor]:
    """Training, validation and test bits on the device: of each the first "rows", or all where that is 0."""
    task, rows = mnist_static(), context.params["rows"] or None
    return [part[:rows].to(context.device) for part in (task.train, task.valid, task.test)]


def training(params: Mapping[str, Any]) -> Training:
    """The training settings among an experiment's."""
    return Training(**{key: value for key, value in params.items() if key in _TRAINING})


def validation_plot(valid: Sequence[tuple[int, float]], unit: str = "optimizer step") -> Plot:
    """Validation NLL against steps or epochs."""
    line = Line("validation", [at for at, _ in valid], [nll for _, nll in valid])
    return Plot("validation", "NLL on validation", unit, "nats", (line,))


def outcome(log_p: Tensor, plot: Plot) -> Outcome:
    """ "nll" from exact log p (n,) of the test bits."""
    exact = LogLikelihood(log_p, "exact")
    return Outcome({"nll": -exact.mean()}, (plot,), examples={TASK: exact})


# -- NADE


def train_and_score(context: Context) -> Outcome:
    """Train on static bits and score the test bits exactly."""
    fit, valid, test = splits(context)
    with context.streams.initialisation():
        model = FixedOrderNADE(mnist_static().info, context.params["hidden"])
    model = model.to(context.device)
    history = train(model, fit, valid, training(context.params), context.streams)
    with torch.no_grad():
        return outcome(model.log_prob(test), validation_plot(history.valid))


STATIC = Experiment(
    "nade-static",
    "NADE with 500 hidden units on static bits",
    "autoregressive",
    train_and_score,
    {
        "hidden": 500,
        "steps": 200_000,
        "batch_size": 100,
        "optimizer": "sgd",
        "lr": 0.05,
        "validate_every": 2000,
        "rows": 0,
    },
    seeds=3,
    profiles=("full",),
    files=FILES[TASK],
    cuda_minutes=10,
)

PAPER = Paper("larochelle", Path(__file__).with_suffix(".toml"), experiments=(STATIC,))
