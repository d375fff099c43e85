"""Tables: from measurements to cells that show their kind, their interval and why a number is missing.

Every table is built once, as `Table`, and written in four ways: CSV (plain numbers), Markdown, LaTeX (booktabs)
and, by `replicate.report.page`, HTML.
"""

from __future__ import annotations

import csv
import io
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import pandas as pd

from replicate.report.labels import (
    COST_METRICS,
    FAMILY_LABELS,
    LIKELIHOODS,
    METRICS,
    SAMPLERS,
    base_metric,
    decimals_for,
    family_key,
    fixed,
    latex,
    latex_symbol,
    markdown,
    metric_info,
    metric_key,
    sampler_of,
    short,
    slug,
    symbol,
    task_key,
)
from replicate.report.records import (
    FAILED,
    Run,
    Runs,
    grouped,
    interval,
    load_runs,
    mean,
    measurements,
    summary,
)

__all__ = [
    "Cell",
    "Column",
    "Number",
    "Results",
    "Row",
    "Run",
    "Runs",
    "Table",
    "all_tables",
    "load_runs",
    "measurements",
    "summary",
    "task_dimension",
    "to_csv",
    "to_latex",
    "to_markdown",
]


@dataclass(frozen=True)
class Number:
    """A mean over seeds with its 95 % t-interval (nan below three seeds), and the values it averages."""

    kind: str
    unit: str
    mean: float
    low: float
    high: float
    seeds: tuple[tuple[int, float, str], ...]  # (seed, value, run id)

    @staticmethod
    def of(kind: str, unit: str, seeds: Iterable[tuple[int, float, str]]) -> Number:
        """From the values of one task, model, metric, kind and unit."""
        ordered = tuple(sorted(seeds, key=lambda s: (s[0], s[2])))
        values = [value for _, value, _ in ordered]
        return Number(kind, unit, mean(values), *interval(values), ordered)


@dataclass(frozen=True)
class Cell:
    """What a table shows of one metric of one model on one task.

    Attributes:
        metric: decides the number format.
        numbers: one for each kind that was measured; empty where there is none.
        reason: why there is none ("n/a"), without the prefix.
        lost, tried: failed runs, and all runs of this model on this task.
        best: whether it is the best of its column.
    """

    metric: str
    numbers: tuple[Number, ...] = ()
    reason: str = ""
    lost: int = 0
    tried: int = 0
    best: bool = False

    def parts(self) -> list[tuple[str, str]]:
        """(sign of the kind, number with its interval) of each number."""
        every = [v for n in self.numbers for v in (n.mean, n.low, n.high)]
        decimals = decimals_for(self.metric, every)
        out = []
        for n in self.numbers:
            text = fixed(n.mean, decimals)
            if math.isfinite(n.low) and math.isfinite(n.high):
                text += f" [{fixed(n.low, decimals)}, {fixed(n.high, decimals)}]"
            out.append((symbol(n.kind), text))
        return out

    def remark(self) -> str:
        """What stands in a cell beside or instead of a number."""
        if self.lost:
            return f"failed ({self.lost} of {self.tried})"
        if self.numbers:
            return ""
        return "n/a" if self.reason else "-"

    def text(self) -> str:
        """The whole cell in plain text."""
        parts = "; ".join(f"{sign} {number}" for sign, number in self.parts())
        return " ".join(p for p in (parts, self.remark()) if p)

    def tip(self) -> str:
        """Every seed's value with its run id, or the reason."""
        lines = [
            f"seed {seed}: {value:.6g} (run {short(run_id)})" for n in self.numbers for seed, value, run_id in n.seeds
        ]
        if self.lost:
            lines.append(f"{self.lost} of {self.tried} runs failed")
        if self.reason:
            lines.append(self.reason)
        return "\n".join(lines)


@dataclass(frozen=True)
class Column:
    """One column: `key` in CSV, `head` for readers, `unit` in full words."""

    key: str
    head: str
    unit: str = ""
    about: str = ""


@dataclass(frozen=True)
class Row:
    """One row: the group it stands in (a family or a task), its labels, and one cell a column."""

    group: str
    labels: tuple[str, ...]
    family: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Table:
    """A table before it is written.

    Attributes:
        name: file name without ending.
        title, caption: plain text.
        index: heads of the group and of each label.
        columns, rows: the body.
    """

    name: str
    title: str
    caption: str
    index: tuple[str, ...]
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]

    def reasons(self) -> list[str]:
        """The distinct reasons for "n/a", in the order in which they are met."""
        cells = (c for row in self.rows for c in row.cells)
        return list(dict.fromkeys(c.reason for c in cells if c.remark() == "n/a"))


class Results:
    """Measurements indexed for tables and figures."""

    def __init__(self, frame: pd.DataFrame) -> None:
        self.frame = frame
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
        pairs = zip(frame["model"], frame["family"], strict=True)
        self.family: dict[str, str] = dict(pairs)
        self.tasks: list[str] = sorted(set(frame["task"]), key=task_key)

    def models(self, *tasks: str) -> list[str]:
        """Models that were tried on any of the tasks (all tasks where none is named), by family and name."""
        tasks = tasks or tuple(self.tasks)
        names = {model for task, model in self._tried if task in tasks}
        return sorted(names, key=lambda m: (family_key(self.family[m]), m != "truth", m))

    def metrics(self, *tasks: str) -> list[str]:
        """Metrics asked of any model on any of the tasks, in the report's order."""
        names = {m for t, _, m in [*self._numbers, *self._reasons] if not tasks or t in tasks}
        return sorted(names, key=metric_key)

    def cell(self, task: str, model: str, metric: str) -> Cell:
        """The cell of one metric of one model on one task."""
        key = (task, model, metric)
        pair = (task, model)
        return Cell(
            metric,
            self._numbers.get(key, ()),
            self._reasons.get(key, "") if key not in self._numbers else "",
            self._lost[pair],
            self._tried[pair],
        )

    def number(self, task: str, model: str, metric: str) -> Number | None:
        """The number to draw: the only one, or of several the one that cannot flatter; None where there is none."""
        finite = [n for n in self._numbers.get((task, model, metric), ()) if math.isfinite(n.mean)]
        return min(finite, key=lambda n: (flatters(metric, n.kind), n.kind)) if finite else None

    def failures(self) -> pd.DataFrame:
        """Failed runs: task, model, family, seed, run_id, error."""
        rows = self.frame[self.frame["metric"] == FAILED]
        out = rows[["task", "model", "family", "seed", "run_id"]].copy()
        out["error"] = rows["status"].str.removeprefix("failed: ")
        return out.reset_index(drop=True)


def flatters(metric: str, kind: str) -> bool:
    """Whether a number of this kind may look better than the truth, so that it must not be called the best."""
    info = metric_info(metric)
    if base_metric(metric) in LIKELIHOODS and kind == "estimate":
        return True
    return kind == {"lower": "lower_bound", "higher": "upper_bound"}.get(info.better or "", "")


def task_dimension(task: str) -> int | None:
    """D of a task named mixture-D, None for every other."""
    head, _, tail = task.partition("-")
    return int(tail) if head == "mixture" and tail.isascii() and tail.isdigit() else None


def density_tasks(results: Results) -> list[str]:
    """Tasks whose truth is known: KL was asked of some model."""
    return [t for t in results.tasks if "kl" in results.metrics(t)]


def data_tasks(results: Results) -> list[str]:
    """Tasks that are data: bits a dimension was asked of some model."""
    return [t for t in results.tasks if "bits_per_dim" in results.metrics(t)]


def planar_tasks(results: Results) -> list[str]:
    """Densities in two dimensions."""
    return [t for t in density_tasks(results) if task_dimension(t) in (None, 2)]


def column(metric: str, results: Results, tasks: Iterable[str], head: str = "") -> Column:
    """A metric's column; the unit is the one measured, where all tasks agree."""
    info = metric_info(metric)
    measured = {n.unit for t in tasks for m in results.models(t) for n in results.cell(t, m, metric).numbers}
    unit = info.unit or (measured.pop() if len(measured) == 1 else "")
    head = head or info.label
    return Column(metric, head, "" if unit in head else unit)


def mark_best(rows: Sequence[Row], columns: int) -> tuple[Row, ...]:
    """Mark the best cell of each column among models that are no reference, by numbers that cannot flatter."""
    marked = [list(row.cells) for row in rows]
    for c in range(columns):
        candidates: list[tuple[float, int]] = []
        for r, row in enumerate(rows):
            cell = row.cells[c]
            better = metric_info(cell.metric).better
            if row.family == "reference" or better is None or len(cell.numbers) != 1:
                continue
            number = cell.numbers[0]
            if math.isfinite(number.mean) and not flatters(cell.metric, number.kind):
                candidates.append((number.mean if better == "lower" else -number.mean, r))
        if len(candidates) > 1:
            _, best = min(candidates)
            marked[best][c] = replace(marked[best][c], best=True)
    return tuple(replace(row, cells=tuple(cells)) for row, cells in zip(rows, marked, strict=True))


def _family_label(family: str) -> str:
    return FAMILY_LABELS.get(family, family)


def by_family(
    results: Results, models: Sequence[str], columns: int, cells: Callable[[str], tuple[Cell, ...]]
) -> tuple[Row, ...]:
    """One row a model, grouped by family, the best of each column marked."""
    rows = [Row(_family_label(results.family[m]), (m,), results.family[m], cells(m)) for m in models]
    return mark_best(rows, columns)


def quality_metrics(results: Results, task: str) -> list[str]:
    """The metrics of quality that a task's table shows: those the suite knows, under the model's own sampler."""
    return [m for m in results.metrics(task) if m in METRICS and m not in COST_METRICS]


def check_metrics(results: Results, task: str) -> list[str]:
    """What the estimators report of themselves: effective sample sizes, brackets of log Z, solver errors."""
    return [m for m in results.metrics(task) if base_metric(m) not in METRICS and not sampler_of(m)]


def task_table(results: Results, task: str) -> Table:
    """Every model of a task against every metric of quality that one of them has; why not the others is told."""
    asked, models = quality_metrics(results, task), results.models(task)
    cells = {m: {model: results.cell(task, model, m) for model in models} for m in asked}
    metrics = [m for m in asked if any(c.numbers or not c.reason for c in cells[m].values())]
    columns = tuple(column(m, results, [task]) for m in metrics)
    rows = by_family(results, models, len(columns), lambda model: tuple(cells[m][model] for m in metrics))
    caption = f"{task}: mean over seeds with its 95 % t-interval on the test split."
    without: dict[str, list[str]] = {}  # by their reasons
    for m in (m for m in asked if m not in metrics):
        reasons = "; ".join(dict.fromkeys(c.reason for c in cells[m].values()))
        without.setdefault(reasons, []).append(metric_info(m).label)
    for reason, labels in without.items():
        caption += f" No {', '.join(labels)}: {reason}."
    return Table(f"task-{slug(task)}", task, caption, ("family", "model"), columns, rows)


def kl_table(results: Results) -> Table | None:
    """KL(truth || model) of every model on every density in two dimensions."""
    tasks = planar_tasks(results)
    if not tasks:
        return None
    columns = tuple(Column(t, t, "nats") for t in tasks)
    rows = by_family(
        results, results.models(*tasks), len(columns), lambda m: tuple(results.cell(t, m, "kl") for t in tasks)
    )
    caption = "KL(truth || model) in nats on densities in two dimensions; 0 is perfect."
    return Table("kl", "KL on two-dimensional densities", caption, ("family", "model"), columns, rows)


def likelihood_table(results: Results) -> Table | None:
    """Test NLL and bits a dimension of every model on every data task."""
    tasks = data_tasks(results)
    pairs = [(t, m) for t in tasks for m in ("nll", "bits_per_dim")]
    if not pairs:
        return None
    columns = tuple(Column(f"{t}:{m}", f"{t}: {metric_info(m).label}", metric_info(m).unit) for t, m in pairs)
    rows = by_family(
        results, results.models(*tasks), len(columns), lambda model: tuple(results.cell(t, model, m) for t, m in pairs)
    )
    caption = "Negative log-likelihood of the test split; a bound (<=) may only overstate it."
    return Table("likelihood", "Likelihood of data", caption, ("family", "model"), columns, rows)


def dimension_table(results: Results) -> Table | None:
    """KL and training time on mixture-D as D grows."""
    tasks = sorted(
        (t for t in density_tasks(results) if task_dimension(t) is not None), key=lambda t: task_dimension(t) or 0
    )
    if not tasks:
        return None
    pairs = [(t, m) for m in ("kl", "train_seconds") for t in tasks]
    columns = tuple(
        Column(f"{t}:{m}", f"{'KL' if m == 'kl' else 'training'}, D = {task_dimension(t)}", metric_info(m).unit)
        for t, m in pairs
    )
    rows = by_family(
        results, results.models(*tasks), len(columns), lambda model: tuple(results.cell(t, model, m) for t, m in pairs)
    )
    caption = "Error and cost against the dimension D of a mixture whose truth is known."
    return Table("dimension", "Error against dimension", caption, ("family", "model"), columns, rows)


def samplers_table(results: Results) -> Table | None:
    """Each model under each sampler that it was handed to."""
    pairs = sorted({(t, m) for t, m, k in results._numbers if sampler_of(k)})
    if not pairs:
        return None
    tasks = sorted({t for t, _ in pairs}, key=task_key)
    asked = [m for m in results.metrics(*tasks) if sampler_of(m)]
    names = sorted({sampler_of(m) for m in asked}, key=lambda s: (list(SAMPLERS).index(s) if s in SAMPLERS else 99, s))
    metrics = list(dict.fromkeys(base_metric(m) for m in asked))
    rows = []
    for task in tasks:
        for model in [m for m in results.models(task) if (task, m) in pairs]:
            for name in ["", *names]:
                keys = [f"{m}:{name}" if name else m for m in metrics]
                cells = tuple(results.cell(task, model, k) for k in keys)
                if any(c.numbers or c.reason for c in cells):
                    labels = (model, SAMPLERS.get(name, name))
                    rows.append(Row(task, labels, results.family[model], cells))
    caption = "One model under several samplers; its own sampler first. The score is the model's throughout."
    columns = tuple(column(m, results, tasks) for m in metrics)
    return Table("samplers", "Samplers", caption, ("task", "model", "sampler"), columns, tuple(rows))


def _long_table(
    results: Results, name: str, title: str, caption: str, choose: Callable[[str], list[str]]
) -> Table | None:
    """One row a task and model, one column a metric."""
    metrics = sorted({m for t in results.tasks for m in choose(t)}, key=metric_key)
    if not metrics:
        return None
    rows = []
    for task in results.tasks:
        for model in results.models(task):
            cells = tuple(results.cell(task, model, m) for m in metrics)
            if any(c.numbers or c.lost for c in cells):
                rows.append(Row(task, (model,), results.family[model], cells))
    columns = tuple(column(m, results, results.tasks) for m in metrics)
    return Table(name, title, caption, ("task", "model"), columns, tuple(rows))


def cost_table(results: Results) -> Table | None:
    """Parameters, time, network evaluations and memory of every model on every task."""
    caption = "What each model costs: one process, one thread or one device a run."
    return _long_table(results, "cost", "Cost", caption, lambda t: [m for m in results.metrics(t) if m in COST_METRICS])


def checks_table(results: Results) -> Table | None:
    """What the likelihood estimators say of their own error."""
    caption = "What the likelihood estimators report of themselves."
    return _long_table(
        results, "estimator-checks", "Estimators' own checks", caption, lambda t: check_metrics(results, t)
    )


def all_tables(results: Results) -> list[Table]:
    """Every table of the report, the overviews first."""
    overviews = [likelihood_table, kl_table, dimension_table, samplers_table, cost_table, checks_table]
    tables = [make(results) for make in overviews]
    return [*(t for t in tables if t is not None and t.rows), *(task_table(results, t) for t in results.tasks)]


# -- writers


def to_csv(table: Table) -> str:
    """Plain numbers: for each column the mean, its interval, kind, number of seeds, and a note."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    fields = ("", "_low", "_high", "_kind", "_seeds", "_note")
    writer.writerow([*table.index, *(c.key + f for c in table.columns for f in fields)])
    for row in table.rows:
        line = [row.group, *row.labels]
        for cell in row.cells:
            every: list[list[str]] = [
                [_plain(n.mean), _plain(n.low), _plain(n.high), n.kind, str(len(n.seeds))] for n in cell.numbers
            ]
            note = cell.reason if cell.remark() == "n/a" else cell.remark()
            # several kinds of one number stand in one cell, in the same order in every field
            line += [*(";".join(v) for v in (zip(*every, strict=True) if every else [("",)] * 5)), note]
        writer.writerow(line)
    return out.getvalue()


def _plain(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.10g}"


def _head(c: Column) -> str:
    return f"{c.head} ({c.unit})" if c.unit else c.head


def to_markdown(table: Table) -> str:
    """A Markdown table; reasons for "n/a" are numbered and listed below it."""
    notes = table.reasons()
    lines = [
        "| " + " | ".join([*(markdown(i) for i in table.index), *(markdown(_head(c)) for c in table.columns)]) + " |",
        "|" + "---|" * (len(table.index) + len(table.columns)),
    ]
    for row in table.rows:
        cells = []
        for cell in row.cells:
            text = cell.text() + (f" ({notes.index(cell.reason) + 1})" if cell.remark() == "n/a" else "")
            cells.append(f"**{text}**" if cell.best else text)
        lines.append("| " + " | ".join([markdown(row.group), *map(markdown, row.labels), *cells]) + " |")
    title = [f"### {markdown(table.title)}", "", markdown(table.caption), ""]
    below = ["", *(f"({i}) {markdown(note)}  " for i, note in enumerate(notes, 1))] if notes else []
    return "\n".join([*title, *lines, *below]) + "\n"


def _latex_cell(cell: Cell, notes: list[str]) -> str:
    parts = "; ".join(f"{latex_symbol(sign)} {latex(number)}" for sign, number in cell.parts())
    remark = latex(cell.remark())
    if remark == "n/a":
        remark += rf"\textsuperscript{{{notes.index(cell.reason) + 1}}}"
    text = " ".join(p for p in (parts, remark) if p)
    return rf"\textbf{{{text}}}" if cell.best else text


def to_latex(table: Table) -> str:
    """A booktabs table; needs \\usepackage{booktabs} and nothing else."""
    notes, width = table.reasons(), len(table.index) - 1 + len(table.columns)
    lines = [
        r"% needs \usepackage{booktabs}",
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{latex(table.caption)}}}",
        rf"\label{{tab:{table.name}}}",
        r"\begin{tabular}{" + "l" * width + "}",
        r"\toprule",
        " & ".join([*map(latex, table.index[1:]), *(latex(_head(c)) for c in table.columns)]) + r" \\",
    ]
    group = None
    for row in table.rows:
        if row.group != group:
            group = row.group
            lines += [r"\midrule", rf"\multicolumn{{{width}}}{{l}}{{\emph{{{latex(group)}}}}} \\"]
        lines.append(" & ".join([*map(latex, row.labels), *(_latex_cell(c, notes) for c in row.cells)]) + r" \\")
    lines += [r"\bottomrule", r"\end{tabular}"]
    for i, note in enumerate(notes, 1):
        lines.append(rf"\par\smallskip{{\footnotesize\textsuperscript{{{i}}} {latex(note)}}}")
    return "\n".join([*lines, r"\end{table}"]) + "\n"
