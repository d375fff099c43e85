"""The experiments' plots: each record keeps its lines, and one figure shows all seeds."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import LogLocator, NullFormatter

from replicate.report.drawing import QUIET, Array, Figure, fitting, new_canvas, panels, plain
from replicate.report.labels import significant
from replicate.report.records import RecordedRun
from replicate.report.text_table import csv_text


def figure_name(paper: str, experiment: str, plot: str) -> str:
    """Return the file name of an experiment's plot."""
    return f"{paper}-{experiment}-{plot}" if not experiment.startswith(paper) else f"{experiment}-{plot}"


def experiment_figures(runs: Iterable[RecordedRun]) -> Iterator[Figure]:
    """Draw one figure per plot of every experiment."""
    by_experiment: dict[tuple[str, str], list[RecordedRun]] = {}
    for run in runs:
        if not run.compared and not run.failed:
            by_experiment.setdefault((run.model, run.task), []).append(run)
    for (paper, experiment), group in sorted(by_experiment.items()):
        ordered = sorted(group, key=lambda r: r.seed)
        plots = [r.plots for r in ordered if r.plots is not None]
        if len(plots) < len(ordered):
            continue  # a results folder did not keep the plots of some seed
        about, ids = ordered[0].about, tuple(r.run_id for r in ordered)
        for plot in plots[0]:
            same = [p for found in plots for p in found if p["name"] == plot["name"]]
            canvas, note, text = _DRAW[plot["style"]](same)
            name = figure_name(paper, experiment, str(plot["name"]))
            caption = f"{about[:1].upper()}{about[1:]}.{note}"
            yield Figure(name, plot["title"], caption, canvas, text, runs=ids)


#: the seeds' versions of one plot
Seeds = Sequence[Mapping[str, Any]]
#: a drawing, the end of its caption, and its CSV
Drawn = tuple[Canvas, str, str]


def _array(values: Sequence[float | None]) -> Array:
    return np.array([math.nan if v is None else float(v) for v in values])


def _csv(seeds: Seeds) -> str:
    return fitting(partial(_rows, seeds), (500, 200, 60))[1]


def _rows(seeds: Seeds, most: int) -> Iterator[Sequence[object]]:
    yield "line", "seed", seeds[0]["x_label"], seeds[0]["y_label"]
    for seed, plot in enumerate(seeds):
        for line in plot["lines"]:
            x, y = _array(line["x"]), _array(line["y"])
            keep = np.unique(np.linspace(0, len(x) - 1, min(most, len(x))).astype(int))
            yield from ((line["label"], seed, significant(x[i], 6), significant(y[i], 6)) for i in keep)


def _curves(seeds: Seeds) -> Drawn:
    """Draw lines of all seeds in one panel: thin for each seed, thick for their mean where all share their x."""
    plot = seeds[0]
    labels = [line["label"] for line in plot["lines"]]
    alone = len(labels) == 1 and not plot["levels"]
    canvas = new_canvas(6.4, 3.5)
    ax = canvas.add_axes((0.12, 0.15, 0.84 if alone else 0.52, 0.74))
    for label, colour in zip(labels, sns.color_palette("colorblind", max(3, len(labels))), strict=False):
        lines = [line for p in seeds for line in p["lines"] if line["label"] == label]
        _line(ax, [(_array(line["x"]), _array(line["y"])) for line in lines], colour, label)
    for (label, level), style in zip(plot["levels"].items(), ("--", ":", "-.", (0, (1, 3))) * 8, strict=False):
        ax.axhline(level, color=QUIET, linestyle=style, linewidth=1.0, label=plain(label))
    _dress(ax, plot)
    ax.set_title(plain(plot["title"]), fontsize=8.5, loc="left")
    handles, names = ax.get_legend_handles_labels()
    if not alone:
        canvas.legend(handles, names, loc="center left", bbox_to_anchor=(0.655, 0.52), fontsize=7)
    n = len(seeds)
    return canvas, f" Thin lines are {n} seeds, thick ones their mean." if n > 1 else "", _csv(seeds)


def _line(ax: Axes, lines: list[tuple[Array, Array]], colour: Any, label: str) -> None:
    marker = "o" if len(lines[0][0]) <= 12 else None
    shared = all(len(x) == len(lines[0][0]) and np.array_equal(x, lines[0][0]) for x, _ in lines)
    width, look = 1.2, {"color": colour, "marker": marker, "markersize": 3}
    if len(lines) > 1 and shared:
        for x, y in lines:
            ax.plot(x, y, color=colour, linewidth=0.6, alpha=0.4)
        width, lines = 1.6, [(lines[0][0], np.mean([y for _, y in lines], axis=0))]
    for i, (x, y) in enumerate(lines):
        ax.plot(x, y, linewidth=width, label=None if i else plain(label), **look)


def _dress(ax: Axes, plot: Mapping[str, Any]) -> None:
    if plot["log_x"]:
        ax.set_xscale("log")
    if plot["log_y"]:
        ax.set_yscale("log")
    for axis, (low, high) in ((ax.xaxis, ax.get_xlim()), (ax.yaxis, ax.get_ylim())):
        if axis.get_scale() == "log":
            _label_logarithmic(axis, math.floor(math.log10(high)) - math.ceil(math.log10(low)) + 1)
    ax.set_xlabel(plain(plot["x_label"]))
    ax.set_ylabel(plain(plot["y_label"]))


def _label_logarithmic(axis: Axis, powers: int) -> None:
    """Label a logarithmic axis with so many powers of ten in view: one alone would give no scale."""
    if powers > 1:
        axis.set_minor_formatter(NullFormatter())  # powers are labelled, and minor labels would collide
    elif powers == 1:
        axis.set_minor_locator(LogLocator(subs=(2, 5)))
        for set_formatter in (axis.set_major_formatter, axis.set_minor_formatter):
            set_formatter("{x:g}")


def _clouds(seeds: Seeds) -> Drawn:
    """Draw clouds of points of the first seed, side by side on the same axes."""
    plot = seeds[0]
    clouds = [(line["label"], _array(line["x"]), _array(line["y"])) for line in plot["lines"]]
    canvas, axes = panels(len(clouds), 4, 1.85, foot=0.5)
    every = np.concatenate([np.concatenate([x, y]) for _, x, y in clouds])
    span = float(np.nanquantile(np.abs(every), 0.995)) * 1.08 or 1.0
    for i, (ax, (label, x, y)) in enumerate(zip(axes, clouds, strict=True)):
        ax.scatter(x, y, s=3, color="#0072B2", alpha=0.5, linewidths=0, rasterized=True)
        ax.set(xlim=(-span, span), ylim=(-span, span), aspect="equal")
        ax.tick_params(labelleft=i % 4 == 0)
        ax.text(0, 1.03, plain(label), transform=ax.transAxes, fontsize=7.2, va="bottom", wrap=True)
    return canvas, f" {plot['title']}; first seed.", _csv(seeds[:1])


def _images(seeds: Seeds) -> Drawn:
    """Draw rows of images of the first seed, one row per line of the plot."""
    plot = seeds[0]
    height, width = plot["image"]
    rows = [(line["label"], _array(line["y"]).reshape(-1, height, width)) for line in plot["lines"]]
    side, margin, head = 0.62, 1.75, 0.42
    columns, up = max(len(images) for _, images in rows), side * height / width
    across, tall = margin + columns * side + 0.08, head + len(rows) * side * height / width + 0.08
    canvas = new_canvas(across, tall)
    canvas.text(0.08 / across, 1 - 0.28 / tall, plain(plot["title"]), fontsize=8.5)
    for row, (label, images) in enumerate(rows):
        sheet = np.full((height + 1, columns * (width + 1)), np.nan)
        for column, image in enumerate(images):
            sheet[:height, column * (width + 1) : column * (width + 1) + width] = image
        box = (margin / across, 1 - (head + (row + 1) * up) / tall, columns * side / across, up / tall)
        ax = canvas.add_axes(box)
        ax.imshow(sheet, cmap="gray_r", vmin=0, vmax=1, interpolation="nearest", aspect="auto", rasterized=True)
        ax.set_axis_off()
        ax.text(
            -0.08 / (columns * side), 0.5, plain(label), transform=ax.transAxes, fontsize=7.2, ha="right", va="center"
        )
    named = ((label, i, image.flatten()) for label, images in rows for i, image in enumerate(images))
    pixels = ((label, i, *(significant(float(v), 3) for v in image)) for label, i, image in named)
    text = csv_text(("line", "image", *(f"pixel_{i}" for i in range(height * width))), *pixels)
    return canvas, f" {plot['title']}; first seed, unselected.", text


_DRAW: Mapping[str, Callable[[Seeds], Drawn]] = {"line": _curves, "points": _clouds, "images": _images}
