"""The experiments' plots: each record keeps its lines, and one figure shows all seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import LogLocator, NullFormatter
from numpy.typing import NDArray

from replicate.report.drawing import QUIET, Drawing, csv_text, fitting, new_figure, panels, plain
from replicate.report.labels import significant
from replicate.report.records import Run

Array = NDArray[np.float64]


def figure_name(paper: str, experiment: str, plot: str) -> str:
    """The file name of an experiment's plot."""
    return f"{paper}-{experiment}-{plot}" if not experiment.startswith(paper) else f"{experiment}-{plot}"


def experiment_drawings(runs: Iterable[Run]) -> Iterator[Drawing]:
    """One drawing a plot of every experiment."""
    by_experiment: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        if run.is_experiment and not run.failed:
            by_experiment.setdefault((run.model, run.task), []).append(run)
    for (paper, experiment), group in sorted(by_experiment.items()):
        ordered = sorted(group, key=lambda r: r.seed)
        plots = [r.plots for r in ordered if r.plots is not None]
        if len(plots) < len(ordered):
            continue  # what is to be drawn is not at hand
        ids = tuple(r.run_id for r in ordered)
        for plot in plots[0]:
            same = [p for found in plots for p in found if p["name"] == plot["name"]]
            name = figure_name(paper, experiment, str(plot["name"]))
            yield replace(_DRAW[plot["style"]](name, ordered[0].about, same), runs=ids)


def _array(values: Sequence[float | None]) -> Array:
    return np.array([math.nan if v is None else float(v) for v in values])


def _csv(seeds: Sequence[Mapping[str, Any]], head: tuple[str, str]) -> str:
    def make(most: int) -> str:
        rows = []
        for seed, plot in enumerate(seeds):
            for line in plot["lines"]:
                x, y = _array(line["x"]), _array(line["y"])
                keep = np.unique(np.linspace(0, len(x) - 1, min(most, len(x))).astype(int))
                rows += [(line["label"], seed, significant(x[i], 6), significant(y[i], 6)) for i in keep]
        return csv_text(("line", "seed", *head), rows)

    return fitting(make, (500, 200, 60))[1]


def _curves(name: str, about: str, seeds: Sequence[Mapping[str, Any]]) -> Drawing:
    """Lines of all seeds in one panel: thin for each seed, thick for their mean where all share their x."""
    plot = seeds[0]
    labels = [line["label"] for line in plot["lines"]]
    alone = len(labels) == 1 and not plot["levels"]
    figure = new_figure(6.4, 3.5)
    ax = figure.add_axes((0.12, 0.15, 0.84 if alone else 0.52, 0.74))
    for label, colour in zip(labels, sns.color_palette("colorblind", max(3, len(labels))), strict=False):
        lines = [line for p in seeds for line in p["lines"] if line["label"] == label]
        _line(ax, [(_array(line["x"]), _array(line["y"])) for line in lines], colour, label)
    for (label, level), style in zip(plot["levels"].items(), ("--", ":", "-.", (0, (1, 3))) * 8, strict=False):
        ax.axhline(level, color=QUIET, linestyle=style, linewidth=1.0, label=plain(label))
    _dress(ax, plot)
    ax.set_title(plain(plot["title"]), fontsize=8.5, loc="left")
    handles, names = ax.get_legend_handles_labels()
    if not alone:
        figure.legend(handles, names, loc="center left", bbox_to_anchor=(0.655, 0.52), fontsize=7)
    n = len(seeds)
    how = f" Thin lines are {n} seeds, thick ones their mean." if n > 1 else ""
    return Drawing(
        name,
        plot["title"],
        f"{about[:1].upper()}{about[1:]}.{how}",
        figure,
        _csv(seeds, (plot["x_label"], plot["y_label"])),
    )


def _line(ax: Axes, lines: list[tuple[Array, Array]], colour: Any, label: str) -> None:
    marker = "o" if len(lines[0][0]) <= 12 else None
    shared = all(len(x) == len(lines[0][0]) and np.array_equal(x, lines[0][0]) for x, _ in lines)
    if len(lines) == 1 or not shared:
        for i, (x, y) in enumerate(lines):
            ax.plot(
                x, y, color=colour, linewidth=1.2, marker=marker, markersize=3, label=plain(label) if not i else None
            )
        return
    for x, y in lines:
        ax.plot(x, y, color=colour, linewidth=0.6, alpha=0.4)
    middle = np.mean([y for _, y in lines], axis=0)
    ax.plot(lines[0][0], middle, color=colour, linewidth=1.6, marker=marker, markersize=3, label=plain(label))


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
    """Numbers on a logarithmic axis with so many powers of ten in view: one alone would give no scale."""
    if powers > 1:
        axis.set_minor_formatter(NullFormatter())  # they are labelled, and minor labels would collide
    elif powers == 1:
        axis.set_minor_locator(LogLocator(subs=(2, 5)))
        for set_formatter in (axis.set_major_formatter, axis.set_minor_formatter):
            set_formatter("{x:g}")


def _clouds(name: str, about: str, seeds: Sequence[Mapping[str, Any]]) -> Drawing:
    """Clouds of points of the first seed, side by side on the same axes."""
    plot = seeds[0]
    clouds = [(line["label"], _array(line["x"]), _array(line["y"])) for line in plot["lines"]]
    figure, axes = panels(len(clouds), 4, 1.85, foot=0.5)
    every = np.concatenate([np.concatenate([x, y]) for _, x, y in clouds])
    span = float(np.nanquantile(np.abs(every), 0.995)) * 1.08 or 1.0
    for i, (ax, (label, x, y)) in enumerate(zip(axes, clouds, strict=True)):
        ax.scatter(x, y, s=3, color="#0072B2", alpha=0.5, linewidths=0, rasterized=True)
        ax.set(xlim=(-span, span), ylim=(-span, span), aspect="equal")
        ax.tick_params(labelleft=i % 4 == 0)
        ax.text(0, 1.03, plain(label), transform=ax.transAxes, fontsize=7.2, va="bottom", wrap=True)
    caption = f"{about[:1].upper()}{about[1:]}. {plot['title']}; first seed."
    return Drawing(name, plot["title"], caption, figure, _csv(seeds[:1], (plot["x_label"], plot["y_label"])))


def _images(name: str, about: str, seeds: Sequence[Mapping[str, Any]]) -> Drawing:
    """Rows of images of the first seed, a row a line of the plot."""
    plot = seeds[0]
    height, width = plot["image"]
    rows = [(line["label"], _array(line["y"]).reshape(-1, height, width)) for line in plot["lines"]]
    side, margin, head = 0.62, 1.75, 0.42
    columns = max(len(images) for _, images in rows)
    size = (margin + columns * side + 0.08, head + len(rows) * side * height / width + 0.08)
    figure = new_figure(*size)
    figure.text(0.08 / size[0], 1 - 0.28 / size[1], plain(plot["title"]), fontsize=8.5)
    for row, (label, images) in enumerate(rows):
        sheet = np.full((height + 1, columns * (width + 1)), np.nan)
        for column, image in enumerate(images):
            sheet[:height, column * (width + 1) : column * (width + 1) + width] = image
        up = side * height / width
        box = (margin / size[0], 1 - (head + (row + 1) * up) / size[1], columns * side / size[0], up / size[1])
        ax = figure.add_axes(box)
        ax.imshow(sheet, cmap="gray_r", vmin=0, vmax=1, interpolation="nearest", aspect="auto", rasterized=True)
        ax.set_axis_off()
        ax.text(
            -0.08 / (columns * side), 0.5, plain(label), transform=ax.transAxes, fontsize=7.2, ha="right", va="center"
        )
    head_line = ("line", "image", *(f"pixel_{i}" for i in range(height * width)))
    pixels = (
        (label, i, *(significant(float(v), 3) for v in image.flatten()))
        for label, images in rows
        for i, image in enumerate(images)
    )
    caption = f"{about[:1].upper()}{about[1:]}. {plot['title']}; first seed, unselected."
    return Drawing(name, plot["title"], caption, figure, csv_text(head_line, pixels))


_DRAW: Mapping[str, Callable[[str, str, Sequence[Mapping[str, Any]]], Drawing]] = {
    "line": _curves,
    "points": _clouds,
    "images": _images,
}
