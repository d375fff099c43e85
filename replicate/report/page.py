"""report.html: everything on one page that opens from disk with nothing fetched.

The page is made by jinja2 with autoescape from `template.html` beside this file; pictures are embedded, and their
data are linked where they lie beside the page.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader
from PIL import Image

from replicate.ledger.claims import SOURCES
from replicate.model import FAMILIES
from replicate.report.drawing import Drawing
from replicate.report.labels import (
    FAMILY_COLOURS,
    FAMILY_LABELS,
    METRICS,
    MetricInfo,
    family_key,
    metric_info,
    short,
    slug,
    task_key,
)
from replicate.report.ledger import Entry, Plain, by_verdict, number, ours, wanted
from replicate.report.plots import figure_name
from replicate.report.readme import Best, headline_best, headline_rows, seeds_line, winner
from replicate.report.records import Runs
from replicate.report.tables import Results, Table, data_tasks, density_tasks, planar_tasks, task_dimension

#: all pictures of a page together, in bytes before base64
PICTURES = 4_000_000

KIND_LEGEND = (
    ("=", "exact", "The number itself, up to the sampling error of a finite test set."),
    ("<=", "upper bound", "The truth is at most this. An NLL with this sign can only be better than it looks."),
    (">=", "lower bound", "The truth is at least this. An NLL with this sign may look better than it is."),
    ("~", "estimate", "No side is known: an estimate of log Z or the solution of an ODE stands behind it."),
)
FAMILY_TABLE = (
    ("autoregressive", "restricts the architecture: a product of conditionals needs no Z", "exact", "autograd"),
    (
        "flow",
        "restricts the architecture: an invertible map carries Z along",
        "exact; a bound on discrete data",
        "autograd",
    ),
    ("vae", "approximates by variational inference", "ELBO and importance-weighted bounds", "autograd of the bound"),
    (
        "ebm",
        "approximates by Markov chains while training",
        "unnormalised, and an estimate of log Z: annealed importance sampling from both sides, quadrature in 2-D",
        "-grad f, exact",
    ),
    ("score", "models grad log p, where Z drops out", "probability-flow ODE", "the model itself"),
    ("reference", "needs none: closed forms and kernels, and the truth itself where it is known", "exact", "autograd"),
)
#: the notebooks by file name, as a reader finds them
NOTEBOOKS = (
    ("1-energies-and-z", "Energies and Z"),
    ("2-two-compromises", "The two compromises: restrict the model, or approximate the likelihood"),
    ("3-score-matching-and-langevin", "Score matching and Langevin dynamics"),
    ("4-noise-levels-and-sdes", "Many noise levels, and SDEs"),
    ("5-five-families-side-by-side", "The five families side by side"),
    ("6-your-own-model", "Your own model in the comparison"),
)
METRIC_NOTES: dict[str, str] = {
    "nll": "Mean negative log-likelihood of the test split.",
    "bits_per_dim": "NLL divided by the number of dimensions and by ln 2.",
    "kl": "Mean of log p(x) - log q(x) over test points of the truth p; 0 is perfect.",
    "fisher_divergence": "Mean squared distance between the model's score and the truth's at test points.",
    "w2": "2-Wasserstein distance between samples and test points, by exact optimal transport.",
    "mmd": "Maximum mean discrepancy between samples and test points.",
    "mode_weight_error": "Distance between the share of samples in each mode and the mode's true probability.",
    "c2st": "Accuracy of a classifier that tells samples from test data; 0.5 is perfect.",
    "frechet": "Fréchet distance between samples and test data in the features of a small classifier.",
    "precision": "Share of samples that fall among test data in feature space.",
    "recall": "Share of test data that fall among samples in feature space.",
    "density": "How densely test data surround the samples in feature space; about 1 is perfect.",
    "coverage": "Share of test data with a sample in their neighbourhood in feature space.",
    "parameters": "Trainable numbers.",
    "train_seconds": "Wall time of training.",
    "sample_ms": "Wall time of sampling a batch, divided by its size.",
    "nfe": "Network evaluations one after the other for one batch of samples.",
    "peak_memory_mb": "Peak memory of the process, libraries included; of the device on a GPU.",
    "evaluate_seconds": "Wall time of all measurements together.",
}


@dataclass(frozen=True)
class Shown:
    """A figure as the page shows it: its texts and its PNG."""

    name: str
    title: str
    caption: str
    png: bytes
    also: tuple[str, ...] = ()

    @staticmethod
    def of(drawing: Drawing, png: bytes) -> Shown:
        """A drawing without its figure."""
        return Shown(drawing.name, drawing.title, drawing.caption, png, drawing.also)

    @property
    def source(self) -> str:
        """The picture as a data URI."""
        return "data:image/png;base64," + base64.b64encode(self.png).decode("ascii")

    @property
    def width(self) -> int:
        """Width in pixels."""
        return Image.open(io.BytesIO(self.png)).width


@dataclass(frozen=True)
class Section:
    """One section of the page: tables first, then figures, then sub-sections."""

    id: str
    title: str
    intro: str = ""
    tables: tuple[Table, ...] = ()
    figures: tuple[Shown, ...] = ()
    parts: tuple[Section, ...] = field(default=())
    folded: bool = False


def shrunk(shown: Sequence[Shown], budget: int = PICTURES) -> list[Shown]:
    """The figures with the larger pictures scaled down until all together fit the budget in bytes."""
    out = list(shown)
    for _ in range(8):
        total = sum(len(s.png) for s in out)
        if total <= budget:
            break
        mean = total / len(out)
        out = [_scaled(s, 0.85) if len(s.png) >= mean else s for s in out]
    return out


def _scaled(s: Shown, factor: float) -> Shown:
    image = Image.open(io.BytesIO(s.png)).convert("RGB")
    small = image.resize((int(image.width * factor), int(image.height * factor)), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.quantize(128, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
    return Shown(s.name, s.title, s.caption, buffer.getvalue(), s.also)


def sections(results: Results, tables: Sequence[Table], shown: Sequence[Shown]) -> list[Section]:
    """All tables and figures in their places."""
    table = {t.name: t for t in tables}
    figure = {s.name: s for s in shown}

    def pick(names: Iterable[str]) -> tuple[Shown, ...]:
        return tuple(figure[n] for n in names if n in figure)

    def some(*names: str) -> tuple[Table, ...]:
        return tuple(table[n] for n in names if n in table)

    def part(task: str, kinds: Sequence[str]) -> Section:
        at = slug(task)
        return Section(f"task-{at}", task, "", some(f"task-{at}"), pick(f"{k}-{at}" for k in kinds))

    data, planar = data_tasks(results), planar_tasks(results)
    other = [t for t in results.tasks if t not in data and t not in planar]
    out = [
        Section(
            "likelihood",
            "Data: likelihood and samples",
            "Real data, of which no density is known. Continuous families see levels and bits through the shared "
            "dequantisation, whose change of variables is part of their likelihood; so theirs are bounds or estimates "
            "there. Tables of real numbers are standardised, and a likelihood is that of the standardised columns.",
            some("likelihood"),
            pick(["nll", "cost-data"]),
            tuple(part(t, ["samples"]) for t in data),
        ),
        Section(
            "densities",
            "Densities whose truth is known",
            "Two-dimensional densities with exact log p, score and sampler, so that every error can be measured rather "
            "than ranked.",
            some("kl"),
            pick(["kl", "cost-densities"]),
            tuple(part(t, ["density", "score", "paths"]) for t in planar),
        ),
        Section(
            "dimension",
            "Error and cost against dimension",
            "Mixtures of the same kind in more and more dimensions.",
            some("dimension"),
            pick(["dimension"]),
            tuple(part(t, []) for t in other),
        ),
        Section(
            "samplers",
            "Samplers",
            "Any model with a score can be handed to any Langevin sampler: a flow or a VAE as well as a score network.",
            some("samplers"),
            folded=True,
        ),
        Section("cost", "Cost", "", some("cost"), folded=True),
        Section(
            "checks",
            "Estimators' own checks",
            "Effective sample sizes, both brackets of log Z, and what halving the solver's step changes.",
            some("estimator-checks"),
            folded=True,
        ),
        Section(
            "training",
            "Training curves",
            "",
            figures=pick(f"training-{slug(t)}" for t in [*data, *density_tasks(results)]),
            folded=True,
        ),
    ]
    return [s for s in out if s.tables or s.figures or s.parts]


def headline(results: Results, summary: pd.DataFrame) -> list[dict[str, Any]]:
    """The headline table's rows for the template: the same numbers as in README, with every seed behind them."""
    rows = []
    for task, metric in headline_rows(summary):
        best = headline_best(summary, task, metric)
        info = metric_info(metric)
        label = "KL" if metric == "kl" else info.label
        unit = "" if info.unit == label else info.unit
        cells = [_headline_cell(results, task, metric, best.get(f)) for f in FAMILIES]
        rows.append({"task": task, "label": label, "unit": unit, "cells": cells, "first": winner(best)})
    return rows


def _headline_cell(results: Results, task: str, metric: str, best: Best | None) -> dict[str, Any]:
    if best is None:
        return {"cell": None, "model": "", "tip": ""}
    return {"cell": best.cell, "model": best.model, "tip": results.cell(task, best.model, metric).tip()}


def failures(runs: Runs) -> list[dict[str, Any]]:
    """Every failed run, for the template."""
    return [
        {
            "model": r.model,
            "task": r.task,
            "seed": r.seed,
            "id": r.run_id,
            "short": short(r.run_id),
            "error": r.error,
            "tail": r.traceback_tail,
        }
        for r in runs.failed
    ]


def models(runs: Runs) -> list[dict[str, str]]:
    """Every model once, with its line and its source."""
    seen: dict[str, dict[str, str]] = {}
    for r in sorted(runs.runs, key=lambda r: (family_key(r.family), r.model, r.failed)):
        seen.setdefault(r.model, {"model": r.model, "family": r.family, "about": r.about, "paper": r.paper})
    return list(seen.values())


def provenance(runs: Runs) -> list[tuple[str, str]]:
    """What the runs say of where and with what they were made: distinct values with their counts."""
    done = runs.done
    rows: list[tuple[str, str]] = [("runs", f"{len(done)} done, {len(runs.failed)} failed")]
    labels = {
        "commit": "commit",
        "device": "device",
        "threads": "threads a run",
        "torch": "torch",
        "python": "Python",
        "platform": "platform",
        "cpu_capability": "CPU instructions",
    }
    for key, label in labels.items():
        values = _counted(r.commit if key == "commit" else r.provenance.get(key) for r in done)
        if values:
            rows.append((label, values))
    rows.append(("precision", _counted(r.spec.get("precision") for r in done)))
    rows.append(("results version", _counted(r.spec.get("results_version") for r in done)))
    for task in runs.comparison.tasks():
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
    counts: dict[str, int] = {}
    for v in values:
        if v not in (None, ""):
            counts[str(v)] = counts.get(str(v), 0) + 1
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{value} ({n} runs)" for value, n in sorted(counts.items()))


def _moment(value: Any) -> datetime | None:
    try:
        return datetime.fromisoformat(str(value))
    except ValueError:
        return None


def _span(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def _times(runs: Runs) -> list[tuple[str, str]]:
    starts = [t for r in runs.done if (t := _moment(r.provenance.get("started"))) is not None]
    ends = [t for r in runs.done if (t := _moment(r.provenance.get("finished"))) is not None]
    rows = []
    if starts and ends:
        wall = _span((max(ends) - min(starts)).total_seconds())
        first, last = min(starts).isoformat(sep=" "), max(ends).isoformat(sep=" ")
        rows.append(("wall time", f"{wall} (hours:minutes:seconds), from {first} to {last}"))
        pairs = [(_moment(r.provenance.get("started")), _moment(r.provenance.get("finished"))) for r in runs.done]
        rows.append(("all runs together", _span(sum((b - a).total_seconds() for a, b in pairs if a and b))))
    return rows


def _metric_rows(results: Results) -> list[tuple[str, str, MetricInfo]]:
    asked = {m.partition(":")[0] for m in results.metrics()}
    return [(m, METRIC_NOTES[m], info) for m, info in METRICS.items() if m in asked]


def environment() -> Environment:
    """jinja2 with autoescape on, over the templates beside this file."""
    found = FileSystemLoader(Path(__file__).parent)
    return Environment(loader=found, autoescape=True, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)


@dataclass(frozen=True)
class LedgerRow:
    """One claim as the page shows it: a line, and what it opens to.

    A figure of several claims is embedded in the first; the others link to it there.
    """

    entry: Entry
    band: str
    ours: str
    figures: tuple[Shown, ...]
    elsewhere: tuple[Shown, ...]
    specs: tuple[tuple[str, str], ...]

    @property
    def printed(self) -> str:
        """The published value as the ledger's table has it."""
        p = self.entry.claim.published
        return p if isinstance(p, str) else number(p)


def ledger_rows(ledger: Sequence[Entry], shown: Sequence[Shown], runs: Runs) -> list[LedgerRow]:
    """Every claim with its figures and the settings of the runs behind it."""
    figure = {s.name: s for s in shown}
    by_id = {r.run_id: r for r in runs.runs}
    seen: set[str] = set()
    out = []
    for e in ledger:
        names = (figure_name(e.paper.key, e.claim.experiment, p) for p in e.claim.plots)
        behind = (by_id[i] for i in e.judged.run_ids.split(";") if i in by_id)
        specs = {f"{r.model} on {r.task}": _settings(r.spec) for r in behind}
        pictures = [figure[n] for n in names if n in figure]
        new, old = ([s for s in pictures if (s.name in seen) == known] for known in (False, True))
        seen.update(s.name for s in new)
        out.append(LedgerRow(e, wanted(e.asked), ours(e.judged), tuple(new), tuple(old), tuple(specs.items())))
    return out


def further(shown: Sequence[Shown], placed: Sequence[Section], claimed: Sequence[LedgerRow]) -> list[Section]:
    """A section with the figures that have no place elsewhere on the page: of experiments that no claim shows."""
    there = {s.name for section in placed for part in (section, *section.parts) for s in part.figures}
    there |= {s.name for row in claimed for s in row.figures}
    rest = tuple(s for s in shown if s.name not in there)
    return [Section("further", "Further figures of experiments", figures=rest, folded=True)] if rest else []


def _settings(spec: Mapping[str, Any]) -> str:
    kept = {k: v for k, v in spec.items() if k not in ("seed", "model", "task", "family", "kind")}
    return json.dumps(kept, indent=1, sort_keys=True)


def render(
    runs: Runs,
    results: Results,
    summary: pd.DataFrame,
    tables: Sequence[Table],
    shown: Sequence[Shown],
    profile: str,
    ledger: Sequence[Entry] = (),
    plain: Sequence[Plain] = (),
) -> str:
    """The whole page as HTML text.

    Args:
        runs: for failures, models and provenance.
        results: the measurements behind `tables`.
        summary: for the headline.
        tables, shown: as written beside the page.
        profile: named in the title.
        ledger: every claim with its verdict.
        plain: tables of print beside our numbers.
    """
    pictures = shrunk(shown)
    placed, claimed = sections(results, tables, pictures), ledger_rows(ledger, pictures, runs)
    template = environment().get_template("template.html")
    order: Callable[[str], Any] = task_key
    return template.render(
        profile=profile,
        sections=[*placed, *further(pictures, placed, claimed)],
        ledger=claimed,
        verdicts=by_verdict(e.judged.verdict for e in ledger),
        ledger_papers=list({e.paper.key: e.paper for e in ledger}.values()),
        sources=SOURCES,
        plain=plain,
        headline=headline(results, summary),
        seeds=seeds_line(summary),
        families=[(FAMILY_LABELS[f], f) for f in FAMILIES],
        family_table=FAMILY_TABLE,
        family_labels=FAMILY_LABELS,
        family_colours=FAMILY_COLOURS,
        kinds=KIND_LEGEND,
        metrics=_metric_rows(results),
        failures=failures(runs),
        models=models(runs.comparison),
        notebooks=NOTEBOOKS,
        provenance=provenance(runs),
        counts={
            "models": len(results.models()),
            "tasks": len(sorted(results.tasks, key=order)),
            "runs": len(runs.done),
            "claims": len(ledger),
            "failed": len(runs.failed),
        },
        dimensions=[d for t in results.tasks if (d := task_dimension(t))],
    )
