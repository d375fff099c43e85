"""Larochelle and Murray 2011: The Neural Autoregressive Distribution Estimator, AISTATS.

Replicated: test NLL of NADE with 500 hidden units on static bits of MNIST, whose files the paper made.

Deviations: stochastic gradient descent in batches of 100 with momentum 0.9 and a learning rate that falls to zero,
where the paper takes one example a step. Neither its learning rate for these bits nor its order of the pixels could be
checked against a text: rows from top to bottom here. The best of the validated steps is kept.
"""

from __future__ import annotations

from pathlib import Path

import torch

from baselines.nade import FixedOrderNADE
from replicate.experiments.image_rows import STATIC_BITS, exact_nll, splits, training, validation_plot
from replicate.runs.experiment import Context, Experiment, Outcome
from replicate.runs.paper import Paper
from replicate.runs.training import train
from replicate.tasks.images import FILES, mnist_static


def train_and_score(context: Context) -> Outcome:
    """Train on static bits and score the test bits exactly."""
    fit, valid, test = splits(context)
    with context.streams.initialisation():
        model = FixedOrderNADE(mnist_static().info, context.params["hidden"])
    model = model.to(context.device)
    history = train(model, fit, valid, training(context.params), context.streams)
    with torch.no_grad():
        return exact_nll(model.log_prob(test), validation_plot(history.valid))


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
    files=FILES[STATIC_BITS],
    cuda_minutes=10,
)

PAPER = Paper("larochelle", Path(__file__).with_suffix(".toml"), experiments=(STATIC,))
