"""The tables of the comparison: from measurements to `TextTable`s of models by task and metric."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import pandas as pd

from replicate.model import DataInfo
from replicate.report import labels
from replicate.report.records import FAILED, grouped
from replicate.report.text_table import Cell, Column, Number, Row, TextTable
from replicate.tasks.loading import tasks


class Results:
    """Measurements indexed for tables and figures."""

    def __init__(self, frame: pd.DataFrame) -> None:
        self._numbers: dict[tuple[str, str, str], tuple[Number, ...]] = {}
        for (task, _, model, metric, kind, unit), seeds in grouped(frame).items():
            key = (task, model, metric)
            self._numbers[key] = (*self._numbers.get(key, ()), Number.of(kind, unit, seeds))
        na = frame[frame["status"].str.startswith("n/a")]
        self._reasons: dict[tuple[str, str, str], str] = {
            (t, m, k): s.removeprefix("n/a").lstrip(": ") or "no reason given"
            for t, m, k, s in zip(na["task"], na["model"], na["metric"], na["status"], strict=True)
        }
        runs = frame[["task", "model", "run_id"]].drop_duplicates()
        lost = frame[frame["metric"] == FAILED]
        self._lost = Counter(zip(lost["task"], lost["model"], strict=True))
        self._tried = Counter(zip(runs["task"], runs["model"], strict=True))
        self.family: dict[str, str] = dict(zip(frame["model"], frame["family"], strict=True))
        self.tasks: list[str] = sorted(set(frame["task"]), key=labels.task_key)

    def models(self, *tasks: str) -> list[str]:
        """Return the models tried on any of the tasks (all tasks where none is named), by family and name."""
        names = {model for task, model in self._tried if not tasks or task in tasks}
        return sorted(names, key=lambda m: (labels.family_key(self.family[m]), m != "truth", m))

    def metrics(self, *tasks: str) -> list[str]:
        """Return the metrics of any model on any of the tasks, measured or not, in the report's order."""
        names = {m for t, _, m in [*self._numbers, *self._reasons] if not tasks or t in tasks}
        return sorted(names, key=labels.metric_key)

    def cell(self, task: str, model: str, metric: str) -> Cell:
        """Return the cell of one metric of one model on one task."""
        key, pair = (task, model, metric), (task, model)
        numbers = self._numbers.get(key, ())
        reason = "" if numbers else self._reasons.get(key, "")
        return Cell(metric, numbers, reason, self._lost[pair], self._tried[pair])

    def number(self, task: str, model: str, metric: str) -> Number | None:
        """Return the number to draw: the only one, or of several the one that cannot flatter; None without any."""
        finite = [n for n in self._numbers.get((task, model, metric), ()) if math.isfinite(n.mean)]
        return min(finite, key=lambda n: (flatters(metric, n.kind), n.kind)) if finite else None


def flatters(metric: str, kind: str) -> bool:
    """Return whether a number of this kind may look better than the truth, so that it must not be called the best."""
    info = labels.metric_info(metric)
    if info.likelihood and kind == "estimate":
        return True
    return kind == {"lower": "lower_bound", "higher": "upper_bound"}.get(info.better or "", "")


def info_of(task: str) -> DataInfo | None:
    """Return the shape of a task's data; None where this machine has no such task, or the task does not declare it."""
    entry = tasks().get(task)
    return entry.info if entry else None


def density_tasks(results: Results) -> list[str]:
    """Return the tasks with a known truth: those on which KL is a metric."""
    return [t for t in results.tasks if "kl" in results.metrics(t)]


def data_tasks(results: Results) -> list[str]:
    """Return the tasks that are data: those on which bits per dimension are a metric."""
    return [t for t in results.tasks if "bits_per_dim" in results.metrics(t)]


def planar(names: Iterable[str]) -> list[str]:
    """Return the tasks in two dimensions."""
    return [t for t in names if (info := info_of(t)) and info.dim == 2]


def dimensions(names: Iterable[str]) -> dict[str, int]:
    """Return the dimension D of each task of a series, in the order of D."""
    series = {t: info.dim for t in names if (info := info_of(t)) and tasks()[t].series}
    return dict(sorted(series.items(), key=lambda item: item[1]))


def column(metric: str, results: Results, tasks: Iterable[str]) -> Column:
    """Return a metric's column; its unit is the measured one where all tasks agree."""
    info = labels.metric_info(metric)
    measured = {n.unit for t in tasks for m in results.models(t) for n in results.cell(t, m, metric).numbers}
    unit = info.unit or (measured.pop() if len(measured) == 1 else "")
    return Column(metric, info.label, "" if unit in info.label else unit, measured=True)


def _rank(cell: str | Cell, family: str) -> float:
    """Return a number that is smaller for a better cell; infinity where the cell cannot be the best."""
    if isinstance(cell, str) or family == "reference" or len(cell.numbers) != 1:
        return math.inf
    number, better = cell.numbers[0], labels.metric_info(cell.metric).better
    if better is None or not math.isfinite(number.mean) or flatters(cell.metric, number.kind):
        return math.inf
    return number.mean if better == "lower" else -number.mean


def mark_best(rows: Sequence[Row]) -> tuple[Row, ...]:
    """Mark the best cell of each column among models that are no reference, by numbers that cannot flatter."""
    ranks = list(zip(*([_rank(cell, row.family) for cell in row.cells] for row in rows), strict=True))
    best = {c: ranks.index(min(ranks)) for c, ranks in enumerate(ranks) if sum(map(math.isfinite, ranks)) > 1}

    def marked(r: int, row: Row) -> Iterator[str | Cell]:
        for c, cell in enumerate(row.cells):
            yield replace(cell, best=True) if isinstance(cell, Cell) and best.get(c) == r else cell

    return tuple(replace(row, cells=tuple(marked(r, row))) for r, row in enumerate(rows))


FAMILY, MODEL, TASK, SAMPLER = (Column(name, name) for name in ("family", "model", "task", "sampler"))
#: (task, metric, column) of a table with one row per model
MetricColumn = tuple[str, str, Column]


def _models_table(
    results: Results, name: str, title: str, caption: str, columns: Sequence[MetricColumn], *tasks: str
) -> TextTable:
    """Make a table with one row per model of the columns' tasks, or of `tasks`, with the best of each column marked."""
    rows = []
    for model in results.models(*(tasks or [task for task, *_ in columns])):
        family = results.family[model]
        cells = (results.cell(task, model, metric) for task, metric, _ in columns)
        rows.append(Row((labels.FAMILY_LABELS.get(family, family), model, *cells), family))
    heads = (FAMILY, MODEL, *(c for *_, c in columns))
    return TextTable(name, title, caption, heads, mark_best(rows), grouped=True)


def task_table(results: Results, task: str) -> TextTable:
    """Make the table of a task: its models by the metrics of quality that one has, and why the others are missing."""
    models = results.models(task)
    metrics: list[str] = []
    without: dict[str, list[str]] = {}  # labels by reasons
    for m in (m for m in results.metrics(task) if m in labels.METRICS and not labels.METRICS[m].cost):
        cells = [results.cell(task, model, m) for model in models]
        if any(c.numbers or not c.reason for c in cells):
            metrics.append(m)
        else:
            reasons = "; ".join(dict.fromkeys(c.reason for c in cells))
            without.setdefault(reasons, []).append(labels.metric_info(m).label)
    columns = [(task, m, column(m, results, [task])) for m in metrics]
    caption = f"{task}: mean over seeds with its 95 % t-interval on the test split."
    caption += "".join(f" No {', '.join(heads)}: {reason}." for reason, heads in without.items())
    return _models_table(results, f"task-{labels.slug(task)}", task, caption, columns, task)


def model_tables(results: Results) -> list[TextTable]:
    """Make the tables with one row per model: its likelihood on data, its KL in two dimensions, both as D grows."""
    pairs = [(t, m, labels.metric_info(m)) for t in data_tasks(results) for m in ("nll", "bits_per_dim")]
    likelihood = [(t, m, Column(f"{t}:{m}", f"{t}: {i.label}", i.unit, measured=True)) for t, m, i in pairs]
    kl = [(t, "kl", Column(t, t, "nats", measured=True)) for t in planar(density_tasks(results))]
    dimension = [
        (t, m, Column(f"{t}:{m}", f"{label}, D = {d}", labels.metric_info(m).unit, measured=True))
        for m, label in (("kl", "KL"), ("train_seconds", "training"))
        for t, d in dimensions(density_tasks(results)).items()
    ]
    bound = "Negative log-likelihood of the test split; a bound (<=) may only overstate it."
    known = "KL(truth || model) in nats on densities in two dimensions; 0 is perfect."
    series = "Error and cost against the dimension D of a mixture whose truth is known."
    tables = (
        ("likelihood", "Likelihood of data", bound, likelihood),
        ("kl", "KL on two-dimensional densities", known, kl),
        ("dimension", "Error against dimension", series, dimension),
    )
    return [_models_table(results, name, title, about, columns) for name, title, about, columns in tables if columns]


def samplers_table(results: Results) -> list[TextTable]:
    """Make the table of each model under each sampler that drew from it."""
    pairs = {(t, m) for t, m, k in results._numbers if labels.sampler_of(k)}
    tasks = [t for t in results.tasks if t in {t for t, _ in pairs}]
    variants = [m for m in results.metrics(*tasks) if labels.sampler_of(m)] if tasks else []
    order = list(labels.SAMPLERS)
    names = sorted({labels.sampler_of(m) for m in variants}, key=lambda s: (order.index(s) if s in order else 99, s))
    metrics = list(dict.fromkeys(labels.base_metric(m) for m in variants))
    rows = []
    for task in tasks:
        for model in (m for m in results.models(task) if (task, m) in pairs):
            for name in ["", *names]:
                cells = tuple(results.cell(task, model, f"{m}:{name}" if name else m) for m in metrics)
                if any(c.numbers or c.reason for c in cells):
                    rows.append(Row((task, model, labels.SAMPLERS.get(name, name), *cells), results.family[model]))
    caption = "One model under several samplers; its own sampler first. The score is the model's throughout."
    columns = (TASK, MODEL, SAMPLER, *(column(m, results, tasks) for m in metrics))
    return [TextTable("samplers", "Samplers", caption, columns, tuple(rows), grouped=True)] if rows else []


def _long_table(results: Results, name: str, title: str, caption: str, metrics: Sequence[str]) -> list[TextTable]:
    """Make a table with one row per task and model and one column per metric."""
    rows = []
    for task in results.tasks:
        for model in results.models(task):
            cells = tuple(results.cell(task, model, m) for m in metrics)
            if any(c.numbers or c.lost for c in cells):
                rows.append(Row((task, model, *cells), results.family[model]))
    columns = (TASK, MODEL, *(column(m, results, results.tasks) for m in metrics))
    return [TextTable(name, title, caption, columns, tuple(rows), grouped=True)] if rows and metrics else []


def cost_tables(results: Results) -> list[TextTable]:
    """Make the tables with one row per task and model: its cost, and the estimators' checks of themselves."""
    costs = [m for m in results.metrics() if m in labels.METRICS and labels.METRICS[m].cost]
    checks = [m for m in results.metrics() if labels.base_metric(m) not in labels.METRICS and not labels.sampler_of(m)]
    paid, own = "What each model costs: one process, one thread or one device a run.", "Estimators' own checks"
    return [
        *_long_table(results, "cost", "Cost", paid, costs),
        *_long_table(results, "estimator-checks", own, "What the likelihood estimators report of themselves.", checks),
    ]


def all_tables(results: Results) -> list[TextTable]:
    """Make every table of the comparison, the overviews first."""
    overviews = [*model_tables(results), *samplers_table(results), *cost_tables(results)]
    return [*overviews, *(task_table(results, t) for t in results.tasks)]
