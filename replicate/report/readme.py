"""The headline table: the best model of each family on each task, written into README by a command."""

import math
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from replicate.errors import ReportError
from replicate.model import FAMILIES
from replicate.report.labels import FAMILY_LABELS, markdown, metric_info, task_key
from replicate.report.ledger import read_claims_csv, summary_line
from replicate.report.records import FAILED, read_records, read_summary, recorded_line
from replicate.report.tables import flatters, planar
from replicate.report.text_table import Cell, Number

LEGEND = (
    "Best model of each family, mean over seeds with a 95 % t-interval. `=` exact, `<=` upper bound, `>=` lower bound, "
    "`~` estimate; bold: best of the five families among numbers that cannot flatter."
)

#: profiles with their own blocks in README, and the prefix of their marks
PREFIX = {"standard": "", "full": "full-"}


class Best(NamedTuple):
    """The best model of a family in one row of the headline table."""

    model: str
    cell: Cell
    flattering: bool
    mean: float


def headline_rows(summary: pd.DataFrame) -> list[tuple[str, str]]:
    """Return (task, metric) of each row: likelihood on data, then KL on densities in two dimensions."""
    data = sorted(set(summary.loc[summary["metric"] == "bits_per_dim", "task"]), key=task_key)
    known = sorted(set(summary.loc[summary["metric"] == "kl", "task"]), key=task_key)
    return [*((t, m) for t in data for m in ("nll", "bits_per_dim")), *((t, "kl") for t in planar(known))]


def headline_best(summary: pd.DataFrame, task: str, metric: str) -> dict[str, Best]:
    """Return the best model of each family in one row, by a metric of which less is better, the truth left out.

    Numbers that may flatter (estimates, lower bounds) come second to those that cannot.
    """
    rows = summary[(summary["task"] == task) & (summary["metric"] == metric) & (summary["model"] != "truth")]
    found: dict[str, list[Best]] = {}
    for r in rows.to_dict("records"):
        if math.isfinite(r["mean"]):
            number = Number(r["kind"], r["unit"], r["mean"], r["ci_low"], r["ci_high"], ())
            best = Best(r["model"], Cell(metric, (number,)), flatters(metric, r["kind"]), r["mean"])
            found.setdefault(r["family"], []).append(best)
    return {f: min(found[f], key=lambda b: (b.flattering, b.mean, b.model)) for f in FAMILIES if f in found}


def winner(best: dict[str, Best]) -> str | None:
    """Return the family with the row's best number, among those that cannot flatter and are no reference."""
    able = {f: b for f, b in best.items() if f != "reference" and not b.flattering}
    return min(able, key=lambda f: able[f].mean) if len(able) > 1 else None


def row_label(metric: str) -> tuple[str, str]:
    """Return the label and unit of a row of the headline table; the unit is "" where the label says it."""
    info = metric_info(metric)
    label = "KL" if metric == "kl" else info.label
    return label, "" if label == info.unit else info.unit


def headline_markdown(summary: pd.DataFrame) -> str:
    """Write the headline table in Markdown: tasks down, families across, the model's name under each number."""
    lines = ["| task | " + " | ".join(FAMILY_LABELS[f] for f in FAMILIES) + " |", "|---|" + "---|" * len(FAMILIES)]
    for task, metric in headline_rows(summary):
        best = headline_best(summary, task, metric)
        first = winner(best)
        cells = []
        for family in FAMILIES:
            b = best.get(family)
            text = f"**{b.cell.text()}**" if b and family == first else b.cell.text() if b else "-"
            cells.append(f"{text}<br>{markdown(b.model)}" if b else text)
        label, unit = row_label(metric)
        name = f"{markdown(task)}<br>{label}" + (f", {unit}" if unit else "")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    tail = [LEGEND + " " + seeds_line(summary)]
    lost = summary[summary["metric"] == FAILED]
    if len(lost):
        columns = (lost[c] for c in ("model", "task", "mean", "n_seeds"))
        failed = (f"{markdown(m)} on {markdown(t)} ({int(k)} of {n})" for m, t, k, n in zip(*columns, strict=True))
        tail.append("Failed runs: " + ", ".join(failed) + ".")
    return "\n".join([*lines, "", *tail]) + "\n"


def seeds_line(summary: pd.DataFrame) -> str:
    """State the number of seeds of each task."""
    counts = summary[summary["metric"] != FAILED].groupby("task")["n_seeds"].max()
    by_count: dict[int, list[str]] = {}
    for task in dict.fromkeys(task for task, _ in headline_rows(summary)):
        by_count.setdefault(int(counts[task]), []).append(markdown(task))
    parts = (f"{n} on {', '.join(tasks)}" for n, tasks in sorted(by_count.items()))
    return "Seeds: " + "; ".join(parts) + "." if by_count else ""


def update_readme(path: Path, text: str, mark: str = "headline") -> bool:
    """Put text between a file's two lines `<!-- MARK:begin -->` and `<!-- MARK:end -->`; all else stays.

    Returns:
        Whether the file changed.

    Raises:
        ReportError: the file does not have each marker once, in order.
    """
    old = path.read_text(encoding="utf-8")
    new = _replaced(old, text, mark, path)
    if new != old:
        path.write_text(new, encoding="utf-8", newline="\n")
    return new != old


def _replaced(old: str, text: str, mark: str, path: Path) -> str:
    begin, end = f"<!-- {mark}:begin -->", f"<!-- {mark}:end -->"
    if old.count(begin) != 1 or old.count(end) != 1 or old.index(begin) > old.index(end):
        raise ReportError(f"{path} needs one line {begin} and after it one line {end}; the text goes between them")
    head, rest = old.split(begin)
    return f"{head}{begin}\n{text.strip()}\n{end}{rest.split(end)[1]}"


def read_compared(results: Path) -> pd.DataFrame:
    """Read summary.csv of a results folder without the rows of the papers' experiments."""
    summary = read_summary(results / "summary.csv")
    runs = map(recorded_line, read_records(results / "records.jsonl"))
    experiments = {run.task for run in runs if not run.compared}
    return summary[~summary["task"].isin(experiments)]


def blocks(results: Path) -> dict[str, str]:
    """Return the blocks of README that results/PROFILE gives, by mark: the headline, and the ledger's line if any."""
    out = {"headline": headline_markdown(read_compared(results))}
    if (results / "claims.csv").exists():
        out["ledger"] = summary_line(read_claims_csv(results / "claims.csv"))
    return {PREFIX.get(results.name, "") + mark: text for mark, text in out.items()}


def refresh(readme: Path, results: Path) -> bool:
    """Write the ledger's line and the headline table of a results folder into a README; return whether it changed."""
    changed = [update_readme(readme, text, mark) for mark, text in blocks(results).items()]
    return any(changed)


def stale(readme: Path, results: Path) -> bool:
    """Return whether README's text between its markers differs from what a results folder gives."""
    old = readme.read_text(encoding="utf-8")
    return any(_replaced(old, text, mark, readme) != old for mark, text in blocks(results).items())
