"""report.html: everything on one page that opens from disk and fetches nothing.

jinja2 renders `template.html` beside this file, with autoescape; pictures are embedded, and their data linked.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader

from replicate.ledger.claims import SOURCES
from replicate.model import FAMILIES
from replicate.report.drawing import Figure
from replicate.report.labels import FAMILY_COLOURS, FAMILY_LABELS, METRICS, base_metric, family_key, slug, task_key
from replicate.report.ledger import Entry, by_verdict
from replicate.report.plots import figure_name
from replicate.report.readme import headline_best, headline_rows, row_label, seeds_line, winner
from replicate.report.records import RecordedRun, RecordedRuns
from replicate.report.tables import Results, data_tasks, density_tasks, dimensions, planar
from replicate.report.text_table import TextTable

#: total of all pictures of a page, in bytes before base64
PICTURES = 4_000_000

#: the notebooks in reading order: file name and title
NOTEBOOKS = (
    ("1-energies-and-z", "Energies and Z"),
    ("2-two-compromises", "The two compromises: restrict the model, or approximate the likelihood"),
    ("3-score-matching-and-langevin", "Score matching and Langevin dynamics"),
    ("4-noise-levels-and-sdes", "Many noise levels, and SDEs"),
    ("5-five-families-side-by-side", "The five families side by side"),
    ("6-your-own-model", "Your own model in the comparison"),
)


@dataclass(frozen=True)
class Section:
    """One section of the page: tables first, then figures, then sub-sections; the template has its words.

    Attributes:
        title: of a sub-section.
        folded: a reader opens it.
    """

    id: str
    tables: tuple[TextTable, ...] = ()
    figures: tuple[Figure, ...] = ()
    parts: tuple[Section, ...] = ()
    title: str = ""
    folded: bool = False


def shrunk(figures: Sequence[Figure], budget: int = PICTURES) -> list[Figure]:
    """Scale the larger pictures down until all fit the budget in bytes, or eight times at most."""
    out = list(figures)
    for _ in range(8):
        total = sum(len(f.png) for f in out)
        if total <= budget:
            break
        mean = total / len(out)
        out = [f.scaled(0.85) if len(f.png) >= mean else f for f in out]
    return out


def sections(results: Results, tables: Sequence[TextTable], figures: Sequence[Figure]) -> list[Section]:
    """Put the tables and figures of the comparison into sections."""
    table = {t.name: t for t in tables}
    figure = {f.name: f for f in figures}

    def pick(*names: str) -> tuple[Figure, ...]:
        return tuple(figure[n] for n in names if n in figure)

    def some(*names: str) -> tuple[TextTable, ...]:
        return tuple(table[n] for n in names if n in table)

    def part(task: str, *kinds: str) -> Section:
        at = slug(task)
        return Section(f"task-{at}", some(f"task-{at}"), pick(*(f"{k}-{at}" for k in kinds)), title=task)

    data, flat = data_tasks(results), planar(density_tasks(results))
    on_data = tuple(part(t, "samples") for t in data)
    on_flat = tuple(part(t, "density", "score", "paths") for t in flat)
    rest = [t for t in results.tasks if t not in (*data, *flat)]
    series = dimensions(rest)
    curves = pick(*(f"training-{slug(t)}" for t in [*data, *density_tasks(results)]))
    out = [
        Section("likelihood", some("likelihood"), pick("nll", "cost-data"), on_data),
        Section("densities", some("kl"), pick("kl", "cost-densities"), on_flat),
        Section("dimension", some("dimension"), pick("dimension"), tuple(part(t) for t in rest if t in series)),
        Section("others", parts=tuple(part(t) for t in rest if t not in series)),
        Section("samplers", some("samplers"), folded=True),
        Section("cost", some("cost"), folded=True),
        Section("checks", some("estimator-checks"), folded=True),
        Section("training", figures=curves, folded=True),
    ]
    return [s for s in out if s.tables or s.figures or s.parts]


def headline(results: Results, summary: pd.DataFrame) -> list[dict[str, Any]]:
    """Return the headline table's rows for the template: README's numbers, with every seed behind them."""
    rows = []
    for task, metric in headline_rows(summary):
        best = headline_best(summary, task, metric)
        label, unit = row_label(metric)
        cells = [(b := best.get(f), results.cell(task, b.model, metric).tip() if b else "") for f in FAMILIES]
        rows.append({"task": task, "label": label, "unit": unit, "cells": cells, "first": winner(best)})
    return rows


def models(runs: RecordedRuns) -> list[RecordedRun]:
    """Return one run of every model, which has its line and its source."""
    ordered = sorted(runs.runs, key=lambda r: (family_key(r.family), r.model, r.failed))
    return list({r.model: r for r in reversed(ordered)}.values())[::-1]


#: keys of a run's provenance that the page lists, and their labels
_PROVENANCE = {
    "device": "device",
    "threads": "threads a run",
    "torch": "torch",
    "python": "Python",
    "platform": "platform",
    "cpu_capability": "CPU instructions",
}


def provenance(runs: RecordedRuns) -> list[tuple[str, str]]:
    """Summarise the code, machines and data of the runs: distinct values with their counts."""
    done = runs.done
    found = [("commit", _counted(r.commit for r in done))]
    found += [(label, _counted(r.provenance.get(key) for r in done)) for key, label in _PROVENANCE.items()]
    rows = [("runs", f"{len(done)} done, {len(runs.failed)} failed"), *(row for row in found if row[1])]
    rows += [(k.replace("_", " "), _counted(r.spec.get(k) for r in done)) for k in ("precision", "results_version")]
    for task in sorted({r.task for r in runs.comparison.runs}, key=task_key):
        here = [r for r in runs.runs if r.task == task]
        digests = sorted({str(r.spec.get("data_sha256") or "")[:16] for r in here})
        seeds = sorted({r.seed for r in here})
        rows.append((f"data of {task}", f"sha256 {', '.join(digests)}; seeds {', '.join(map(str, seeds))}"))
    judges: dict[str, set[str]] = {}
    for run in done:
        for task, digest in run.classifiers.items():
            judges.setdefault(task, set()).add(digest[:16])
    rows += [(f"classifier of {task}", f"sha256 {', '.join(sorted(found))}") for task, found in sorted(judges.items())]
    return [*rows, *_times(runs)]


def _counted(values: Iterable[Any]) -> str:
    counts = Counter(str(v) for v in values if v not in (None, ""))
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{value} ({n} runs)" for value, n in sorted(counts.items()))


def _moment(value: Any) -> datetime | None:
    try:
        return datetime.fromisoformat(str(value))
    except ValueError:
        return None


def _times(runs: RecordedRuns) -> list[tuple[str, str]]:
    moments = [(_moment(r.provenance.get("started")), _moment(r.provenance.get("finished"))) for r in runs.done]
    starts, ends = [start for start, _ in moments if start], [end for _, end in moments if end]
    if not starts or not ends:
        return []
    first, last = min(starts), max(ends)
    together = sum((end - start).total_seconds() for start, end in moments if start and end)
    wall, all_runs = (timedelta(seconds=round(s)) for s in ((last - first).total_seconds(), together))
    reach = f"{wall} (hours:minutes:seconds), from {first.isoformat(sep=' ')} to {last.isoformat(sep=' ')}"
    return [("wall time", reach), ("all runs together", str(all_runs))]


@dataclass(frozen=True)
class LedgerRow:
    """One claim on the page: its line, and the details that open below it.

    A figure of several claims is embedded in the first; the others link to it there.
    """

    entry: Entry
    figures: list[Figure]
    elsewhere: list[Figure]
    specs: dict[str, str]


def ledger_rows(ledger: Sequence[Entry], figures: Sequence[Figure], runs: RecordedRuns) -> list[LedgerRow]:
    """Return every claim with its figures and the settings of the runs behind it."""
    figure = {f.name: f for f in figures}
    by_id = {r.run_id: r for r in runs.runs}
    seen: set[str] = set()
    out = []
    for e in ledger:
        names = (figure_name(e.paper.key, e.claim.experiment, p) for p in e.claim.plots)
        behind = (by_id[i] for i in e.judgement.run_ids.split(";") if i in by_id)
        specs = {f"{r.model} on {r.task}": _settings(r.spec) for r in behind}
        pictures = [figure[n] for n in names if n in figure]
        new, old = ([f for f in pictures if (f.name in seen) == known] for known in (False, True))
        seen.update(f.name for f in new)
        out.append(LedgerRow(e, new, old, specs))
    return out


def further(figures: Sequence[Figure], placed: Sequence[Section], claimed: Sequence[LedgerRow]) -> list[Section]:
    """Make a section of the figures without a place elsewhere: those of experiments that no claim shows."""
    there = {f.name for section in placed for part in (section, *section.parts) for f in part.figures}
    there |= {f.name for row in claimed for f in row.figures}
    rest = tuple(f for f in figures if f.name not in there)
    return [Section("further", figures=rest, folded=True)] if rest else []


def _settings(spec: Mapping[str, Any]) -> str:
    kept = {k: v for k, v in spec.items() if k not in ("seed", "model", "task", "family", "kind")}
    return json.dumps(kept, indent=1, sort_keys=True)


def render(
    runs: RecordedRuns,
    results: Results,
    summary: pd.DataFrame,
    tables: Sequence[TextTable],
    figures: Sequence[Figure],
    profile: str,
    ledger: Sequence[Entry] = (),
    printed: Sequence[TextTable] = (),
) -> str:
    """Return the whole page as HTML text.

    Args:
        results, summary: the measurements behind `tables`, and the numbers behind the headline.
        tables, figures: as written beside the page.
        printed: tables of print beside our numbers.
    """
    pictures = shrunk(figures)
    placed, claimed = sections(results, tables, pictures), ledger_rows(ledger, pictures, runs)
    measured = {base_metric(m) for m in results.metrics()}
    sized = {"models": results.models(), "tasks": results.tasks, "runs": runs.done, "claims": ledger}
    look: dict[str, Any] = {"trim_blocks": True, "lstrip_blocks": True, "keep_trailing_newline": True}
    jinja = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, **look)
    return jinja.get_template("template.html").render(
        profile=profile,
        sections=[*placed, *further(pictures, placed, claimed)],
        ledger=claimed,
        verdicts=by_verdict(e.judgement.verdict for e in ledger),
        ledger_papers=list({e.paper.key: e.paper for e in ledger}.values()),
        sources=SOURCES,
        printed=printed,
        headline=headline(results, summary),
        seeds=seeds_line(summary),
        families=FAMILIES,
        family_labels=FAMILY_LABELS,
        family_colours=FAMILY_COLOURS,
        metrics=[(m, info) for m, info in METRICS.items() if m in measured],
        failures=runs.failed,
        models=models(runs.comparison),
        notebooks=NOTEBOOKS,
        provenance=provenance(runs),
        counts={name: len(found) for name, found in sized.items()},
    )
