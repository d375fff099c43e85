"""Figures of numbers over seeds: every model with its interval, against cost, against dimension, and its losses.

Each figure function returns a `Drawing` (or None where the records hold nothing to draw): the figure, and the CSV
text of what is in it. `all_figures` adds the pictures of `replicate.report.maps`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.markers import CARETRIGHT, CARETUP
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from replicate.report.drawing import (
    INK,
    MARKERS,
    MAX_CSV,
    QUIET,
    Drawing,
    colour,
    csv_text,
    darker,
    family_legend,
    new_figure,
    plain,
    shade,
)
from replicate.report.labels import FAMILY_LABELS, family_key, metric_info, significant, slug
from replicate.report.maps import Array, density_figure, path_figure, pictures, samples_figure, score_figure
from replicate.report.records import Run, Runs
from replicate.report.tables import Number, Results, data_tasks, density_tasks, planar_tasks, task_dimension


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


def _far(values: Sequence[float]) -> float:
    """From where a value on a linear axis counts as off the scale: it would squeeze all others into a corner."""
    finite = [v for v in values if math.isfinite(v)]
    if not finite or max(finite) <= 2.5 * float(np.median(finite)) or min(finite) <= 0:
        return math.inf
    near = [v for v in finite if v <= 2.5 * float(np.median(finite))]
    return max(near) + 0.08 * (max(near) - min(near))


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
        "batch. Lower left is better; a caret is off the scale. Means over seeds with 95 % t-intervals; hollow marks "
        "are bounds or estimates, full ones exact."
    )
    return Drawing(name, title, caption, figure, text)


def _cost_panel(
    ax: Axes, results: Results, task: str, metric: str, cost: str, models: Sequence[str], style: dict[str, Look]
) -> None:
    values: list[float] = []
    spent: list[float] = []
    far = _far([n.mean for m in models if (n := results.number(task, m, metric)) is not None])
    for m in models:
        y, x = results.number(task, m, metric), results.number(task, m, cost)
        if y is None or x is None or x.mean <= 0:
            continue
        values.append(y.mean)
        spent.append(x.mean)
        look, off = style[m], metric != "kl" and y.mean > far
        ax.errorbar(
            [x.mean],
            [far if off else y.mean],
            yerr=None if off else _error(y),
            color=look.colour,
            marker=CARETUP if off else look.marker,
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
    width, height = max(7.2, left + len(tasks) * (size + room)), foot + 0.34 + row * rows[-1][1] + row
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
        "small dot. Hollow marks are bounds or estimates, carets are off the scale. = exact, "
        "<= upper bound, >= lower bound, ~ estimate."
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
    far = _far([n.mean for m, _ in rows if (n := results.number(task, m, metric)) is not None])
    for m, at in rows:
        n, cell = results.number(task, m, metric), results.cell(task, m, metric)
        if n is not None:
            values += [v for v in (n.mean, n.low, n.high) if math.isfinite(v)]
            seeds = [v for _, v, _ in n.seeds if math.isfinite(v)]
            face, off = colour(results.family[m]), metric != "kl" and n.mean > far
            if not off:
                ax.plot(seeds, [at] * len(seeds), "o", color=face, markersize=2.4, alpha=0.45, zorder=2)
            ax.errorbar(
                [far if off else n.mean],
                [at],
                xerr=None if off else _error(n),
                color=face,
                marker=CARETRIGHT if off else "o",
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
    size, tall, gap, high = 1.7, 1.05, 0.52, 0.56
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
        f"Losses on {task}, one thin line a seed. Objectives differ between models, so only the shape compares. Where "
        "validation measures another quantity it is drawn on a scale of its own, without ticks. The first steps may "
        "leave the panel. The dot is the step whose weights were kept."
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
    """Losses of one model's runs; validation is on a scale of its own where it is far from all training losses."""
    train = [np.asarray(r.history["train"], dtype=np.float64) for r in runs]
    valid = [np.asarray(r.history.get("valid") or np.empty((0, 2)), dtype=np.float64) for r in runs]
    spans = _span(train), _span(valid)
    apart = max(spans[0][0] - spans[1][1], spans[1][0] - spans[0][1])  # nan where there is no validation
    other = ax.twinx() if apart > 3 * max(spans[0][1] - spans[0][0], spans[1][1] - spans[1][0]) else ax
    for run, a, b in zip(runs, train, valid, strict=True):
        ax.plot(a[:, 0], a[:, 1], color=colour(run.family), linewidth=0.8, alpha=0.75)
        other.plot(b[:, 0], b[:, 1], color=INK, linewidth=0.7, alpha=0.6, linestyle=(0, (3, 1.5)))
        curve = b if len(b) else a
        kept = curve[curve[:, 0] == run.history.get("best_step")]
        (other if len(b) else ax).plot(kept[:, 0], kept[:, 1], "o", color=INK, markersize=2.4, zorder=4)
    _loss_axis(ax, spans[0] if other is not ax else _span([*train, *valid]))
    if other is not ax:
        _loss_axis(other, spans[1])
        other.set_yticks([])
        other.spines[:].set_visible(False)
    _tidy(ax)


def _span(curves: Sequence[Array]) -> tuple[float, float]:
    """Range of the losses after the first steps, without the highest spikes; (nan, nan) of nothing."""
    late = [v for c in curves for v in c[len(c) // 12 :, 1].tolist() if math.isfinite(v)]
    return (min(late), float(np.quantile(late, 0.985))) if late else (math.nan, math.nan)


def _loss_axis(ax: Axes, span: tuple[float, float]) -> None:
    low, high = span
    if math.isfinite(low):
        pad = 0.08 * (high - low) or 0.5
        ax.set_ylim(low - pad, high + pad)
    ax.xaxis.set_major_locator(MaxNLocator(3))
    ax.yaxis.set_major_locator(MaxNLocator(4))
    ax.ticklabel_format(axis="y", useOffset=False)
    ax.tick_params(labelsize=6.3, length=0, pad=1.5)


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
        comparison_figure(results, data, "nll", "nll", "Likelihood of data"),
        comparison_figure(results, planar, "kl", "kl", "KL on two-dimensional densities"),
        cost_figure(results, data, "nll", "cost-data", "Likelihood against cost"),
        cost_figure(results, planar, "kl", "cost-densities", "KL against cost"),
        dimension_figure(results),
    ]
    yield from (d for d in overview if d is not None)
    for task in [*data, *planar]:
        shown = [r for r in runs.done if r.task == task]
        if any(r.folder is None for r in shown):
            continue  # its arrays are not at hand
        pictured, ids = pictures(runs, task), tuple(sorted(r.run_id for r in shown))
        for make in (samples_figure,) if task in data else (density_figure, score_figure, path_figure):
            yield from (replace(d, runs=ids) for d in _some(make(results, task, pictured)))
    for task in [*data, *density_tasks(results)]:
        yield from _some(training_figure(results, runs, task))


def _some(drawing: Drawing | None) -> list[Drawing]:
    return [] if drawing is None else [drawing]
