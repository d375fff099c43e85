"""Figures: every model beside the truth, and quality against cost and dimension.

Each function returns a `Drawing` (or None where the records hold nothing to draw): the figure, and the CSV text of
what is in it. Maps, samples and paths come from one seed's arrays; everything else from the measurements of all.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator
from numpy.typing import NDArray

from replicate.report.drawing import (
    DENSITY,
    INK,
    MARKERS,
    MAX_CSV,
    QUIET,
    Drawing,
    colour,
    darker,
    family_legend,
    new_figure,
    panel_title,
    panels,
    plain,
    shade,
)
from replicate.report.labels import FAMILY_LABELS, family_key, metric_info, significant, slug, symbol
from replicate.report.records import Run, Runs
from replicate.report.tables import (
    Number,
    Results,
    data_tasks,
    density_tasks,
    planar_tasks,
    task_dimension,
)

Array = NDArray[np.float64]
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
        """An array in double precision, or None."""
        found = self.arrays.get(name)
        return None if found is None else np.asarray(found, dtype=np.float64)


def pictures(runs: Runs, task: str) -> list[Picture]:
    """The pictures of a task: the truth, then the models by family, then the references."""
    chosen: dict[str, Run] = {}
    for run in runs.done:
        if run.task == task and run.model not in chosen and (run.folder / "arrays.npz").exists():
            chosen[run.model] = run
    order = sorted(chosen.values(), key=lambda r: (r.model != "truth", family_key(r.family), r.model))
    return [Picture(r.model, r.family, r.arrays()) for r in order]


def csv_text(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """CSV with Unix line ends."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(rows)
    return out.getvalue()


def fitting(make: Callable[[int], str], sizes: Iterable[int]) -> tuple[int, str]:
    """The first of the sizes whose CSV is small enough to ship, or the last; with its CSV."""
    size, text = 0, ""
    for size in sizes:
        text = make(size)
        if len(text.encode()) <= MAX_CSV:
            break
    return size, text


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
    """A model's density over the square; a histogram of its samples where it gives no density."""
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
    """The maps of all pictures that have one, on the square of the first grid found."""
    axis = next((p.get("grid_axis") for p in pictured if p.get("grid_axis") is not None), None)
    return [m for m in (density_map(p, axis) for p in pictured) if m is not None]


def pooled(m: Map, points: int) -> Map:
    """The map on at most `points` cells a side, by averaging neighbours."""
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


def _map_rows(maps: Sequence[Map], floor: float) -> Iterator[list[str]]:
    for m in maps:
        for y, line in zip(m.axis, m.values, strict=True):
            numbers = ["0" if v < floor else significant(float(v)) for v in line]
            yield [m.picture.model, m.source, significant(float(y)), *numbers]


def _square(ax: Axes, half: float, corner: bool) -> None:
    """A square view; only the panel in the lower left corner of a figure carries the axes."""
    ax.set(xlim=(-half, half), ylim=(-half, half))
    ax.grid(False)
    ticks = [t for t in MaxNLocator(4, steps=[1, 2, 5, 10]).tick_values(-half, half) if abs(t) <= half]
    ax.xaxis.set_major_locator(FixedLocator(ticks if corner else []))
    ax.yaxis.set_major_locator(FixedLocator(ticks if corner else []))
    if corner:
        ax.tick_params(length=2, pad=1.5, labelsize=6.5)
        ax.set_xlabel("x1", fontsize=7, labelpad=0)
        ax.set_ylabel("x2", fontsize=7, labelpad=-2)


def _corner(count: int) -> int:
    """Index of the panel in the lower left corner."""
    return (count - 1) // COLUMNS * COLUMNS


def _show(ax: Axes, m: Map, peak: float, alpha: float = 1.0) -> None:
    step = (m.axis[1] - m.axis[0]) / 2
    low, high = m.axis[0] - step, m.axis[-1] + step
    ax.imshow(
        m.values,
        origin="lower",
        extent=(low, high, low, high),
        cmap=DENSITY,
        norm=PowerNorm(0.5, 0, peak, clip=True),
        interpolation="bilinear" if m.source == "density" else "nearest",
        aspect="auto",
        alpha=alpha,
        rasterized=True,
    )


def _half_width(maps: Sequence[Map]) -> float:
    return max(float(np.abs(m.axis).max()) for m in maps if m.source == "density" or len(maps) == 1)


def _kl_note(results: Results, task: str, picture: Picture, source: str) -> str:
    if picture.model == "truth":
        return "the truth"
    number = results.number(task, picture.model, "kl")
    text = f"KL {symbol(number.kind)} {number.mean:.3f}" if number else "no density"
    return text if source == "density" else f"{text}; samples"


def density_figure(results: Results, task: str, pictured: Sequence[Picture]) -> Drawing | None:
    """Every model's density beside the truth."""
    full = density_maps(pictured)
    if not any(m.source == "density" for m in full):
        return None
    floor = FLOOR * _peak(full)

    def make(points: int) -> str:
        maps = [pooled(m, points) for m in full]
        widest = max(len(m.axis) for m in maps)
        return csv_text(["model", "source", "x2", *(f"x1_{i}" for i in range(widest))], _axis_and_rows(maps, floor))

    points, text = fitting(make, (120, 100, 80, 60, 50, 40, 30))
    maps = [pooled(m, points) for m in full]
    peak, half = _peak(maps), _half_width(maps)
    figure, axes = panels(len(maps), COLUMNS, SIDE, foot=0.66)
    for i, (ax, m) in enumerate(zip(axes, maps, strict=True)):
        _show(ax, m, peak)
        _square(ax, half, i == _corner(len(maps)))
        panel_title(ax, m.picture.model, _kl_note(results, task, m.picture, m.source), m.picture.family)
    _colour_bar(figure, peak)
    family_legend(figure, [m.picture.family for m in maps])
    caption = (
        f"Density of every model on {task}, seed 0, each normalised over the square shown (half width "
        f"{half:.3g}); colours by the square root of the density, up to the truth's peak. KL(truth || model) in nats, "
        "mean over seeds. Where a model gives no density, a histogram of its samples."
    )
    return Drawing(f"density-{slug(task)}", f"Densities: {task}", caption, figure, text)


def _axis_and_rows(maps: Sequence[Map], floor: float) -> Iterator[list[str]]:
    """Before each model's rows, one with its x1 axis."""
    for m in maps:
        yield [m.picture.model, "x1", "", *(significant(float(x)) for x in m.axis)]
        yield from _map_rows([m], floor)


def _colour_bar(figure: Figure, peak: float) -> None:
    width, height = figure.get_size_inches()
    bar = figure.add_axes((1 - (0.08 + SIDE) / width, 0.44 / height, SIDE / width, 0.08 / height))
    bar.imshow(
        np.linspace(0, peak, 128)[None],
        cmap=DENSITY,
        norm=PowerNorm(0.5, 0, peak),
        aspect="auto",
        extent=(0, peak, 0, 1),
    )
    bar.grid(False)
    bar.set_yticks([])
    bar.set_xticks([0, peak], ["0", f"{peak:.2g} per unit area"])
    bar.tick_params(length=0, pad=1.5, labelsize=6.5)
    first, last = bar.get_xticklabels()
    first.set_horizontalalignment("left")
    last.set_horizontalalignment("right")


def score_figure(results: Results, task: str, pictured: Sequence[Picture]) -> Drawing | None:
    """Every model's score field over its density."""
    fields = []
    for p in pictured:
        score, axis = p.get("grid_score"), p.get("score_axis")
        if score is not None and axis is not None and score.shape == (len(axis), len(axis), 2):
            fields.append((p, axis, score))
    maps = {m.picture.model: m for m in density_maps(pictured) if m.source == "density"}
    if not fields:
        return None

    def make(stride: int) -> str:
        return csv_text(["model", "x1", "x2", "score_x1", "score_x2"], _field_rows(fields, stride))

    stride, text = fitting(make, (1, 2, 3, 4))
    shown = maps.get("truth") or next(iter(maps.values()), None)
    peak = _peak(list(maps.values())) if maps else 1.0
    half = _half_width(list(maps.values())) if maps else float(np.abs(fields[0][1]).max())
    typical = float(np.nanmedian(np.linalg.norm(fields[0][2], axis=-1))) or 1.0
    figure, axes = panels(len(fields), COLUMNS, SIDE, foot=0.66)
    for i, (ax, (p, axis, score)) in enumerate(zip(axes, fields, strict=True)):
        background = maps.get(p.model, shown)
        if background is not None:
            _show(ax, background, peak, alpha=0.55)
        _quiver(ax, axis[::stride], score[::stride, ::stride], typical, p.family)
        _square(ax, half, i == _corner(len(fields)))
        number = results.number(task, p.model, "fisher_divergence")
        note = "the truth" if p.model == "truth" else "score of the model"
        panel_title(ax, p.model, note if number is None or p.model == "truth" else _fisher(number), p.family)
    family_legend(figure, [p.family for p, *_ in fields])
    caption = (
        f"Score grad log p of every model that has one on {task}, seed 0, over its density (the truth's where it gives "
        f"none). Arrows point along the score; their length is s / (s + {typical:.3g}), which keeps the far tails."
    )
    name = f"score-{slug(task)}"
    return Drawing(name, f"Scores: {task}", caption, figure, text, (f"density-{slug(task)}",) if maps else ())


def _fisher(number: Number) -> str:
    return f"Fisher div. {symbol(number.kind)} {number.mean:.3g}"


def _field_rows(fields: Sequence[tuple[Picture, Array, Array]], stride: int) -> Iterator[list[str]]:
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
        color=darker(family),
        rasterized=True,
    )


def path_figure(results: Results, task: str, pictured: Sequence[Picture]) -> Drawing | None:
    """Langevin chains of every model that has a score, over the truth."""
    walks = []
    for p in pictured:
        path = p.get("path")
        if path is not None and path.ndim == 3 and path.shape[2] == 2:
            walks.append((p, path))
    maps = [m for m in density_maps(pictured) if m.source == "density"]
    if not walks or not maps:
        return None

    def make(chains: int) -> str:
        return csv_text(["model", "chain", "state", "x1", "x2"], _path_rows(walks, chains))

    chains, text = fitting(make, (12, 8, 6, 4, 2))
    truth = next((m for m in maps if m.picture.model == "truth"), maps[0])
    half = _half_width(maps)
    figure, axes = panels(len(walks), COLUMNS, SIDE, foot=0.66)
    for i, (ax, (p, path)) in enumerate(zip(axes, walks, strict=True)):
        _show(ax, truth, _peak(maps), alpha=0.5)
        _draw_paths(ax, path[:, :chains], p.family)
        _square(ax, half, i == _corner(len(walks)))
        number = results.number(task, p.model, "w2:ula")
        note = f"2-Wasserstein {symbol(number.kind)} {number.mean:.3g}" if number else "unadjusted Langevin"
        panel_title(ax, p.model, note, p.family)
    family_legend(figure, [p.family for p, _ in walks])
    caption = (
        f"{chains} chains of unadjusted Langevin dynamics on each model's own score on {task}, seed 0, over the "
        "truth's density: hollow dots are starts, full dots ends. 2-Wasserstein distance of all ends, mean over seeds."
    )
    name = f"paths-{slug(task)}"
    return Drawing(name, f"Langevin paths: {task}", caption, figure, text, (f"density-{slug(task)}",))


def _path_rows(walks: Sequence[tuple[Picture, Array]], chains: int) -> Iterator[list[object]]:
    for p, path in walks:
        for chain in range(min(chains, path.shape[1])):
            for state, (a, b) in enumerate(path[:, chain]):
                yield [p.model, chain, state, significant(float(a)), significant(float(b))]


def _draw_paths(ax: Axes, path: Array, family: str) -> None:
    path = np.clip(np.nan_to_num(path, nan=1e6, posinf=1e6, neginf=-1e6), -1e6, 1e6)
    lines = [path[:, c] for c in range(path.shape[1])]
    ax.add_collection(LineCollection(lines, colors=darker(family), linewidths=0.7, alpha=0.65, rasterized=True))
    ax.plot(*path[0].T, "o", markersize=2.6, markerfacecolor="white", markeredgecolor=QUIET, markeredgewidth=0.6)
    ax.plot(
        *path[-1].T, "o", markersize=3.0, markerfacecolor=colour(family), markeredgecolor="white", markeredgewidth=0.5
    )


# -- samples of digits

TILES = 6


def samples_figure(results: Results, task: str, pictured: Sequence[Picture]) -> Drawing | None:
    """A sheet of samples of every model beside test images."""
    sheets: list[tuple[str, str, str, Array]] = []
    levels = 2.0
    for p in pictured:
        samples, top = p.get("samples"), p.get("levels")
        if samples is None or top is None or samples.ndim != 2:
            continue
        levels = max(levels, float(top))
        reference = p.get("reference_samples")
        if not sheets and reference is not None:
            sheets.append(("test data", "reference", "real images", reference[: TILES**2]))
        number = results.number(task, p.model, "nll")
        note = f"NLL {symbol(number.kind)} {number.mean:.1f} nats" if number else "NLL n/a"
        sheets.append((p.model, p.family, note, samples[: TILES**2]))
    if not sheets:
        return None
    figure, axes = panels(len(sheets), COLUMNS, SIDE)
    for ax, (name, family, note, images) in zip(axes, sheets, strict=True):
        ax.imshow(
            _mosaic(images, levels), cmap="gray_r", vmin=0, vmax=levels - 1, interpolation="nearest", rasterized=True
        )
        ax.grid(False)
        ax.set(xticks=[], yticks=[])
        panel_title(ax, name, note, family)
    family_legend(figure, [s[1] for s in sheets])
    rows = (
        [name, i, *(significant(float(v)) for v in image)]
        for name, _, _, images in sheets
        for i, image in enumerate(images)
    )
    text = csv_text(["model", "image", *(f"pixel_{i}" for i in range(sheets[0][3].shape[1]))], rows)
    caption = (
        f"The first {TILES**2} samples of every model on {task}, seed 0, unselected, beside images of the test split."
    )
    return Drawing(f"samples-{slug(task)}", f"Samples: {task}", caption, figure, text)


def _mosaic(images: Array, levels: float) -> Array:
    """Images (n, D) as one sheet with pale lines between them."""
    side = math.isqrt(images.shape[1])
    sheet = np.full((TILES * (side + 1) - 1,) * 2, 0.12 * (levels - 1))
    for i, image in enumerate(images[:, : side * side]):
        r, c = divmod(i, TILES)
        sheet[r * (side + 1) : r * (side + 1) + side, c * (side + 1) : c * (side + 1) + side] = image.reshape(
            side, side
        )
    return sheet


# -- numbers over seeds


@dataclass(frozen=True)
class Look:
    """How one model is drawn in every figure of numbers."""

    colour: str
    marker: str


def looks(results: Results) -> dict[str, Look]:
    """A look for each model: the family's colour in a shade of its own, and a marker of its own."""
    out = {}
    models = results.models()
    for family in {results.family[m] for m in models}:
        members = [m for m in models if results.family[m] == family]
        for i, m in enumerate(members):
            out[m] = Look(shade(family, i, len(members)), MARKERS[i % len(MARKERS)])
    return out


def _number_rows(results: Results, wanted: Iterable[tuple[str, str, str]]) -> Iterator[list[object]]:
    for task, model, metric in wanted:
        n = results.number(task, model, metric)
        if n is not None:
            numbers = (f"{v:.8g}" if math.isfinite(v) else "" for v in (n.mean, n.low, n.high))
            yield [task, model, results.family[model], metric, n.kind, n.unit, *numbers, len(n.seeds)]


NUMBER_HEAD = ("task", "model", "family", "metric", "kind", "unit", "mean", "ci_low", "ci_high", "n_seeds")


def _error(n: Number) -> list[list[float]] | None:
    """Interval as matplotlib wants it: distances from the mean."""
    return [[n.mean - n.low], [n.high - n.mean]] if math.isfinite(n.low) and math.isfinite(n.high) else None


def model_legend(figure: Figure, results: Results, models: Sequence[str], x: float, lines: bool = True) -> None:
    """Models under the names of their families, down the right side."""
    style, handles = looks(results), []
    for family in sorted({results.family[m] for m in models}, key=family_key):
        handles.append(Line2D([], [], linestyle="", label=rf"$\bf{{{_bold(FAMILY_LABELS.get(family, family))}}}$"))
        for m in models:
            if results.family[m] == family:
                look = style[m]
                width = 1.2 if lines else 0
                name = plain(m if len(m) <= 22 else m[:21] + "…")
                handles.append(
                    Line2D([], [], color=look.colour, marker=look.marker, markersize=5, linewidth=width, label=name)
                )
    anchor = (x, 1 - 0.12 / figure.get_size_inches()[1])
    figure.legend(handles=handles, loc="upper left", bbox_to_anchor=anchor, handlelength=1.8, labelspacing=0.28)


def _bold(text: str) -> str:
    """A family's label inside mathematics, where spaces and hyphens need a word of their own."""
    safe = "".join(c for c in text if c.isalnum() or c in " -/()")
    return safe.replace(" ", r"\ ").replace("-", r"\mathrm{-}")


def _kl_axis(ax: Axes, which: str, values: Sequence[float]) -> None:
    """Linear below 0.01 nats, logarithmic above: KL estimates scatter about 0 at the bottom."""
    getattr(ax, f"set_{which}scale")("symlog", linthresh=0.01, linscale=0.6)
    axis = getattr(ax, f"{which}axis")
    top = max([v for v in values if math.isfinite(v)], default=1.0)
    low = min([v for v in values if math.isfinite(v)], default=0.0)
    ticks = [0.0, *(10.0**k for k in range(-2, 7) if 10.0**k <= max(top * 1.5, 0.011))]
    axis.set_major_locator(FixedLocator([-0.01, *ticks] if low < -0.005 else ticks))
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axis.set_minor_locator(NullLocator())
    getattr(ax, f"set_{which}lim")(min(-0.002, low * 1.3), max(0.02, top * 1.8))


def _log_axis(ax: Axes, which: str, values: Sequence[float]) -> None:
    """Logarithmic about the means, with 2 and 5 labelled where less than two decades are shown."""
    getattr(ax, f"set_{which}scale")("log")
    axis = getattr(ax, f"{which}axis")
    low, high = (min(values) / 1.6, max(values) * 1.6) if values else (0.1, 10.0)
    getattr(ax, f"set_{which}lim")(low, high)
    axis.set_major_locator(LogLocator(10, subs=(1.0, 2.0, 5.0) if high / low < 150 else (1.0,), numticks=7))
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axis.set_minor_formatter(NullFormatter())
    axis.set_minor_locator(NullLocator())


def _tidy(ax: Axes) -> None:
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)


def dimension_figure(results: Results) -> Drawing | None:
    """Error and cost against the dimension of mixture-D."""
    tasks = sorted((t for t in results.tasks if task_dimension(t)), key=lambda t: task_dimension(t) or 0)
    models = [m for m in results.models(*tasks) if m != "truth"] if tasks else []
    if len(tasks) < 2 or not models:
        return None
    metrics = ("kl", "train_seconds", "sample_ms")
    width, height = 11.2, max(3.4, 0.8 + 0.19 * (len(models) + 6))
    figure, style = new_figure(width, height), looks(results)
    for i, metric in enumerate(metrics):
        ax = figure.add_axes((0.055 + i * 0.262, 0.55 / height, 0.205, 1 - 0.9 / height))
        values: list[float] = []
        for m in models:
            points = [(task_dimension(t) or 0, n) for t in tasks if (n := results.number(t, m, metric)) is not None]
            if metric != "kl":
                points = [(d, n) for d, n in points if n.mean > 0]
            values += [n.mean for _, n in points]
            _line(ax, points, style[m])
        _dimension_axis(ax, [task_dimension(t) or 0 for t in tasks])
        info = metric_info(metric)
        ax.set_title({"kl": info.label, "train_seconds": "Training", "sample_ms": "One sample"}[metric], loc="left")
        ax.set_ylabel(info.unit)
        if metric == "kl":
            _kl_axis(ax, "y", values)
        else:
            _log_axis(ax, "y", values)
        _tidy(ax)
    model_legend(figure, results, models, 0.83)
    text = csv_text(NUMBER_HEAD, _number_rows(results, [(t, m, k) for k in metrics for m in models for t in tasks]))
    caption = (
        "Error and cost on mixture-D as D grows: means over seeds with 95 % t-intervals. KL is linear below 0.01 nats."
    )
    return Drawing("dimension", "Error against dimension", caption, figure, text)


def _line(ax: Axes, points: Sequence[tuple[int, Number]], look: Look) -> None:
    ax.plot(
        [d for d, _ in points],
        [n.mean for _, n in points],
        color=look.colour,
        marker=look.marker,
        markersize=4,
        linewidth=1.1,
    )
    for d, n in points:
        ax.errorbar([d], [n.mean], yerr=_error(n), color=look.colour, elinewidth=0.9, capsize=2)


def _dimension_axis(ax: Axes, dimensions: Sequence[int]) -> None:
    ax.set_xscale("log", base=2)
    ax.set_xticks(dimensions, [str(d) for d in dimensions])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xlabel("dimension D")


def cost_figure(results: Results, tasks: Sequence[str], metric: str, name: str, title: str) -> Drawing | None:
    """Quality against training time and against time a sample, one column of panels a task."""
    costs = ("train_seconds", "sample_ms")
    models = [m for m in results.models(*tasks) if m != "truth"] if tasks else []
    drawn = [m for m in models if any(results.number(t, m, metric) for t in tasks)]
    if not drawn:
        return None
    tasks = [t for t in tasks if any(results.number(t, m, metric) for m in drawn)]
    bands = math.ceil(len(tasks) / 5)
    columns = math.ceil(len(tasks) / bands)
    left, gap, legend = 0.7, 0.5, 1.9
    size = 2.5 if columns <= 3 else 1.85
    band_height = 2 * (size + 0.55) + 0.3
    width = left + columns * (size + gap) + legend
    height = max(bands * band_height, 0.4 + 0.175 * (len(drawn) + 6))
    figure = new_figure(width, height)
    style = looks(results)
    for i, task in enumerate(tasks):
        band, at = divmod(i, columns)
        for k, cost in enumerate(costs):
            bottom = height - band * band_height - 0.3 - size - k * (size + 0.55)
            x = left + at * (size + gap)
            ax = figure.add_axes((x / width, bottom / height, size / width, size / height))
            _cost_panel(ax, results, task, metric, cost, drawn, style)
            if k == 0:
                ax.set_title(plain(task), loc="left", weight="bold")
            if at == 0:
                info = metric_info(metric)
                ax.set_ylabel(f"{info.label} [{info.unit}]")
    model_legend(figure, results, drawn, (left + columns * (size + gap) - 0.4) / width, lines=False)
    text = csv_text(
        NUMBER_HEAD, _number_rows(results, [(t, m, k) for t in tasks for m in drawn for k in (metric, *costs)])
    )
    caption = (
        f"{metric_info(metric).label} against what it costs: training time, and time to draw one sample in a large "
        "batch. Lower left is better. Means over seeds with 95 % t-intervals; hollow marks are bounds or estimates, "
        "full ones exact."
    )
    return Drawing(name, title, caption, figure, text)


def _cost_panel(
    ax: Axes, results: Results, task: str, metric: str, cost: str, models: Sequence[str], style: dict[str, Look]
) -> None:
    values: list[float] = []
    spent: list[float] = []
    for m in models:
        y, x = results.number(task, m, metric), results.number(task, m, cost)
        if y is None or x is None or x.mean <= 0:
            continue
        values.append(y.mean)
        spent.append(x.mean)
        look = style[m]
        ax.errorbar(
            [x.mean],
            [y.mean],
            yerr=_error(y),
            color=look.colour,
            marker=look.marker,
            markersize=5.5,
            markerfacecolor=look.colour if y.kind == "exact" else "white",
            markeredgewidth=1.2,
            elinewidth=0.9,
            capsize=2,
        )
    _log_axis(ax, "x", spent)
    if metric == "kl":
        _kl_axis(ax, "y", values)
    else:
        ax.yaxis.set_major_locator(MaxNLocator(6))
        ax.margins(y=0.1)
    info = metric_info(cost)
    ax.set_xlabel(f"{'training' if cost == 'train_seconds' else 'one sample'} [{info.unit}]")
    _tidy(ax)


def comparison_figure(results: Results, tasks: Sequence[str], metric: str, name: str, title: str) -> Drawing | None:
    """Every model on one line with its interval and its seeds, by family, one column a task."""
    tasks = [t for t in tasks if any(results.number(t, m, metric) for m in results.models(t))]
    models = [m for m in results.models(*tasks) if m != "truth"] if tasks else []
    if not models:
        return None
    row, size = 0.215, 2.9 if len(tasks) <= 3 else 2.0
    rows = _family_rows(results, models)
    room = 1.62 if len(tasks) <= 3 else 0.15
    left, foot = 1.85, 0.78
    width, height = left + len(tasks) * (size + room), foot + 0.34 + row * rows[-1][1] + row
    figure = new_figure(width, height)
    style = looks(results)
    for i, task in enumerate(tasks):
        x = left + i * (size + room)
        box = (x / width, foot / height, size / width, 1 - (foot + 0.34) / height)
        ax = figure.add_axes(box)
        _comparison_panel(ax, results, task, metric, rows, style, write=len(tasks) <= 3)
        ax.set_title(plain(task), loc="left", weight="bold")
        info = metric_info(metric)
        ax.set_xlabel(f"{info.label} [{info.unit}]")
        if i == 0:
            ax.set_yticks([at for _, at in rows], [plain(m[:30]) for m, _ in rows])
            for label, (m, _) in zip(ax.get_yticklabels(), rows, strict=True):
                label.set_color(darker(results.family[m]))
        else:
            ax.set_yticks([at for _, at in rows], [""] * len(rows))
    family_legend(figure, [results.family[m] for m in models], y=0.0)
    text = csv_text(NUMBER_HEAD, _number_rows(results, [(t, m, metric) for t in tasks for m in models]))
    caption = (
        f"{metric_info(metric).label}, lower is better: mean over seeds with its 95 % t-interval, and each seed as a "
        "small dot. Hollow marks are bounds or estimates. = exact, <= upper bound, >= lower bound, ~ estimate."
    )
    return Drawing(name, title, caption, figure, text)


def _family_rows(results: Results, models: Sequence[str]) -> list[tuple[str, float]]:
    """(model, position) from the top down, with a gap between families."""
    rows: list[tuple[str, float]] = []
    at, family = 0.0, None
    for m in models:
        if family is not None and results.family[m] != family:
            at += 0.6
        at, family = at + 1.0, results.family[m]
        rows.append((m, at))
    return rows


def _comparison_panel(
    ax: Axes,
    results: Results,
    task: str,
    metric: str,
    rows: Sequence[tuple[str, float]],
    style: dict[str, Look],
    write: bool,
) -> None:
    values: list[float] = []
    for m, at in rows:
        n, cell = results.number(task, m, metric), results.cell(task, m, metric)
        if n is not None:
            values += [v for v in (n.mean, n.low, n.high) if math.isfinite(v)]
            seeds = [v for _, v, _ in n.seeds if math.isfinite(v)]
            face = colour(results.family[m])
            ax.plot(seeds, [at] * len(seeds), "o", color=face, markersize=2.4, alpha=0.45, zorder=2)
            ax.errorbar(
                [n.mean],
                [at],
                xerr=_error(n),
                color=face,
                marker="o",
                markersize=5,
                markerfacecolor=face if n.kind == "exact" else "white",
                markeredgewidth=1.2,
                elinewidth=1.3,
                capsize=2.5,
                zorder=3,
            )
        if write or n is None:
            text, place = (cell.text(), 1.02) if write else (cell.remark(), 0.02)
            ink = INK if n is not None else QUIET
            ax.text(place, at, plain(text), transform=ax.get_yaxis_transform(), fontsize=6.8, va="center", color=ink)
    if metric == "kl":
        _kl_axis(ax, "x", values)
        ax.tick_params(axis="x", labelsize=6.8)
    else:
        ax.xaxis.set_major_locator(MaxNLocator(6))
    ax.set_ylim(rows[-1][1] + 0.8, 0.2)
    ax.tick_params(axis="y", length=0)
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.grid(axis="y", color="#F0F2F5")


# -- training


def training_figure(results: Results, runs: Runs, task: str) -> Drawing | None:
    """Training and validation loss of every model that is trained by steps, one panel a model."""
    trained: dict[str, list[Run]] = {}
    for run in runs.done:
        if run.task == task and run.history.get("train"):
            trained.setdefault(run.model, []).append(run)
    if not trained:
        return None
    models = [m for m in results.models(task) if m in trained]
    columns = min(5, len(models))
    count = math.ceil(len(models) / columns)
    size, tall, gap, high = 1.72, 1.05, 0.48, 0.56
    width, height = 0.25 + columns * (size + gap), count * (tall + high) + 0.42
    figure = new_figure(width, height)
    for i, m in enumerate(models):
        r, c = divmod(i, columns)
        x, y = 0.45 + c * (size + gap), height - (r + 1) * (tall + high) + 0.22
        ax = figure.add_axes((x / width, y / height, size / width, tall / height))
        _curves(ax, trained[m])
        ax.set_title(plain(m[:26]), loc="left", fontsize=8, weight="bold", color=darker(results.family[m]), pad=3)
        ax.set_xlabel("step" if i + columns >= len(models) else "", fontsize=7, labelpad=1)
        ax.set_ylabel("loss" if c == 0 else "", fontsize=7, labelpad=2)
    _curve_legend(figure)
    rows = _curve_rows([r for m in models for r in trained[m]])
    caption = (
        f"Losses on {task}, one thin line a seed. Objectives differ between models, so only the shape compares; the "
        "first steps may leave the panel. The dot is the step whose weights were kept."
    )
    text = csv_text(["model", "seed", "split", "step", "loss", "kept"], rows)
    if len(text.encode()) > MAX_CSV:
        text = csv_text(["model", "seed", "split", "step", "loss", "kept"], rows[:: 1 + len(text.encode()) // MAX_CSV])
    return Drawing(f"training-{slug(task)}", f"Training: {task}", caption, figure, text)


def _curve_rows(runs: Sequence[Run]) -> list[list[object]]:
    out: list[list[object]] = []
    for run in runs:
        kept = run.history.get("best_step")
        for split in ("train", "valid"):
            for step, loss in run.history.get(split) or []:
                out.append([run.model, run.seed, split, step, significant(float(loss), 6), int(step == kept)])
    return out


def _curves(ax: Axes, runs: Sequence[Run]) -> None:
    seen: list[float] = []
    for run in runs:
        train = np.asarray(run.history["train"], dtype=np.float64)
        face = colour(run.family)
        ax.plot(train[:, 0], train[:, 1], color=face, linewidth=0.8, alpha=0.75)
        seen += train[len(train) // 12 :, 1].tolist()
        valid = np.asarray(run.history.get("valid") or np.empty((0, 2)), dtype=np.float64)
        if len(valid):
            ax.plot(valid[:, 0], valid[:, 1], color=INK, linewidth=0.7, alpha=0.6, linestyle=(0, (3, 1.5)))
            seen += valid[len(valid) // 12 :, 1].tolist()
        curve = valid if len(valid) else train
        kept = curve[curve[:, 0] == run.history.get("best_step")]
        ax.plot(kept[:, 0], kept[:, 1], "o", color=INK, markersize=2.4, zorder=4)
    finite = [v for v in seen if math.isfinite(v)]
    if finite:
        low, high = min(finite), float(np.quantile(finite, 0.985))
        pad = 0.08 * (high - low) or 0.5
        ax.set_ylim(low - pad, high + pad)
    ax.xaxis.set_major_locator(MaxNLocator(3))
    ax.yaxis.set_major_locator(MaxNLocator(4))
    ax.tick_params(labelsize=6.3, length=0, pad=1.5)
    _tidy(ax)


def _curve_legend(figure: Figure) -> None:
    handles = [
        Line2D([], [], color=QUIET, linewidth=1.2, label="training loss"),
        Line2D([], [], color=INK, linewidth=0.9, linestyle=(0, (3, 1.5)), label="validation loss"),
        Line2D([], [], color=INK, marker="o", linestyle="", markersize=3.5, label="weights kept"),
    ]
    figure.legend(handles=handles, loc="lower center", ncol=3, bbox_to_anchor=(0.5, 0.0))


def all_figures(results: Results, runs: Runs) -> Iterator[Drawing]:
    """Every figure of the report, in its order, one at a time so that no more than one is in memory."""
    data, planar = data_tasks(results), planar_tasks(results)
    overview: list[Drawing | None] = [
        comparison_figure(results, data, "nll", "nll", "Likelihood of digits"),
        comparison_figure(results, planar, "kl", "kl", "KL on two-dimensional densities"),
        cost_figure(results, data, "nll", "cost-data", "Likelihood against cost"),
        cost_figure(results, planar, "kl", "cost-densities", "KL against cost"),
        dimension_figure(results),
    ]
    yield from (d for d in overview if d is not None)
    for task in data:
        yield from _some(samples_figure(results, task, pictures(runs, task)))
    for task in planar:
        pictured = pictures(runs, task)
        yield from _some(density_figure(results, task, pictured))
        yield from _some(score_figure(results, task, pictured))
        yield from _some(path_figure(results, task, pictured))
    for task in [*data, *density_tasks(results)]:
        yield from _some(training_figure(results, runs, task))


def _some(drawing: Drawing | None) -> list[Drawing]:
    return [] if drawing is None else [drawing]
