"""What rows of several papers on images share: parts of static MNIST, settings, units, curves, sheets of images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from torch import Tensor

from replicate.model import DataInfo, Estimate, LogLikelihood, Training
from replicate.runs.experiment import MAX_PIXELS, Context, Line, Outcome, Plot
from replicate.tasks.base import Task
from replicate.tasks.images import COLOUR_SHAPE, mnist_static

STATIC_BITS = "mnist-static"
#: images in a row of a sheet
IN_A_ROW = 5
_TRAINING = {f.name for f in fields(Training)}


def training(params: Mapping[str, Any]) -> Training:
    """The training settings among an experiment's."""
    return Training(**{key: value for key, value in params.items() if key in _TRAINING})


def in_bits(log_p: LogLikelihood, dim: int, variant: str = "") -> dict[str, Estimate]:
    """-log P in nats and in bits per dimension, as "nll" and "bits_per_dim" with the variant behind."""
    nll = -log_p.mean()
    return {f"nll{variant}": nll, f"bits_per_dim{variant}": nll.times(1 / (dim * math.log(2)), "bits/dim")}


def sheet(name: str, title: str, rows: Mapping[str, Tensor], info: DataInfo) -> Plot:
    """The first images of each row, unselected; a row has grey values 0..levels-1, (n, D), or the mean of colours."""
    assert info.levels is not None
    planes, *image = (1, *info.image) if info.image else COLOUR_SHAPE
    shown = min(IN_A_ROW, MAX_PIXELS // math.prod(image))
    lines = []
    for label, x in rows.items():
        grey = x[:shown].cpu().unflatten(1, (planes, *image)).mean(1)
        lines.append(Plot.row_of_images(label, grey / (info.levels - 1)))
    return Plot(name, title, "pixel", "grey", tuple(lines), style="images", image=(image[0], image[1]))


# -- bits


def splits(context: Context, task: Task | None = None) -> list[Tensor]:
    """Training, validation and test bits on the device: of each the first "rows", or all where that is 0.

    Args:
        task: static MNIST without it.
    """
    task, rows = task or mnist_static(), context.params["rows"] or None
    return [part[:rows].to(context.device) for part in (task.train, task.valid, task.test)]


def validation_plot(valid: Sequence[tuple[int, float]], unit: str = "optimizer step") -> Plot:
    """Validation NLL against steps or epochs."""
    line = Line("validation", [at for at, _ in valid], [nll for _, nll in valid])
    return Plot("validation", "NLL on validation", unit, "nats", (line,))


def exact_nll(log_p: Tensor, plot: Plot, task: str = STATIC_BITS) -> Outcome:
    """ "nll" from exact log p (n,) of a task's test bits."""
    exact = LogLikelihood(log_p, "exact")
    return Outcome({"nll": -exact.mean()}, (plot,), examples={task: exact})
