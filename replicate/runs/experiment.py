"""An experiment: a run that is no model of the comparison, asked for by a paper's claims.

It goes the same way as every other run: one spec, one process, one record, rows in measurements.csv. There a
measurement stands under the paper's key as its model and the experiment's name as its task; variants within one
experiment (another sampler, another loss) are told apart by a suffix, as in "minority_weight:annealed". A metric
whose name begins with "time_" differs from run to run and is left out where runs are compared bit for bit.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from replicate.data.files import absent
from replicate.model import Estimate, Family, LogLikelihood
from replicate.runs.seeds import Streams

Style = Literal["line", "points", "images"]
#: points of one line of a plot that a record keeps, and pixels of one row of images
MAX_POINTS, MAX_PIXELS = 500, 4096


@dataclass(frozen=True)
class Line:
    """One line of a plot, one cloud of points, or one row of images.

    Attributes:
        label: in the legend; for points, over the panel; for images, before the row.
        x, y: coordinates, of one length; for images the index and the grey value (0 white, 1 black) of each pixel, the
            images one after the other in row-major order.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True)
class Plot:
    """What the report draws of an experiment. Lines share one panel; clouds of points and images stand side by side.

    Attributes:
        name: letters, digits and dashes; unique within the experiment.
        title, x_label, y_label: in words, with units.
        style: "line", "points" for samples in the plane, or "images".
        log_x, log_y: logarithmic axes.
        levels: horizontal lines by label, such as a printed value.
        image: height and width of each image, where the style is "images".
    """

    name: str
    title: str
    x_label: str
    y_label: str
    lines: tuple[Line, ...]
    style: Style = "line"
    log_x: bool = False
    log_y: bool = False
    levels: Mapping[str, float] = field(default_factory=dict)
    image: tuple[int, int] | None = None

    @staticmethod
    def row_of_images(label: str, pixels: Tensor) -> Line:
        """A row of images (k, height, width) with grey values from 0 to 1."""
        flat = pixels.detach().flatten().tolist()
        return Line(label, range(len(flat)), flat)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready form: at most MAX_POINTS evenly chosen points a line with six digits; every pixel with three."""
        digits, most = (3, MAX_PIXELS) if self.image else (6, MAX_POINTS)
        lines = [
            {"label": line.label, "x": _thinned(line.x, most, 6), "y": _thinned(line.y, most, digits)}
            for line in self.lines
        ]
        return {
            **({"image": list(self.image)} if self.image else {}),
            "name": self.name,
            "title": self.title,
            "x_label": self.x_label,
            "y_label": self.y_label,
            "lines": lines,
            "style": self.style,
            "log_x": self.log_x,
            "log_y": self.log_y,
            "levels": dict(self.levels),
        }


def _thinned(values: Sequence[float], most: int, digits: int) -> list[float | None]:
    n = len(values)
    chosen = range(n) if n <= most else (i * (n - 1) // (most - 1) for i in range(most))
    return [float(f"{float(values[i]):.{digits}g}") if math.isfinite(values[i]) else None for i in chosen]


@dataclass(frozen=True)
class Outcome:
    """What an experiment found.

    Attributes:
        estimates: by metric name, variants as "metric:variant".
        plots: for the report.
        missing: metrics that could not be had, with the reason.
        examples: log p of every test example of a task, by the task's name, in the task's order: what the report pairs
            models by.
        classifiers: sha256 of the weights of each classifier whose features judged samples, by the task that it was
            trained on.
    """

    estimates: Mapping[str, Estimate]
    plots: tuple[Plot, ...] = ()
    missing: Mapping[str, str] = field(default_factory=dict)
    examples: Mapping[str, LogLikelihood] = field(default_factory=dict)
    classifiers: Mapping[str, str] = field(default_factory=dict)


#: levels of a packed likelihood
_LEVELS = 2**16 - 1
#: examples of a task whose likelihoods a record keeps
MAX_EXAMPLES = 20_000


def pack_examples(log_p: LogLikelihood) -> dict[str, Any]:
    """JSON-ready form of log p of each example: 16-bit steps from the lowest to the highest, base64 of little-endian.

    Half a step is the error of a value; on ten thousand images it is below a hundredth of a nat.
    """
    values = log_p.values.detach().double().cpu()
    low, span = float(values.min()), float(values.max() - values.min())
    steps = torch.round((values - low) / (span or 1.0) * _LEVELS).numpy().astype("<u2")
    return {"kind": log_p.kind, "low": low, "span": span, "values": base64.b64encode(steps.tobytes()).decode()}


def unpack_examples(data: Mapping[str, Any]) -> np.ndarray:
    """log p of each example in nats (n,), float64: the inverse of `pack_examples` to half a step.

    Raises:
        ValueError: the text is not what `pack_examples` writes.
    """
    steps = np.frombuffer(base64.b64decode(data["values"], validate=True), dtype="<u2")
    if not 0 < len(steps) <= MAX_EXAMPLES:
        raise ValueError(f"there are likelihoods of {len(steps)} examples; it must be 1 to {MAX_EXAMPLES}")
    found: np.ndarray = data["low"] + data["span"] * steps.astype(np.float64) / _LEVELS
    return found


@dataclass(frozen=True)
class Context:
    """What an experiment's function is given.

    Attributes:
        params: its settings, as in the spec.
        streams: named generators of this seed: streams.fresh("noise"), `with streams.initialisation():` round the
            construction of networks. Nothing else may be random.
        device: where to compute.
    """

    params: Mapping[str, Any]
    streams: Streams
    device: torch.device


@dataclass(frozen=True)
class Experiment:
    """One experiment of a paper.

    Attributes:
        name: letters, digits and dashes; unique in the suite. The `task` of its measurements.
        about: one line.
        family: whose subject it is.
        run: from the context to what was found; a function of the context alone.
        params: scalar settings of the standard profile, at the paper's values where that is affordable.
        seeds: how many; 1 for a computation without randomness.
        tasks: names of the suite's tasks whose data it reads; their sha256 enters the run's hash.
        overrides: settings by profile.
        profiles: the profiles that run it; full does not repeat what standard settles.
        precision: "float32" or "float64", for the record; the function itself must keep to it.
        files: paths below REPLICATE_DATA that it reads, each as it is or packed (.gz, .xz); where
            one is absent it is not run, and their sha256 enters the run's hash.
        optional_files: paths below REPLICATE_DATA without which it measures less; where one is there, its sha256 enters
            the run's hash too.
        cuda_minutes: about how many minutes a seed takes on one CUDA device of the H200 class; without such a device it
            is not run. 0 for what a CPU does as well.
        together: trains several seeds in common steps, and no more: what `run` does with a seed alone up to its first
            loop's end, which is `resumable_together` here. To rounding it leaves what each alone would.
    """

    name: str
    about: str
    family: Family
    run: Callable[[Context], Outcome]
    params: Mapping[str, Any] = field(default_factory=dict)
    seeds: int = 5
    tasks: tuple[str, ...] = ()
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    profiles: tuple[str, ...] = ("standard",)
    precision: str = "float32"
    files: tuple[str, ...] = ()
    optional_files: tuple[str, ...] = ()
    cuda_minutes: float = 0.0
    together: Callable[[Sequence[Context]], None] | None = None

    @property
    def needs(self) -> str:
        """What must be there for it to run, in words; "" where every machine has it."""
        device = f"a CUDA device (about {self.cuda_minutes * self.seeds:.0f} minutes)" if self.cuda_minutes else ""
        data = f"{self.files[0]} in REPLICATE_DATA" if self.files else ""
        return " and ".join(filter(None, (device, data)))

    def absent(self, device: str = "cpu") -> str:
        """Why this machine cannot run it on such a device: no CUDA, or a file that is not there; "" where it can."""
        if self.cuda_minutes and device != "cuda":
            return f"it needs a CUDA device (about {self.cuda_minutes * self.seeds:.0f} minutes)"
        return absent(self.files)

    def settings(self, profile: str) -> dict[str, Any]:
        """The settings of a profile."""
        return {**self.params, **self.overrides.get(profile, {})}
