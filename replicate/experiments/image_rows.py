"""Parts that rows of several papers on images share: declaration, data, training, exact scores, sheets of images."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import torch
from torch import Tensor

from replicate.model import DataInfo, Estimate, Family, LogLikelihood, Model, Training
from replicate.runs.experiment import MAX_PIXELS, Experiment, Line, Plot, Run, experiment
from replicate.runs.training import train
from replicate.tasks.base import Task
from replicate.tasks.images import COLOUR_SHAPE, FILES

STATIC_BITS = "mnist-static"
#: images in a row of a sheet
IN_A_ROW = 5
M = TypeVar("M", bound=Model)


def full_row(
    name: str,
    minutes: float = 0.0,
    about: str = "",
    settings: Any = None,
    family: Family = "autoregressive",
    files: tuple[str, ...] = FILES[STATIC_BITS],
) -> Callable[[Callable[..., None]], Experiment]:
    """Declare a row of the full profile with three seeds that take so many minutes each on a GPU (0: on a CPU)."""
    declared: dict[str, Any] = {"seeds": 3, "profiles": ("full",), "files": files, "cuda_minutes": minutes}
    return experiment(name, family=family, about=about, settings=settings, **declared)


@dataclass(frozen=True, kw_only=True)
class RowSettings:
    """Settings of a row that the suite's loop trains.

    Attributes:
        steps, batch_size, lr, validate_every: of `Training`; subclasses may add other fields of it.
        rows: how many of each part of the data are used; 0 for all.
    """

    steps: int
    batch_size: int = 100
    lr: float = 1e-3
    validate_every: int
    rows: int = 0

    @property
    def training(self) -> Training:
        """The training settings among these."""
        return Training(**{f.name: getattr(self, f.name) for f in fields(Training) if hasattr(self, f.name)})


def in_bits(log_p: LogLikelihood, dim: int, variant: str = "") -> dict[str, Estimate]:
    """Return -log P in nats and in bits per dimension, as "nll" and "bits_per_dim", each followed by the variant."""
    nll = -log_p.mean()
    return {f"nll{variant}": nll, f"bits_per_dim{variant}": nll.times(1 / (dim * math.log(2)), "bits/dim")}


def sheet(name: str, title: str, rows: Mapping[str, Tensor], info: DataInfo) -> Plot:
    """Draw the first images of rows (n, D) of levels by label, unselected; of colour images the mean of the colours."""
    assert info.levels is not None
    planes, *image = (1, *info.image) if info.image else COLOUR_SHAPE
    shown = min(IN_A_ROW, MAX_PIXELS // math.prod(image))
    grey = {label: x[:shown].cpu().unflatten(1, (planes, *image)).mean(1) for label, x in rows.items()}
    lines = tuple(Plot.row_of_images(label, x / (info.levels - 1)) for label, x in grey.items())
    return Plot(name, title, "pixel", "grey", lines, style="images", image=(image[0], image[1]))


def splits(task: Task, rows: int, device: torch.device) -> list[Tensor]:
    """Return training, validation and test rows on the device: the first `rows` of each, or all where that is 0."""
    return [part[: rows or None].to(device) for part in (task.train, task.valid, task.test)]


# -- bits


def trained(run: Run, task: Task, build: Callable[[], M], settings: RowSettings) -> tuple[M, Tensor, Plot]:
    """Train a model by the suite's loop; return it, the test rows, and the plot of its validation NLL."""
    fit, valid, test = splits(task, settings.rows, run.device)
    model = run.build(build)
    history = train(model, fit, valid, settings.training, run.streams)
    return model, test, validation_plot(history.valid)


def validation_plot(valid: Sequence[tuple[int, float]], unit: str = "optimizer step") -> Plot:
    """Draw the validation NLL against steps or epochs."""
    line = Line("validation", [at for at, _ in valid], [nll for _, nll in valid])
    return Plot("validation", "NLL on validation", unit, "nats", (line,))


@torch.no_grad()
def log_prob(model: Model, x: Tensor, chunk: int) -> Tensor:
    """Return log p of rows x (n, D), shape (n,), computed `chunk` rows at a time."""
    return torch.cat([model.log_prob(part) for part in x.split(chunk)])


def exact_nll(run: Run, model: Model, test: Tensor, chunk: int, task: str = STATIC_BITS) -> None:
    """Measure "nll" from exact log p of a task's test rows, `chunk` of them at a time, and keep log p of each."""
    log_p = LogLikelihood(log_prob(model, test, chunk), "exact")
    run.measure("nll", -log_p.mean())
    run.keep_examples(task, log_p)


def exact_row(run: Run, task: Task, build: Callable[[], Model], settings: RowSettings, chunk: int) -> None:
    """Train a model by the suite's loop and measure its exact NLL, `chunk` test rows at a time."""
    model, test, validation = trained(run, task, build, settings)
    exact_nll(run, model, test, chunk, task.name)
    run.plot(validation)
