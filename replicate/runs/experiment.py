"""An experiment: a run that is no model of the comparison, asked for by a paper's claims.

It goes the same way as every other run: one spec, one process, one record, rows in measurements.csv. There a
measurement stands under the paper's key as its model and the experiment's name as its task; variants within one
experiment (another sampler, another loss) are told apart by a suffix, as in "minority_weight:annealed". A metric
whose name begins with "time_" differs from run to run and is left out where runs are compared bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from replicate.data.files import find, where
from replicate.model import Estimate, Family
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
    """

    estimates: Mapping[str, Estimate]
    plots: tuple[Plot, ...] = ()
    missing: Mapping[str, str] = field(default_factory=dict)


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
        overrides: settings by profile, "smoke" and "full".
        profiles: the profiles that run it.
        precision: "float32" or "float64", for the record; the function itself must keep to it.
        files: paths below REPLICATE_DATA that it reads, each as it is or packed (.gz, .xz); where
            one is absent it is not run, and their sha256 enters the run's hash.
    """

    name: str
    about: str
    family: Family
    run: Callable[[Context], Outcome]
    params: Mapping[str, Any] = field(default_factory=dict)
    seeds: int = 5
    tasks: tuple[str, ...] = ()
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    profiles: tuple[str, ...] = ("standard", "full")
    precision: str = "float32"
    files: tuple[str, ...] = ()

    def absent(self) -> str:
        """Why this machine cannot run it: the first of its files that is not there; "" where all are."""
        missing = [name for name in self.files if find(name) is None]
        return f"it reads {missing[0]}, which is not there: {where()}" if missing else ""

    def settings(self, profile: str) -> dict[str, Any]:
        """The settings of a profile."""
        return {**self.params, **self.overrides.get(profile, {})}
