"""Training as the notebooks train, and the numbers and the figure that they all print."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from replicate.experiments import Check, Run, fit
from replicate.experiments.batches import Minibatches
from replicate.model import Estimate
from replicate.runs.seeds import Streams
from replicate.tasks.base import Task

LOG_2PI = math.log(2 * math.pi)

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
    """Train in place by the notebooks' loop and keep the weights of the best validation epoch.

    An epoch is a walk through a fresh permutation, its last short batch included. Validation draws fresh noise every
    epoch, as the notebooks do. Training stops after more than `patience` epochs in a row without a better one.

    Args:
        model: Adamax trains all its parameters.
        loss: by example, in training and in validation alike.
        streams: of "batches" and "noise".

    Returns:
        Mean validation loss of every epoch in nats; its minimum is the number that the notebooks' figures show.
    """
    train, valid = task.train.to(device), task.valid.to(device)
    batches, noise = Minibatches(train, s.batch_size, streams.fresh("batches")), streams.fresh("noise")

    def validation_loss() -> float:
        with torch.no_grad():
            return float(loss(valid, noise).mean())

    found = fit(
        model,
        lambda: loss(next(batches), noise).mean(),
        torch.optim.Adamax(model.parameters(), lr=s.lr, foreach=True),
        s.max_epochs * len(batches),
        {"batches": batches, "noise": noise},
        Check(len(batches), validation_loss, patience=s.patience),
    )
    return [value for _, value in found.checks]


def perceptron(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """Build the notebooks' network: two hidden layers of LeakyReLU."""
    return nn.Sequential(
        nn.Linear(inputs, hidden), nn.LeakyReLU(), nn.Linear(hidden, hidden), nn.LeakyReLU(), nn.Linear(hidden, outputs)
    )


def nats(values: Tensor) -> Estimate:
    """Mean of per-example values (n,) in nats."""
    return Estimate.mean_of(values, "estimate", "nats")


def plot_validation(run: Run, title: str, curves: Mapping[str, list[float]], levels: Mapping[str, float]) -> None:
    """Draw the notebooks' figure: validation loss by epoch, without the first epochs above 250 nats."""
    shown = {label: [(i, v) for i, v in enumerate(curve) if v < 250] for label, curve in curves.items()}
    lines = {label: ([i for i, _ in points], [v for _, v in points]) for label, points in shown.items()}
    run.curves("validation", title, ("epoch", "validation loss (nats)"), lines, levels=levels)
