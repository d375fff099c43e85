"""Declare an experiment of a paper: a function that measures what the paper's claims state.

    @experiment("ncsn-passage", family="score", seeds=1, precision="float64")
    def passage(run: Run, *, eps: float = 0.1) -> None:
        'Mean passage time between the two modes, by quadrature.'
        run.measure("log10_passage_steps", Estimate.exact(steps, "decades of steps"))

An experiment runs as every model does: one spec, one process, one record, rows in measurements.csv, where the paper's
key is its model and the experiment's name its task. Variants within it (another sampler, another loss) differ by a
suffix of the metric, as in "minority_weight:annealed". A metric whose name begins with "time_" differs from run to run
and is left out where runs are compared bit for bit.
"""

import base64
import inspect
import math
import typing
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, is_dataclass
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from replicate.data.files import absent
from replicate.model import Estimate, Family, LogLikelihood
from replicate.runs.seeds import Streams
from replicate.tasks.base import MAX_EXAMPLES

M = TypeVar("M", bound=nn.Module)
Style = Literal["line", "points", "images"]
#: points of one line of a plot that a record keeps, and pixels of one row of images
MAX_POINTS, MAX_PIXELS = 500, 4096


@dataclass(frozen=True)
class Line:
    """One line of a plot, one cloud of points, or one row of images.

    Attributes:
        label: in the legend; for points, over the panel; for images, before the row.
        x, y: coordinates, of one length; for images index and grey value (0 white, 1 black) of each pixel, row-major.
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
        """Return a row of images (k, height, width) with grey values from 0 to 1."""
        flat = pixels.detach().flatten().tolist()
        return Line(label, range(len(flat)), flat)

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON-ready form: MAX_POINTS evenly chosen points per line with six digits, pixels with three."""
        digits, most = (3, MAX_PIXELS) if self.image else (6, MAX_POINTS)
        lines = [
            {"label": line.label, "x": _thinned(line.x, most, 6), "y": _thinned(line.y, most, digits)}
            for line in self.lines
        ]
        found = {**vars(self), "lines": lines, "levels": dict(self.levels), "image": list(self.image or ())}
        return {name: value for name, value in found.items() if name != "image" or value}


def _thinned(values: Sequence[float], most: int, digits: int) -> list[float | None]:
    n = len(values)
    chosen = range(n) if n <= most else (i * (n - 1) // (most - 1) for i in range(most))
    return [float(f"{float(values[i]):.{digits}g}") if math.isfinite(values[i]) else None for i in chosen]


@dataclass(eq=False)
class Outcome:
    """What an experiment found.

    Attributes:
        estimates: by metric name, variants as "metric:variant".
        plots: for the report.
        missing: metrics that could not be had, with the reason.
        examples: log p of every test example, in the task's order, by task: what the report pairs models by.
        classifiers: sha256 of the weights of each classifier whose features judged samples, by the task it learnt on.
    """

    estimates: dict[str, Estimate] = field(default_factory=dict, init=False)
    plots: list[Plot] = field(default_factory=list, init=False)
    missing: dict[str, str] = field(default_factory=dict, init=False)
    examples: dict[str, LogLikelihood] = field(default_factory=dict, init=False)
    classifiers: dict[str, str] = field(default_factory=dict, init=False)


#: levels of a packed likelihood
_LEVELS = 2**16 - 1


def pack_examples(log_p: LogLikelihood) -> dict[str, Any]:
    """Pack log p of each example for JSON: 16-bit steps from the lowest to the highest, base64 of little-endian.

    Half a step is the error of a value; on ten thousand images it is below a hundredth of a nat.
    """
    values = log_p.values.detach().double().cpu()
    low, span = float(values.min()), float(values.max() - values.min())
    steps = torch.round((values - low) / (span or 1.0) * _LEVELS).numpy().astype("<u2")
    return {"kind": log_p.kind, "low": low, "span": span, "values": base64.b64encode(steps.tobytes()).decode()}


def unpack_examples(data: Mapping[str, Any]) -> np.ndarray:
    """Log p of each example in nats (n,), float64: the inverse of `pack_examples` to half a step.

    Raises:
        ValueError: the text is not what `pack_examples` writes.
    """
    steps = np.frombuffer(base64.b64decode(data["values"], validate=True), dtype="<u2")
    if not 0 < len(steps) <= MAX_EXAMPLES:
        raise ValueError(f"there are likelihoods of {len(steps)} examples; it must be 1 to {MAX_EXAMPLES}")
    found: np.ndarray = data["low"] + data["span"] * steps.astype(np.float64) / _LEVELS
    return found


@dataclass(eq=False)
class Run(Outcome):
    """One run of an experiment: its settings and generators going in, what it measures coming out.

    Args:
        settings: as in the spec.
        streams: named generators of this seed; nothing else may be random.
        device: where to compute.
    """

    settings: Mapping[str, Any]
    streams: Streams
    device: torch.device

    def stream(self, name: str) -> torch.Generator:
        """Return a new generator at the beginning of the named stream."""
        return self.streams.fresh(name)

    def initialisation(self) -> AbstractContextManager[None]:
        """Inside, networks draw their first weights from this run's "init" stream."""
        return self.streams.initialisation()

    def build(self, make: Callable[[], M]) -> M:
        """Build a network with its first weights from this run's "init" stream, on the run's device."""
        with self.initialisation():
            made = make()
        return made.to(self.device)

    def measure(self, metric: str, estimate: Estimate) -> None:
        """Record a number; variants of one metric are "metric:variant"."""
        self.estimates[metric] = estimate

    def measure_all(self, estimates: Mapping[str, Estimate], variant: str = "") -> None:
        """Record several numbers, each metric's name followed by ":variant" where there is one."""
        suffix = f":{variant}" if variant else ""
        self.estimates.update({f"{metric}{suffix}": e for metric, e in estimates.items()})

    def omit(self, metric: str, reason: str) -> None:
        """Record why a metric could not be measured."""
        self.missing[metric] = reason

    def keep_examples(self, task: str, log_p: LogLikelihood) -> None:
        """Keep log p of every test example of a task, in the task's order; the report pairs models by them."""
        self.examples[task] = log_p

    def plot(self, plot: Plot) -> None:
        """Draw a plot in the report."""
        self.plots.append(plot)

    def curves(
        self,
        name: str,
        title: str,
        axes: tuple[str, str],
        curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
        *,
        log: str = "",
        levels: Mapping[str, float] | None = None,
    ) -> None:
        """Draw curves (x, y) by label in one panel.

        Args:
            name: letters, digits and dashes; unique within the experiment.
            title: in words.
            axes: what x and y are, with units.
            curves: coordinates of each line.
            log: the logarithmic axes: "", "x", "y" or "xy".
            levels: horizontal lines by label, such as a printed value.
        """
        lines = tuple(Line(label, x, y) for label, (x, y) in curves.items())
        self.plot(Plot(name, title, *axes, lines, log_x="x" in log, log_y="y" in log, levels=levels or {}))

    def scatter(
        self, name: str, title: str, clouds: Mapping[str, Tensor], axes: tuple[str, str] = ("x1", "x2")
    ) -> None:
        """Draw clouds of points (n, 2) by label, each in a panel of its own."""
        xy = {label: cloud.detach().cpu() for label, cloud in clouds.items()}
        lines = tuple(Line(label, c[:, 0].tolist(), c[:, 1].tolist()) for label, c in xy.items())
        self.plot(Plot(name, title, *axes, lines, style="points"))


@dataclass(frozen=True)
class Experiment:
    """One experiment of a paper.

    Attributes:
        name: letters, digits and dashes; unique in the suite. The `task` of its measurements.
        about: one line.
        family: whose subject it is.
        run: measures on a `Run` under its settings; a function of both alone.
        params: scalar settings of the standard profile, at the paper's values where that is affordable.
        seeds: how many; 1 for a computation without randomness.
        tasks: names of the suite's tasks whose data it reads; their sha256 enters the run's hash.
        overrides: settings by profile.
        profiles: the profiles that run it; full does not repeat what standard settles.
        precision: "float32" or "float64", for the record; the function itself must keep to it.
        files: paths below REPLICATE_DATA that it reads, each as it is or packed (.gz, .xz). Where one is absent the
            experiment is not run; their sha256 enters the run's hash.
        optional_files: those without which it measures less; the sha256 of each that is there enters the hash too.
        cuda_minutes: minutes per seed on one CUDA device of the H200 class, without which it is not run; 0: on a CPU.
    """

    name: str
    about: str
    family: Family
    run: Callable[..., None]
    params: Mapping[str, Any] = field(default_factory=dict)
    seeds: int = 5
    tasks: tuple[str, ...] = ()
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    profiles: tuple[str, ...] = ("standard",)
    precision: str = "float32"
    files: tuple[str, ...] = ()
    optional_files: tuple[str, ...] = ()
    cuda_minutes: float = 0.0

    @property
    def needs(self) -> str:
        """What it needs beyond what every machine has, in words, or ""."""
        device = f"a CUDA device (about {self.cuda_minutes * self.seeds:.0f} minutes)" if self.cuda_minutes else ""
        data = f"{self.files[0]} in REPLICATE_DATA" if self.files else ""
        return " and ".join(filter(None, (device, data)))

    def absent(self, device: str = "cpu") -> str:
        """Return why this machine cannot run it on such a device (no CUDA, or a missing file), or ""."""
        if self.cuda_minutes and device != "cuda":
            return f"it needs a CUDA device (about {self.cuda_minutes * self.seeds:.0f} minutes)"
        return absent(self.files)

    def settings(self, profile: str) -> dict[str, Any]:
        """Return the settings of a profile."""
        return {**self.params, **self.overrides.get(profile, {})}

    def measure(self, run: Run) -> Outcome:
        """Measure on a run, under its settings."""
        if settings := _settings_class(self.run):
            self.run(run, settings(**run.settings))
        else:
            keywords = _keywords(self.run)
            self.run(run, **{keywords[name].name: value for name, value in run.settings.items()})
        return run


def _settings_class(function: Callable[..., Any]) -> type | None:
    """Return the dataclass that the function's second parameter is annotated with, or None where there is none."""
    parameters = list(inspect.signature(function).parameters.values())
    if len(parameters) < 2 or parameters[1].kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD:
        return None
    kind = typing.get_type_hints(inspect.unwrap(function)).get(parameters[1].name)
    return kind if isinstance(kind, type) and is_dataclass(kind) else None


def _keywords(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Return the keyword-only parameters of a function by setting: `from_` is the setting "from"."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name.rstrip("_"): p for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


def _declared(function: Callable[..., Any], given: Mapping[str, Any] | Any) -> dict[str, Any]:
    """Return the settings that a function declares, with those given in place of its defaults.

    Raises:
        TypeError: a setting is unknown, or has neither a default nor a value.
    """
    if settings := _settings_class(function):
        chosen: Any = given if isinstance(given, settings) else settings(**given)
        return asdict(chosen)
    known = _keywords(function)
    if unknown := sorted(set(given) - set(known)):
        raise TypeError(f"{function.__qualname__} has no setting {', '.join(unknown)}")
    chosen = {**{name: parameter.default for name, parameter in known.items()}, **given}
    if missing := [name for name, value in chosen.items() if value is inspect.Parameter.empty]:
        raise TypeError(f"{function.__qualname__} needs a value for {', '.join(missing)}")
    return chosen


def experiment(
    name: str,
    *,
    family: Family,
    about: str = "",
    settings: Any = None,
    smoke: Mapping[str, Any] | None = None,
    **declared: Any,
) -> Callable[[Callable[..., None]], Experiment]:
    """Declare an experiment: a decorator of the function that measures, or a call where several share a function.

    The function takes a `Run`, then its settings: keyword-only arguments with defaults, or one dataclass. They are the
    settings of the spec, so they enter the run's hash.

    Args:
        name: of the experiment.
        family: whose subject it is.
        about: one line; by default the first line of the function's docstring.
        settings: values in place of the function's defaults: a mapping, or the settings dataclass.
        smoke: settings of the smoke profile that differ.
        declared: other fields of `Experiment`: seeds, tasks, profiles, precision, files, optional_files, cuda_minutes.

    Raises:
        TypeError: a setting is unknown, or has neither a default nor a value.
    """

    def declare(function: Callable[..., None]) -> Experiment:
        line = about or (inspect.getdoc(function) or "").partition("\n")[0].rstrip(".")
        params = _declared(function, {} if settings is None else settings)
        if unknown := sorted(set(smoke or {}) - set(params)):
            raise TypeError(f"{function.__qualname__} has no setting {', '.join(unknown)}")
        overrides = {"smoke": dict(smoke)} if smoke else {}
        return Experiment(name, line, family, function, params, overrides=overrides, **declared)

    return declare
