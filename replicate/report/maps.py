"""Pictures of one seed: densities, score fields, Langevin paths and sample sheets, every model beside the truth.

Each figure function returns the figure, or None where the records hold nothing to draw.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import FixedLocator, MaxNLocator

from replicate.report import drawing
from replicate.report.drawing import Array, Figure
from replicate.report.labels import family_key, significant, slug, symbol
from replicate.report.records import RecordedRun, RecordedRuns
from replicate.report.tables import Results, info_of
from replicate.report.text_table import Number, csv_text

#: panels side by side, and the side of each in inches
COLUMNS, SIDE = 6, 1.62
#: densities below this share of the peak are written as 0 beside a map: the eye cannot see them
FLOOR = 1e-4


@dataclass(frozen=True)
class Picture:
    """One model's arrays on one task, from the lowest seed that kept any."""

    model: str
    family: str
    arrays: dict[str, np.ndarray]

    def get(self, name: str) -> Array | None:
        """Return an array in double precision, or None."""
        found = self.arrays.get(name)
        return None if found is None else np.asarray(found, dtype=np.float64)


def pictures(runs: RecordedRuns, task: str) -> list[Picture]:
    """Return the pictures of a task: the truth, then the models by family, then the references."""
    chosen: dict[str, RecordedRun] = {}
    for run in (r for r in runs.done if r.task == task and r.arrays_file):
        chosen.setdefault(run.model, run)
    order = sorted(chosen.values(), key=lambda r: (r.model != "truth", family_key(r.family), r.model))
    return [Picture(r.model, r.family, r.arrays()) for r in order]


# -- maps of densities and scores


@dataclass(frozen=True)
class Map:
    """A density on a grid: values (G, G) with rows along x2, normalised over the grid's square."""

    picture: Picture
    axis: Array
    values: Array
    source: str


def _normalised(values: Array, axis: Array) -> Array:
    cell = float(axis[1] - axis[0]) ** 2
    total = values.sum() * cell
    return values / total if total > 0 else values


def density_map(picture: Picture, axis: Array | None) -> Map | None:
    """Return a model's density over the square, or a histogram of its samples where it gives no density."""
    log_p, own = picture.get("grid_log_density"), picture.get("grid_axis")
    if log_p is not None and own is not None and log_p.ndim == 2 and np.isfinite(log_p).any():
        values = np.exp(np.nan_to_num(log_p - np.nanmax(log_p[np.isfinite(log_p)]), nan=-np.inf, posinf=-np.inf))
        return Map(picture, own, _normalised(values, own), "density")
    samples = picture.get("samples")
    if axis is None or samples is None or samples.ndim != 2 or samples.shape[1] != 2:
        return None
    step = 2 * (axis[1] - axis[0])  # cells twice as wide as the grid's: a thousand samples fill no finer ones
    edges = np.arange(axis[0] - step / 2, axis[-1] + step, step)
    finite = samples[np.isfinite(samples).all(1)]
    counts = np.histogram2d(finite[:, 1], finite[:, 0], bins=[edges, edges])[0]
    centres = (edges[:-1] + edges[1:]) / 2
    return Map(picture, centres, _normalised(counts, centres), "samples")


def density_maps(pictured: Sequence[Picture]) -> list[Map]:
    """Return the maps of all pictures that have one, on the square of the first grid found."""
    axis = next((p.get("grid_axis") for p in pictured if p.get("grid_axis") is not None), None)
    return [m for m in (density_map(p, axis) for p in pictured) if m is not None]


def pooled(m: Map, points: int) -> Map:
    """Average neighbouring cells of a map until it has at most `points` per side."""
    g = len(m.axis)
    if g <= points:
        return m
    starts = np.linspace(0, g, points, endpoint=False).astype(int)
    sizes = np.diff([*starts, g])
    values = np.add.reduceat(np.add.reduceat(m.values, starts, 0), starts, 1) / np.outer(sizes, sizes)
    return Map(m.picture, np.add.reduceat(m.axis, starts) / sizes, values, m.source)


def _peak(maps: Sequence[Map]) -> float:
    truth = [m for m in maps if m.picture.model == "truth"]
    return float(max((m.values.max() for m in truth or maps), default=1.0)) or 1.0


def _map_rows(full: Sequence[Map], floor: float, points: int) -> Iterator[list[str]]:
    """Return the head, and each model's rows of values, before them one with its x1 axis."""
    maps = [pooled(m, points) for m in full]
    yield ["model", "source", "x2", *(f"x1_{i}" for i in range(max(len(m.axis) for m in maps)))]
    for m in maps:
        yield [m.picture.model, "x1", "", *(significant(float(x)) for x in m.axis)]
        for y, line in zip(m.axis, m.values, strict=True):
            numbers = ["0" if v < floor else significant(float(v)) for v in line]
            yield [m.picture.model, m.source, significant(float(y)), *numbers]


def _squares(shown: Sequence[Picture], half: float, notes: Sequence[str]) -> tuple[Canvas, list[Axes]]:
    """Make a panel of half width `half` per model with its note; the one at the lower left has ticks and labels."""
    canvas, axes = drawing.panels(len(shown), COLUMNS, SIDE, foot=0.66)
    corner = axes[(len(shown) - 1) // COLUMNS * COLUMNS]
    ticks = [t for t in MaxNLocator(4, steps=[1, 2, 5, 10]).tick_values(-half, half) if abs(t) <= half]
    for ax, p, note in zip(axes, shown, notes, strict=True):
        ax.set(xlim=(-half, half), ylim=(-half, half))
        ax.grid(False)
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_locator(FixedLocator(ticks if ax is corner else []))
        drawing.panel_title(ax, p.model, note, p.family)
    corner.tick_params(length=2, pad=1.5, labelsize=6.5)
    corner.set_xlabel("x1", fontsize=7, labelpad=0)
    corner.set_ylabel("x2", fontsize=7, labelpad=-2)
    drawing.family_legend(canvas, [p.family for p in shown])
    return canvas, axes


def _show(ax: Axes, m: Map, peak: float, alpha: float = 1.0) -> None:
    step = (m.axis[1] - m.axis[0]) / 2
    low, high = m.axis[0] - step, m.axis[-1] + step
    ax.imshow(
        m.values,
        origin="lower",
        extent=(low, high, low, high),
        cmap=drawing.DENSITY,
        norm=PowerNorm(0.5, 0, peak, clip=True),
        interpolation="bilinear" if m.source == "density" else "nearest",
        aspect="auto",
        alpha=alpha,
        rasterized=True,
    )


def _half_width(maps: Sequence[Map]) -> float:
    return max(float(np.abs(m.axis).max()) for m in maps if m.source == "density" or len(maps) == 1)


def _note(number: Number | None, label: str, form: str, otherwise: str) -> str:
    """Write a number with its label and kind; the words `otherwise` where there is none."""
    return f"{label} {symbol(number.kind)} {number.mean:{form}}" if number else otherwise


def density_figure(results: Results, task: str, pictured: Sequence[Picture]) -> Figure | None:
    """Draw every model's density beside the truth."""
    full = density_maps(pictured)
    if not any(m.source == "density" for m in full):
        return None
    points, text = drawing.fitting(partial(_map_rows, full, FLOOR * _peak(full)), (120, 100, 80, 60, 50, 40, 30))
    maps = [pooled(m, points) for m in full]
    peak, half = _peak(maps), _half_width(maps)
    notes = []
    for m in maps:
        note = _note(results.number(task, m.picture.model, "kl"), "KL", ".3f", "no density")
        note += "" if m.source == "density" else "; samples"
        notes.append("the truth" if m.picture.model == "truth" else note)
    canvas, axes = _squares([m.picture for m in maps], half, notes)
    for ax, m in zip(axes, maps, strict=True):
        _show(ax, m, peak)
    _colour_bar(canvas, peak)
    caption = (
        f"Density of every model on {task}, seed 0, each normalised over the square shown (half width "
        f"{half:.3g}); colours by the square root of the density, up to the truth's peak. KL(truth || model) in nats, "
        "mean over seeds. Where a model gives no density, a histogram of its samples."
    )
    return Figure(f"density-{slug(task)}", f"Densities: {task}", caption, canvas, text)


def _colour_bar(canvas: Canvas, peak: float) -> None:
    width, height = canvas.get_size_inches()
    bar = canvas.add_axes((1 - (0.08 + SIDE) / width, 0.44 / height, SIDE / width, 0.08 / height))
    ramp = np.linspace(0, peak, 128)[None]
    bar.imshow(ramp, cmap=drawing.DENSITY, norm=PowerNorm(0.5, 0, peak), aspect="auto", extent=(0, peak, 0, 1))
    bar.grid(False)
    bar.set_yticks([])
    bar.set_xticks([0, peak], ["0", f"{peak:.2g} per unit area"])
    bar.tick_params(length=0, pad=1.5, labelsize=6.5)
    first, last = bar.get_xticklabels()
    first.set_horizontalalignment("left")
    last.set_horizontalalignment("right")


def score_figure(results: Results, task: str, pictured: Sequence[Picture]) -> Figure | None:
    """Draw every model's score field over its density."""
    found = ((p, p.get("score_axis"), p.get("grid_score")) for p in pictured)
    have = ((p, a, score) for p, a, score in found if a is not None and score is not None)
    fields = [(p, axis, score) for p, axis, score in have if score.shape == (len(axis), len(axis), 2)]
    maps = {m.picture.model: m for m in density_maps(pictured) if m.source == "density"}
    if not fields:
        return None
    stride, text = drawing.fitting(partial(_field_rows, fields), (1, 2, 3, 4))
    shown = maps.get("truth") or next(iter(maps.values()), None)
    peak = _peak(list(maps.values())) if maps else 1.0
    half = _half_width(list(maps.values())) if maps else float(np.abs(fields[0][1]).max())
    typical = float(np.nanmedian(np.linalg.norm(fields[0][2], axis=-1))) or 1.0
    numbers = (results.number(task, p.model, "fisher_divergence") for p, *_ in fields)
    notes = [_note(n, "Fisher div.", ".3g", "score of the model") for n in numbers]
    notes = ["the truth" if p.model == "truth" else note for (p, *_), note in zip(fields, notes, strict=True)]
    canvas, axes = _squares([p for p, *_ in fields], half, notes)
    for ax, (p, axis, score) in zip(axes, fields, strict=True):
        background = maps.get(p.model, shown)
        if background is not None:
            _show(ax, background, peak, alpha=0.55)
        _quiver(ax, axis[::stride], score[::stride, ::stride], typical, p.family)
    caption = (
        f"Score grad log p of every model that has one on {task}, seed 0, over its density (the truth's where it gives "
        f"none). Arrows point along the score; their length is s / (s + {typical:.3g}), which keeps the far tails."
    )
    name = f"score-{slug(task)}"
    return Figure(name, f"Scores: {task}", caption, canvas, text, (f"density-{slug(task)}",) if maps else ())


def _field_rows(fields: Sequence[tuple[Picture, Array, Array]], stride: int) -> Iterator[list[str]]:
    yield ["model", "x1", "x2", "score_x1", "score_x2"]
    for p, axis, score in fields:
        at = axis[::stride]
        for y, line in zip(at, score[::stride, ::stride], strict=True):
            for x, (a, b) in zip(at, line, strict=True):
                yield [p.model, *(significant(float(v)) for v in (x, y, a, b))]


def _quiver(ax: Axes, axis: Array, score: Array, typical: float, family: str) -> None:
    size = np.linalg.norm(score, axis=-1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        arrows = np.where(size > 0, score / (size + typical), 0.0)
    x, y = np.meshgrid(axis, axis)
    step = float(axis[1] - axis[0]) if len(axis) > 1 else 1.0
    ax.quiver(
        x,
        y,
        *np.nan_to_num(np.moveaxis(arrows, -1, 0)) * step * 1.7,
        angles="xy",
        scale_units="xy",
        scale=1,
        pivot="mid",
        width=0.0062,
        headwidth=3.2,
        headlength=3.6,
        headaxislength=3.3,
        minlength=0,
        color=drawing.darker(family),
        rasterized=True,
    )


def path_figure(results: Results, task: str, pictured: Sequence[Picture]) -> Figure | None:
    """Draw Langevin chains of every model that has a score, over the truth."""
    found = ((p, p.get("path")) for p in pictured)
    walks = [(p, path) for p, path in found if path is not None and path.ndim == 3 and path.shape[2] == 2]
    maps = [m for m in density_maps(pictured) if m.source == "density"]
    if not walks or not maps:
        return None
    chains, text = drawing.fitting(partial(_path_rows, walks), (12, 8, 6, 4, 2))
    truth = next((m for m in maps if m.picture.model == "truth"), maps[0])
    numbers = (results.number(task, p.model, "w2:ula") for p, _ in walks)
    notes = [_note(n, "2-Wasserstein", ".3g", "unadjusted Langevin") for n in numbers]
    canvas, axes = _squares([p for p, _ in walks], _half_width(maps), notes)
    for ax, (p, path) in zip(axes, walks, strict=True):
        _show(ax, truth, _peak(maps), alpha=0.5)
        _draw_paths(ax, path[:, :chains], p.family)
    caption = (
        f"{chains} chains of unadjusted Langevin dynamics on each model's own score on {task}, seed 0, over the "
        "truth's density: hollow dots are starts, full dots ends. 2-Wasserstein distance of all ends, mean over seeds."
    )
    name = f"paths-{slug(task)}"
    return Figure(name, f"Langevin paths: {task}", caption, canvas, text, (f"density-{slug(task)}",))


def _path_rows(walks: Sequence[tuple[Picture, Array]], chains: int) -> Iterator[list[object]]:
    yield ["model", "chain", "state", "x1", "x2"]
    for p, path in walks:
        for chain in range(min(chains, path.shape[1])):
            for state, (a, b) in enumerate(path[:, chain]):
                yield [p.model, chain, state, significant(float(a)), significant(float(b))]


def _draw_paths(ax: Axes, path: Array, family: str) -> None:
    path = np.clip(np.nan_to_num(path, nan=1e6, posinf=1e6, neginf=-1e6), -1e6, 1e6)
    lines = [path[:, c] for c in range(path.shape[1])]
    ax.add_collection(LineCollection(lines, colors=drawing.darker(family), linewidths=0.7, alpha=0.65, rasterized=True))
    ax.plot(*path[0].T, "o", ms=2.6, mfc="white", mec=drawing.QUIET, mew=0.6)
    ax.plot(*path[-1].T, "o", ms=3.0, mfc=drawing.colour(family), mec="white", mew=0.5)


# -- samples

TILES = 6


class Sheet(NamedTuple):
    """Samples of one model, or rows of the test split: (n, D)."""

    name: str
    family: str
    note: str
    rows: Array


def samples_figure(results: Results, task: str, pictured: Sequence[Picture]) -> Figure | None:
    """Draw samples of every model beside test data: images as mosaics, other bits row by row, tables as scatters."""
    sheets: list[Sheet] = []
    levels = math.nan  # of a table without levels
    for p in pictured:
        samples, top = p.get("samples"), p.get("levels")
        if samples is None or top is None or samples.ndim != 2:
            continue
        levels = float(top)
        reference = p.get("reference_samples")
        if not sheets and reference is not None:
            sheets.append(Sheet("test data", "reference", "real data", reference))
        number = results.number(task, p.model, "nll")
        note = _note(number, "NLL", ".1f", "NLL n/a") + (" nats" if number else "")
        sheets.append(Sheet(p.model, p.family, note, samples))
    if not sheets:
        return None
    dim, info = sheets[0].rows.shape[1], info_of(task)
    shown, what = TILES**2, "of the test split"
    canvas, axes = drawing.panels(len(sheets), COLUMNS, SIDE)
    for ax in axes:
        ax.grid(False)
        ax.set(xticks=[], yticks=[])
    if math.isnan(levels):
        shown = max(len(s.rows) for s in sheets)
        what += _columns(axes, sheets)
    elif info is not None and info.image is not None:
        _mosaics(axes, sheets, levels, info.image)
    else:
        for ax, sheet in zip(axes, sheets, strict=True):
            _grey(ax, sheet.rows[:shown], levels, aspect="auto")
        what += f"; a line is one of them, a column one of {dim} bits"
    for ax, (name, family, note, _) in zip(axes, sheets, strict=True):
        drawing.panel_title(ax, name, note, family)
    drawing.family_legend(canvas, [s.family for s in sheets])
    rows = ([s.name, i, *(significant(float(v)) for v in row)] for s in sheets for i, row in enumerate(s.rows[:shown]))
    text = csv_text(["model", "sample", *(f"x_{i}" for i in range(dim))], *rows)
    caption = f"The first {shown} samples of every model on {task}, seed 0, unselected, beside as many {what}."
    return Figure(f"samples-{slug(task)}", f"Samples: {task}", caption, canvas, text)


def _grey(ax: Axes, picture: Array, levels: float, aspect: Literal["auto", "equal"] = "equal") -> None:
    ax.imshow(picture, cmap="gray_r", vmin=0, vmax=levels - 1, aspect=aspect, interpolation="nearest", rasterized=True)


def _columns(axes: Sequence[Axes], sheets: Sequence[Sheet]) -> str:
    """Draw a table's rows by two of its columns, or its only one, and return which, for the caption."""
    dim = sheets[0].rows.shape[1]
    if dim == 1:
        low, high = sheets[0].rows.min(), sheets[0].rows.max()
        edges = np.linspace(low - 1e-6, high + 1e-6, 26).tolist()
        for ax, sheet in zip(axes, sheets, strict=True):
            ax.hist(sheet.rows[:, 0], bins=edges, color=drawing.colour(sheet.family), alpha=0.6)
        return "; histograms of their only column, over the range of the test split"
    i, j = _scatters(axes, sheets)
    return f"; of {dim} columns, all of them in the CSV, those two that are most correlated there: {i} and {j}"


def _scatters(axes: Sequence[Axes], sheets: Sequence[Sheet]) -> tuple[int, int]:
    """Draw scatters of the two columns most correlated in the first sheet, over its range, and return their indices."""
    first = sheets[0].rows
    correlation = np.abs(np.nan_to_num(np.corrcoef(first.T)))
    i, j = divmod(int(np.triu(correlation, 1).argmax()), first.shape[1])
    low, high = first[:, [i, j]].min(0), first[:, [i, j]].max(0)
    room = 0.15 * (high - low) + 1e-6
    for ax, sheet in zip(axes, sheets, strict=True):
        ax.scatter(sheet.rows[:, i], sheet.rows[:, j], s=4, color=drawing.colour(sheet.family), alpha=0.6, linewidths=0)
        ax.set(xlim=(low[0] - room[0], high[0] + room[0]), ylim=(low[1] - room[1], high[1] + room[1]))
    return i, j


def _mosaics(axes: Sequence[Axes], sheets: Sequence[Sheet], levels: float, shape: tuple[int, int]) -> None:
    """Draw the first images of each sheet, (height, width) each, with pale lines between them."""
    height, width = shape
    for ax, sheet in zip(axes, sheets, strict=True):
        picture = np.full((TILES * (height + 1) - 1, TILES * (width + 1) - 1), 0.12 * (levels - 1))
        for i, image in enumerate(sheet.rows[: TILES**2]):
            r, c = i // TILES * (height + 1), i % TILES * (width + 1)
            picture[r : r + height, c : c + width] = image.reshape(height, width)
        _grey(ax, picture, levels)
