"""Figures of numbers over seeds: every model with its interval, against cost, against dimension, and its losses.

Each figure function returns the figure, or none where the records hold nothing to draw. `all_figures` adds the pictures
of `replicate.report.maps`.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D
from matplotlib.markers import CARETRIGHT, CARETUP
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from replicate.report import drawing
from replicate.report.drawing import Figure
from replicate.report.labels import FAMILY_LABELS, family_key, metric_info, significant, slug
from replicate.report.maps import Array, density_figure, path_figure, pictures, samples_figure, score_figure
from replicate.report.records import RecordedRun, RecordedRuns
from replicate.report.tables import Results, data_tasks, density_tasks, dimensions, planar
from replicate.report.text_table import Number, csv_text

#: the colour and marker of one model in every figure of numbers, as arguments of matplotlib
Look = dict[str, Any]


def looks(results: Results) -> dict[str, Look]:
    """Return a look for each model: the family's colour in a shade of its own, and a marker of its own."""
    out = {}
    models = results.models()
    for family in {results.family[m] for m in models}:
        members = [m for m in models if results.family[m] == family]
        for i, m in enumerate(members):
            marker = drawing.MARKERS[i % len(drawing.MARKERS)]
            out[m] = {"color": drawing.shade(family, i, len(members)), "marker": marker}
    return out


def _number_csv(results: Results, wanted: Iterable[tuple[str, str, str]]) -> str:
    """Write the numbers of (task, model, metric) with their intervals as CSV."""
    rows: list[list[object]] = []
    for task, model, metric in wanted:
        n = results.number(task, model, metric)
        if n is not None:
            numbers = (f"{v:.8g}" if math.isfinite(v) else "" for v in (n.mean, n.low, n.high))
            rows.append([task, model, results.family[model], metric, n.kind, n.unit, *numbers, len(n.seeds)])
    head = ("task", "model", "family", "metric", "kind", "unit", "mean", "ci_low", "ci_high", "n_seeds")
    return csv_text(head, *rows)


def _error(n: Number) -> list[list[float]] | None:
    """Return the interval in matplotlib's form, distances from the mean."""
    return [[n.mean - n.low], [n.high - n.mean]] if math.isfinite(n.low) and math.isfinite(n.high) else None


def _mark(ax: Axes, n: Number, edge: float, look: Look, at: dict[str, float], **sizes: Any) -> None:
    """Draw a number with its interval, across or up, as `at` has the other place: {"y": 3} or {"x": 3}.

    It is hollow where it is not exact, and a caret without an interval at the `edge` that it is beyond.
    """
    (where, place), off = next(iter(at.items())), n.mean > edge
    along, caret = ("x", CARETRIGHT) if where == "y" else ("y", CARETUP)
    look = look | ({"marker": caret} if off else {f"{along}err": _error(n)})
    face = look["color"] if n.kind == "exact" else "white"
    places: dict[str, Any] = {where: [place], along: [min(n.mean, edge)]}
    ax.errorbar(**places, **look, markerfacecolor=face, markeredgewidth=1.2, **sizes)


def model_legend(canvas: Canvas, results: Results, models: Sequence[str], x: float, lines: bool = True) -> None:
    """Draw models under the names of their families, down the right side."""
    style, handles = looks(results), []
    for family in sorted({results.family[m] for m in models}, key=family_key):
        handles.append(Line2D([], [], linestyle="", label=rf"$\bf{{{_bold(FAMILY_LABELS.get(family, family))}}}$"))
        for m in models:
            if results.family[m] == family:
                name = drawing.plain(m if len(m) <= 22 else m[:21] + "…")
                handles.append(Line2D([], [], markersize=5, linewidth=1.2 if lines else 0, label=name, **style[m]))
    anchor = (x, 1 - 0.12 / canvas.get_size_inches()[1])
    canvas.legend(handles=handles, loc="upper left", bbox_to_anchor=anchor, handlelength=1.8, labelspacing=0.28)


def _bold(text: str) -> str:
    """Write a family's label in mathematics, where spaces and hyphens need a command."""
    safe = "".join(c for c in text if c.isalnum() or c in " -/()")
    return safe.replace(" ", r"\ ").replace("-", r"\mathrm{-}")


def _kl_axis(ax: Axes, which: str, values: Sequence[float]) -> None:
    """Make an axis linear below 0.01 nats and logarithmic above: the lowest KL estimates scatter about 0."""
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
    """Make an axis logarithmic about the means, with 2 and 5 labelled where it spans less than two decades."""
    getattr(ax, f"set_{which}scale")("log")
    axis = getattr(ax, f"{which}axis")
    low, high = (min(values) / 1.6, max(values) * 1.6) if values else (0.1, 10.0)
    getattr(ax, f"set_{which}lim")(low, high)
    axis.set_major_locator(LogLocator(10, subs=(1.0, 2.0, 5.0) if high / low < 150 else (1.0,), numticks=7))
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axis.set_minor_formatter(NullFormatter())
    axis.set_minor_locator(NullLocator())


def _far(values: Sequence[float]) -> float:
    """Return the value from which on a linear axis a number is off the scale: it would squeeze all others."""
    finite = [v for v in values if math.isfinite(v)]
    if not finite or max(finite) <= 2.5 * float(np.median(finite)) or min(finite) <= 0:
        return math.inf
    near = [v for v in finite if v <= 2.5 * float(np.median(finite))]
    return max(near) + 0.08 * (max(near) - min(near))


def _edge(results: Results, task: str, metric: str, models: Iterable[str]) -> float:
    """Return the value from which a metric of a task is off the scale; KL has a scale that no number leaves."""
    numbers = (results.number(task, m, metric) for m in models)
    return math.inf if metric == "kl" else _far([n.mean for n in numbers if n is not None])


def _axis_title(metric: str) -> str:
    info = metric_info(metric)
    return f"{info.label} [{info.unit}]"


def dimension_figure(results: Results) -> Figure | None:
    """Draw error and cost against the dimension of mixture-D."""
    tasks = dimensions(density_tasks(results))
    models = [m for m in results.models(*tasks) if m != "truth"] if tasks else []
    if len(tasks) < 2 or not models:
        return None
    titles = {"kl": metric_info("kl").label, "train_seconds": "Training", "sample_ms": "One sample"}
    height = max(3.4, 0.8 + 0.19 * (len(models) + 6))
    canvas, style = drawing.new_canvas(11.2, height), looks(results)
    for i, (metric, title) in enumerate(titles.items()):
        ax = canvas.add_axes((0.055 + i * 0.262, 0.55 / height, 0.205, 1 - 0.9 / height))
        values: list[float] = []
        for m in models:
            found = ((d, results.number(t, m, metric)) for t, d in tasks.items())
            points = [(d, n) for d, n in found if n is not None and (metric == "kl" or n.mean > 0)]
            values += [n.mean for _, n in points]
            ax.plot([d for d, _ in points], [n.mean for _, n in points], markersize=4, linewidth=1.1, **style[m])
            for d, n in points:
                ax.errorbar([d], [n.mean], yerr=_error(n), color=style[m]["color"], elinewidth=0.9, capsize=2)
        ax.set_xscale("log", base=2)
        ax.set_xticks(list(tasks.values()), [str(d) for d in tasks.values()])
        ax.xaxis.set_minor_locator(NullLocator())
        ax.set_xlabel("dimension D")
        ax.set_title(title, loc="left")
        ax.set_ylabel(metric_info(metric).unit)
        (_kl_axis if metric == "kl" else _log_axis)(ax, "y", values)
        ax.spines[["top", "right"]].set_visible(False)
    model_legend(canvas, results, models, 0.83)
    text = _number_csv(results, [(t, m, k) for k in titles for m in models for t in tasks])
    caption = (
        "Error and cost on mixture-D as D grows: means over seeds with 95 % t-intervals. KL is linear below 0.01 nats."
    )
    return Figure("dimension", "Error against dimension", caption, canvas, text)


def cost_figure(results: Results, tasks: Sequence[str], metric: str, name: str, title: str) -> Figure | None:
    """Draw quality against training time and against time per sample, one column of panels per task."""
    costs = ("train_seconds", "sample_ms")
    models = [m for m in results.models(*tasks) if m != "truth"] if tasks else []
    models = [m for m in models if any(results.number(t, m, metric) for t in tasks)]
    if not models:
        return None
    tasks = [t for t in tasks if any(results.number(t, m, metric) for m in models)]
    bands = math.ceil(len(tasks) / 5)
    columns = math.ceil(len(tasks) / bands)
    left, gap, legend = 0.7, 0.5, 1.9
    size = 2.5 if columns <= 3 else 1.85
    band_height = 2 * (size + 0.55) + 0.3
    width = left + columns * (size + gap) + legend
    height = max(bands * band_height, 0.4 + 0.175 * (len(models) + 6))
    canvas, style = drawing.new_canvas(width, height), looks(results)
    for i, task in enumerate(tasks):
        band, at = divmod(i, columns)
        for k, cost in enumerate(costs):
            bottom = height - band * band_height - 0.3 - size - k * (size + 0.55)
            ax = drawing.add_axes(canvas, left + at * (size + gap), bottom, size, size)
            _cost_panel(ax, results, (task, metric, cost), {m: style[m] for m in models})
            if k == 0:
                ax.set_title(drawing.plain(task), loc="left", weight="bold")
            if at == 0:
                ax.set_ylabel(_axis_title(metric))
    model_legend(canvas, results, models, (left + columns * (size + gap) - 0.4) / width, lines=False)
    text = _number_csv(results, [(t, m, k) for t in tasks for m in models for k in (metric, *costs)])
    caption = (
        f"{metric_info(metric).label} against what it costs: training time, and time to draw one sample in a large "
        "batch. Lower left is better; a caret is off the scale. Means over seeds with 95 % t-intervals; hollow marks "
        "are bounds or estimates, full ones exact."
    )
    return Figure(name, title, caption, canvas, text)


def _cost_panel(ax: Axes, results: Results, of: tuple[str, str, str], style: dict[str, Look]) -> None:
    """Draw the metric against the cost on the task that `of` names, every model in its look."""
    task, metric, cost = of
    edge = _edge(results, task, metric, style)
    found = ((look, results.number(task, m, metric), results.number(task, m, cost)) for m, look in style.items())
    points = [(look, y, x.mean) for look, y, x in found if y and x and x.mean > 0]
    for look, y, spent in points:
        _mark(ax, y, edge, look, {"x": spent}, markersize=5.5, elinewidth=0.9, capsize=2)
    _log_axis(ax, "x", [spent for *_, spent in points])
    if metric == "kl":
        _kl_axis(ax, "y", [y.mean for _, y, _ in points])
    else:
        ax.yaxis.set_major_locator(MaxNLocator(6))
        ax.margins(y=0.1)
    ax.set_xlabel(_axis_title(cost))
    ax.spines[["top", "right"]].set_visible(False)


def comparison_figure(results: Results, tasks: Sequence[str], metric: str, name: str, title: str) -> Figure | None:
    """Draw every model on one line with its interval and its seeds, by family, one column per task."""
    tasks = [t for t in tasks if any(results.number(t, m, metric) for m in results.models(t))]
    models = [m for m in results.models(*tasks) if m != "truth"] if tasks else []
    if not models:
        return None
    write = len(tasks) <= 3
    row, size, room = 0.215, 2.9 if write else 2.0, 1.62 if write else 0.15
    rows = _family_rows(results, models)
    left, foot = 1.85, 0.78
    width, height = max(7.2, left + len(tasks) * (size + room)), foot + 0.34 + row * rows[-1][1] + row
    canvas = drawing.new_canvas(width, height)
    for i, task in enumerate(tasks):
        across = (left + i * (size + room)) / width
        ax = canvas.add_axes((across, foot / height, size / width, 1 - (foot + 0.34) / height))
        _comparison_panel(ax, results, (task, metric), rows, write)
        ax.set_title(drawing.plain(task), loc="left", weight="bold")
        ax.set_xlabel(_axis_title(metric))
        ax.set_yticks([at for _, at in rows], [drawing.plain(m[:30]) if i == 0 else "" for m, _ in rows])
        for label, (m, _) in zip(ax.get_yticklabels() if i == 0 else [], rows, strict=False):
            label.set_color(drawing.darker(results.family[m]))
    drawing.family_legend(canvas, [results.family[m] for m in models])
    text = _number_csv(results, [(t, m, metric) for t in tasks for m in models])
    caption = (
        f"{metric_info(metric).label}, lower is better: mean over seeds with its 95 % t-interval, and each seed as a "
        "small dot. Hollow marks are bounds or estimates, carets are off the scale. = exact, "
        "<= upper bound, >= lower bound, ~ estimate."
    )
    return Figure(name, title, caption, canvas, text)


def _family_rows(results: Results, models: Sequence[str]) -> list[tuple[str, float]]:
    """Return (model, position) from the top down, with a gap between families."""
    rows: list[tuple[str, float]] = []
    at, family = 0.0, None
    for m in models:
        if family is not None and results.family[m] != family:
            at += 0.6
        at, family = at + 1.0, results.family[m]
        rows.append((m, at))
    return rows


def _comparison_panel(
    ax: Axes, results: Results, of: tuple[str, str], rows: Sequence[tuple[str, float]], write: bool
) -> None:
    """Draw the metric on the task that `of` names, every model on its row, with its numbers where `write`."""
    task, metric = of
    values: list[float] = []
    edge = _edge(results, task, metric, [m for m, _ in rows])
    for m, at in rows:
        n, cell = results.number(task, m, metric), results.cell(task, m, metric)
        if n is not None:
            values += [v for v in (n.mean, n.low, n.high) if math.isfinite(v)]
            seeds = [v for _, v, _ in n.seeds if math.isfinite(v)]
            look: Look = {"color": drawing.colour(results.family[m]), "marker": "o"}
            if n.mean <= edge:
                ax.plot(seeds, [at] * len(seeds), linestyle="", markersize=2.4, alpha=0.45, zorder=2, **look)
            _mark(ax, n, edge, look, {"y": at}, markersize=5, elinewidth=1.3, capsize=2.5, zorder=3)
        if write or n is None:
            text, place = (cell.text(), 1.02) if write else (cell.remark(), 0.02)
            ink = drawing.INK if n is not None else drawing.QUIET
            ax.text(
                place, at, drawing.plain(text), transform=ax.get_yaxis_transform(), fontsize=6.8, va="center", color=ink
            )
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


def training_figure(results: Results, runs: RecordedRuns, task: str) -> Figure | None:
    """Draw training and validation loss of every model that is trained by steps, one panel per model."""
    trained: dict[str, list[RecordedRun]] = {}
    for run in runs.done:
        if run.task == task and run.history.get("train"):
            trained.setdefault(run.model, []).append(run)
    if not trained:
        return None
    models = [m for m in results.models(task) if m in trained]
    columns = min(5, len(models))
    size, tall, gap, high = 1.7, 1.05, 0.52, 0.56
    height = math.ceil(len(models) / columns) * (tall + high) + 0.42
    canvas = drawing.new_canvas(0.25 + columns * (size + gap), height)
    for i, m in enumerate(models):
        r, c = divmod(i, columns)
        ax = drawing.add_axes(canvas, 0.45 + c * (size + gap), height - (r + 1) * (tall + high) + 0.22, size, tall)
        _curves(ax, trained[m])
        ax.set_title(
            drawing.plain(m[:26]), loc="left", fontsize=8, weight="bold", color=drawing.darker(results.family[m]), pad=3
        )
        ax.set_xlabel("step" if i + columns >= len(models) else "", fontsize=7, labelpad=1)
        ax.set_ylabel("loss" if c == 0 else "", fontsize=7, labelpad=2)
    handles = [
        Line2D([], [], color=drawing.QUIET, linewidth=1.2, label="training loss"),
        Line2D([], [], color=drawing.INK, linewidth=0.9, linestyle=(0, (3, 1.5)), label="validation loss"),
        Line2D([], [], color=drawing.INK, marker="o", linestyle="", markersize=3.5, label="weights kept"),
    ]
    canvas.legend(handles=handles, loc="lower center", ncol=3, bbox_to_anchor=(0.5, 0.0))
    caption = (
        f"Losses on {task}, one thin line a seed. Objectives differ between models, so only the shape compares. Where "
        "validation measures another quantity it is drawn on a scale of its own, without ticks. The first steps may "
        "leave the panel. The dot is the step whose weights were kept."
    )
    text = _curve_csv([r for m in models for r in trained[m]])
    return Figure(f"training-{slug(task)}", f"Training: {task}", caption, canvas, text)


def _curve_csv(runs: Sequence[RecordedRun]) -> str:
    """Write the losses of runs as CSV, without most steps where all would be too large a file."""
    rows: list[tuple[object, ...]] = []
    for run, split in product(runs, ("train", "valid")):
        head, kept = (run.model, run.seed, split), run.history.get("best_step")
        curve = run.history.get(split) or []
        rows += [(*head, step, significant(float(loss), 6), int(step == kept)) for step, loss in curve]
    names = ("model", "seed", "split", "step", "loss", "kept")
    text = csv_text(names, *rows)
    size = len(text.encode())
    return csv_text(names, *rows[:: 1 + size // drawing.MAX_CSV]) if size > drawing.MAX_CSV else text


def _curves(ax: Axes, runs: Sequence[RecordedRun]) -> None:
    """Draw the losses of one model's runs; validation has its own scale where it is far from all training losses."""
    train = [np.asarray(r.history["train"], dtype=np.float64) for r in runs]
    valid = [np.asarray(r.history.get("valid") or np.empty((0, 2)), dtype=np.float64) for r in runs]
    spans = _span(train), _span(valid)
    apart = max(spans[0][0] - spans[1][1], spans[1][0] - spans[0][1])  # nan where there is no validation
    other = ax.twinx() if apart > 3 * max(spans[0][1] - spans[0][0], spans[1][1] - spans[1][0]) else ax
    for run, a, b in zip(runs, train, valid, strict=True):
        ax.plot(a[:, 0], a[:, 1], color=drawing.colour(run.family), linewidth=0.8, alpha=0.75)
        other.plot(b[:, 0], b[:, 1], color=drawing.INK, linewidth=0.7, alpha=0.6, linestyle=(0, (3, 1.5)))
        curve = b if len(b) else a
        kept = curve[curve[:, 0] == run.history.get("best_step")]
        (other if len(b) else ax).plot(kept[:, 0], kept[:, 1], "o", color=drawing.INK, markersize=2.4, zorder=4)
    _loss_axis(ax, spans[0] if other is not ax else _span([*train, *valid]))
    if other is not ax:
        _loss_axis(other, spans[1])
        other.set_yticks([])
        other.spines[:].set_visible(False)
    ax.spines[["top", "right"]].set_visible(False)


def _span(curves: Sequence[Array]) -> tuple[float, float]:
    """Return the range of the losses after the first steps, without the highest spikes; (nan, nan) of nothing."""
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


def all_figures(results: Results, runs: RecordedRuns) -> list[Figure]:
    """Draw every figure of the comparison, in the report's order."""
    data, known = data_tasks(results), density_tasks(results)
    flat = planar(known)
    found: list[Figure | None] = [
        comparison_figure(results, data, "nll", "nll", "Likelihood of data"),
        comparison_figure(results, flat, "kl", "kl", "KL on two-dimensional densities"),
        cost_figure(results, data, "nll", "cost-data", "Likelihood against cost"),
        cost_figure(results, flat, "kl", "cost-densities", "KL against cost"),
        dimension_figure(results),
    ]
    for task in [*data, *flat]:
        shown = [r for r in runs.done if r.task == task]
        if any(r.folder is None for r in shown):
            continue  # the results folder that records it keeps no arrays
        pictured, ids = pictures(runs, task), tuple(sorted(r.run_id for r in shown))
        for make in (samples_figure,) if task in data else (density_figure, score_figure, path_figure):
            figure = make(results, task, pictured)
            found.append(figure and replace(figure, runs=ids))
    found += [training_figure(results, runs, task) for task in [*data, *known]]
    return [figure for figure in found if figure is not None]
