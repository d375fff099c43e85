"""Run records in, two tables out: one row a measurement, and one row a number with its interval over seeds.

Everything that the report says is computed from these two tables and the runs' own histories and arrays.
"""

from __future__ import annotations

import hashlib
import json
import math
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from replicate.errors import RecordError, ReportError
from replicate.metrics.intervals import t_interval
from replicate.report.labels import family_key, metric_key, short, task_key
from replicate.runs.record import parse_failure, parse_record

MEASUREMENT_COLUMNS = (
    "run_id",
    "task",
    "model",
    "family",
    "seed",
    "split",
    "metric",
    "value",
    "stderr",
    "kind",
    "unit",
    "n",
    "status",
    "device",
    "commit",
)
SUMMARY_COLUMNS = (
    "task",
    "model",
    "family",
    "metric",
    "kind",
    "unit",
    "mean",
    "ci_low",
    "ci_high",
    "n_seeds",
    "run_ids",
)
#: the metric under which a run without a record stands in the measurements, and its count in the summary
FAILED = "failed_runs"
#: nominal coverage of every interval in the report
LEVEL = 0.95
#: an interval over fewer seeds than this says nothing and is not printed
MIN_SEEDS = 3
#: splits that models learn from; their numbers are in measurements.csv and in no summary
LEARNT_SPLITS = ("train", "valid")


@dataclass(frozen=True)
class Run:
    """One run as its folder tells it.

    Attributes:
        run_id: sha256 of the canonical spec.
        spec: the specification (model, task, family, seed, settings).
        folder: where arrays.npz lies, if there is one; None of a run that a results folder tells of (`kept_runs`).
        measurements: rows as dictionaries; empty for a failed run.
        history: losses by step; empty for a failed run.
        provenance: commit, device, versions, times.
        about, paper: the model in one line, and its source.
        error, traceback_tail: why a failed run failed; "" for a whole one.
        weights_sha256: of a trained model's safetensors; "" for an experiment.
        plots: what an experiment draws; None where the results folder that tells of the run did not keep them.
        examples: packed log p of every test example, by task.
        classifiers: sha256 of the weights of each classifier whose features judged samples, by task.
    """

    run_id: str
    spec: Mapping[str, Any]
    folder: Path | None
    measurements: tuple[Mapping[str, Any], ...] = ()
    history: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    about: str = ""
    paper: str = ""
    error: str = ""
    traceback_tail: str = ""
    weights_sha256: str = ""
    plots: tuple[Mapping[str, Any], ...] | None = ()
    examples: Mapping[str, Any] = field(default_factory=dict)
    classifiers: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_experiment(self) -> bool:
        """Whether this run is a paper's experiment and no model of the comparison."""
        return self.spec.get("kind") == "experiment"

    @property
    def failed(self) -> bool:
        """Whether this run left a failure instead of a record."""
        return bool(self.error)

    @property
    def task(self) -> str:
        """The task's name."""
        return str(self.spec["task"])

    @property
    def model(self) -> str:
        """The model's name."""
        return str(self.spec["model"])

    @property
    def family(self) -> str:
        """The model's family."""
        return str(self.spec["family"])

    @property
    def seed(self) -> int:
        """The seed."""
        return int(self.spec["seed"])

    @property
    def commit(self) -> str:
        """The commit that the run was computed at, with "-dirty" where the tree had changes."""
        commit = str(self.provenance.get("commit") or "")
        known = commit not in ("", "unknown")
        return f"{commit}-dirty" if known and self.provenance.get("dirty") else commit

    def sort_key(self) -> tuple[Any, ...]:
        """Task, family, model, seed."""
        return (task_key(self.task), family_key(self.family), self.model, self.seed, self.run_id)

    @property
    def group(self) -> tuple[str, ...]:
        """What its pictures are of: all models on a task, or all seeds of a paper's experiment."""
        return (self.task, self.model) if self.is_experiment else (self.task,)

    @property
    def arrays_file(self) -> Path | None:
        """Where its arrays lie; None where it kept none."""
        path = self.folder / "arrays.npz" if self.folder is not None else None
        return path if path is not None and path.exists() else None

    def arrays(self) -> dict[str, np.ndarray]:
        """The run's arrays by name; empty where it kept none.

        Raises:
            ReportError: arrays.npz is broken or holds pickles.
        """
        path = self.arrays_file
        if path is None:
            return {}
        try:
            with np.load(path, allow_pickle=False) as data:
                return {name: data[name] for name in data.files}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise ReportError(f"{path} cannot be read ({error}); delete its folder and run again") from None

    def as_record(self) -> dict[str, Any]:
        """The run without its measurements and arrays: one line of records.jsonl."""
        head = {"run_id": self.run_id, "spec": dict(self.spec), "measurements_sha256": rows_digest(_rows(self))}
        if self.failed:
            return {**head, "error": self.error, "traceback_tail": self.traceback_tail}
        rest = {"provenance": dict(self.provenance), "about": self.about, "paper": self.paper}
        if self.examples:
            rest["examples"] = dict(self.examples)
        if self.classifiers:
            rest["classifiers"] = dict(self.classifiers)
        if self.is_experiment:
            return {**head, **rest, **({"plots": list(self.plots)} if self.plots else {})}
        return {**head, **rest, "weights_sha256": self.weights_sha256, "history": dict(self.history)}


@dataclass(frozen=True)
class Runs:
    """All runs of one report, sorted by task, family, model and seed."""

    runs: tuple[Run, ...]

    @property
    def done(self) -> tuple[Run, ...]:
        """Runs with a record."""
        return tuple(r for r in self.runs if not r.failed)

    @property
    def failed(self) -> tuple[Run, ...]:
        """Runs with a failure instead of a record."""
        return tuple(r for r in self.runs if r.failed)

    @property
    def comparison(self) -> Runs:
        """The runs of models, without the papers' experiments."""
        return Runs(tuple(r for r in self.runs if not r.is_experiment))

    def tasks(self) -> list[str]:
        """Every task, in the report's order."""
        return sorted({r.task for r in self.runs}, key=task_key)


def canonical_hash(spec: Mapping[str, Any]) -> str:
    """sha256 of a spec's canonical JSON: what its run id must be."""
    text = json.dumps(spec, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _read_run(path: Path) -> Run:
    try:
        text = path.read_bytes()
        if path.name == "failure.json":
            lost = parse_failure(text)
            tail = lost.get("traceback_tail", "")
            return Run(lost["run_id"], lost["spec"], path.parent, error=lost["error"], traceback_tail=tail)
        data = parse_record(text)
    except (OSError, RecordError) as error:
        why = "; ".join(str(error).splitlines())
        raise ReportError(f"{path} is not a whole record ({why}); delete its folder and run again") from None
    return Run(
        data["run_id"],
        data["spec"],
        path.parent,
        tuple(data["measurements"]),
        data.get("history", {}),
        data["provenance"],
        data.get("about", ""),
        data.get("paper", ""),
        weights_sha256=data.get("weights_sha256", ""),
        plots=tuple(data.get("plots", ())),
        examples=data.get("examples", {}),
        classifiers=data.get("classifiers", {}),
    )


def load_runs(folder: Path, keep: Iterable[str] | None = None) -> Runs:
    """Every finished or failed run below a folder; unfinished work is passed over.

    Args:
        folder: its sub-folders are runs.
        keep: run ids to load; all by default.

    Raises:
        ReportError: no folder, a broken record, or two runs of one model, task and seed.
    """
    if not folder.is_dir():
        raise ReportError(f"there is no runs folder {folder}; `replicate reproduce` makes one")
    wanted = None if keep is None else set(keep)
    runs = []
    for place in sorted(p for p in folder.iterdir() if p.is_dir()):
        if wanted is not None and place.name not in wanted:
            continue
        # a record beside a failure is the later, successful try
        path = next((place / n for n in ("record.json", "failure.json") if (place / n).is_file()), None)
        if path is not None:
            runs.append(_read_run(path))
    seen: dict[tuple[str, str, int], str] = {}
    for run in runs:
        key = (run.task, run.model, run.seed)
        if key in seen:
            raise ReportError(
                f"two runs of {run.model} on {run.task} with seed {run.seed}: {seen[key]} and {run.run_id}; "
                "report on one profile and one setting at a time"
            )
        seen[key] = run.run_id
    return Runs(tuple(sorted(runs, key=Run.sort_key)))


def _rows(run: Run) -> Iterable[tuple[Any, ...]]:
    head = (run.run_id, run.task, run.model, run.family, run.seed)
    tail = (str(run.provenance.get("device") or ""), run.commit)
    if run.failed:
        yield (*head, "", FAILED, None, None, None, None, None, f"failed: {' '.join(run.error.split())}", *tail)
    for m in run.measurements:
        numbers = tuple(m.get(k) for k in ("value", "stderr", "kind", "unit", "n"))
        yield (*head, m.get("split") or "", m["metric"], *numbers, m.get("status") or "ok", *tail)


def rows_digest(rows: Iterable[tuple[Any, ...]]) -> str:
    """sha256 of a run's rows of measurements.csv, in any order: what ties records.jsonl to the numbers."""
    numbers = {MEASUREMENT_COLUMNS.index(c) for c in ("value", "stderr", "n")}

    def text(i: int, value: Any) -> str:
        empty = value is None or value is pd.NA or value == "" or value != value
        return "" if empty else repr(float(value)) if i in numbers else str(value)

    lines = sorted("\x1f".join(text(i, v) for i, v in enumerate(row)) for row in rows)
    return hashlib.sha256("\x1e".join(lines).encode()).hexdigest()


def _row_key(row: tuple[Any, ...]) -> tuple[Any, ...]:
    at = dict(zip(MEASUREMENT_COLUMNS, row, strict=True))
    return (metric_key(at["metric"]), at["split"], str(at["kind"] or ""))


def measurements(runs: Runs) -> pd.DataFrame:
    """One row a measurement, with the columns MEASUREMENT_COLUMNS, in an order that the records alone decide.

    A metric without a number has the status "n/a: why" and an empty value; a failed run is one row with the
    metric `failed_runs` and the status "failed: why".
    """
    rows = [row for run in runs.runs for row in sorted(_rows(run), key=_row_key)]
    frame = pd.DataFrame(rows, columns=list(MEASUREMENT_COLUMNS))
    frame = frame.astype({"value": "float64", "stderr": "float64", "n": "Int64", "seed": "int64"})
    text = ["kind", "unit", "status", "split", "device", "commit"]
    frame[text] = frame[text].astype("string").fillna("").astype(object)
    return frame


def interval(values: Iterable[float]) -> tuple[float, float]:
    """95 % t-interval of the mean over seeds; (nan, nan) below three seeds or where a value is not finite."""
    x = [float(v) for v in values]
    if len(x) < MIN_SEEDS or not all(map(math.isfinite, x)):
        return math.nan, math.nan
    low, high = t_interval(x, LEVEL)
    return float(low), float(high)


def good_rows(frame: pd.DataFrame) -> pd.DataFrame:
    """The measurements that have a number and are not of a split that models learn from."""
    return frame[(frame["status"] == "ok") & frame["value"].notna() & ~frame["split"].isin(LEARNT_SPLITS)]


def mean(values: Sequence[float]) -> float:
    """The mean, summed without rounding in between, so that the order of the seeds cannot matter."""
    return math.fsum(values) / len(values)


def grouped(frame: pd.DataFrame) -> dict[tuple[str, str, str, str, str, str], list[tuple[int, float, str]]]:
    """(seed, value, run id) by (task, family, model, metric, kind, unit), of measurements that have a number."""
    out: dict[tuple[str, str, str, str, str, str], list[tuple[int, float, str]]] = {}
    rows = good_rows(frame)
    keys = zip(*(rows[c] for c in ("task", "family", "model", "metric", "kind", "unit")), strict=True)
    for key, seed, value, run_id in zip(keys, rows["seed"], rows["value"], rows["run_id"], strict=True):
        out.setdefault(key, []).append((int(seed), float(value), str(run_id)))
    return {key: sorted(out[key], key=lambda s: (s[0], s[2])) for key in sorted(out)}


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """One row a (task, model, metric, kind) with the mean over seeds and its 95 % t-interval.

    Only measurements with a number count. Where runs failed, a row `failed_runs` (kind exact, unit runs) holds
    their count as its mean, all seeds tried as `n_seeds` and the failed runs as `run_ids`.
    """
    rows: list[tuple[Any, ...]] = []
    for (task, family, model, metric, kind, unit), seeds in grouped(frame).items():
        values, ids = [value for _, value, _ in seeds], ";".join(run_id for *_, run_id in seeds)
        rows.append((task, model, family, metric, kind, unit, mean(values), *interval(values), len(values), ids))
    lost = frame[frame["metric"] == FAILED].sort_values(["seed", "run_id"])
    for task, model, family in sorted(set(zip(lost["task"], lost["model"], lost["family"], strict=True))):
        tried = frame.loc[(frame["task"] == task) & (frame["model"] == model), "run_id"].nunique()
        ids = lost.loc[(lost["task"] == task) & (lost["model"] == model), "run_id"]
        count = float(len(ids))
        rows.append((task, model, family, FAILED, "exact", "runs", count, math.nan, math.nan, tried, ";".join(ids)))
    rows.sort(key=lambda r: (task_key(r[0]), family_key(r[2]), r[1], metric_key(r[3]), r[4], r[5]))
    out = pd.DataFrame(rows, columns=list(SUMMARY_COLUMNS))
    return out.astype({"mean": "float64", "ci_low": "float64", "ci_high": "float64", "n_seeds": "int64"})


def write_measurements(frame: pd.DataFrame, path: Path) -> None:
    """Write measurements.csv; floats in the shortest form that reads back to the same bits."""
    frame.to_csv(path, index=False, lineterminator="\n", encoding="utf-8")


def write_summary(frame: pd.DataFrame, path: Path) -> None:
    """Write summary.csv; floats with ten significant digits, since t-quantiles differ in the last bits by library."""
    frame.to_csv(path, index=False, lineterminator="\n", encoding="utf-8", float_format="%.10g")


def _read(path: Path, columns: tuple[str, ...], floats: tuple[str, ...], integers: tuple[str, ...]) -> pd.DataFrame:
    """Read a CSV as text and turn the named columns into numbers: Python's float reads back the bits written."""
    try:
        frame = pd.read_csv(path, dtype=object, keep_default_na=False, encoding="utf-8")
        if tuple(frame.columns) != columns:
            raise ValueError(f"its columns are not {', '.join(columns)}")
        for name in floats:
            frame[name] = np.array([float(v) if v else math.nan for v in frame[name]], dtype=np.float64)
        for name in integers:
            frame[name] = pd.array([int(v) if v else pd.NA for v in frame[name]], dtype="Int64")
    except (OSError, ValueError) as error:
        raise ReportError(f"{path} cannot be read: {error}") from None
    return frame


def read_measurements(path: Path) -> pd.DataFrame:
    """Read what `write_measurements` wrote, bit for bit."""
    return _read(path, MEASUREMENT_COLUMNS, ("value", "stderr"), ("seed", "n")).astype({"seed": "int64"})


def read_summary(path: Path) -> pd.DataFrame:
    """Read what `write_summary` wrote."""
    return _read(path, SUMMARY_COLUMNS, ("mean", "ci_low", "ci_high"), ("n_seeds",)).astype({"n_seeds": "int64"})


def read_records(path: Path) -> list[dict[str, Any]]:
    """The lines of records.jsonl.

    Raises:
        ReportError: it cannot be read.
    """
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError, RecursionError) as error:
        raise ReportError(f"{path} cannot be read: {error}") from None
    if not all(isinstance(row, dict) and isinstance(row.get("spec"), dict) for row in rows):
        raise ReportError(f"{path} has a line that is no record")
    return rows


def record_problems(records: list[dict[str, Any]], frame: pd.DataFrame) -> list[str]:
    """Where records.jsonl and measurements.csv do not tell of the same runs, specs and numbers, one line a problem."""
    problems = []
    known: dict[str, tuple[Any, ...]] = {}
    for record in records:
        run_id, spec = str(record.get("run_id")), record.get("spec") or {}
        if canonical_hash(spec) != run_id:
            problems.append(f"records.jsonl: run {short(run_id)} is not the sha256 of its spec")
        known[run_id] = tuple(spec.get(k) for k in ("task", "model", "family", "seed"))
        failed = bool((frame.loc[frame["run_id"] == run_id, "metric"] == FAILED).any())
        if failed != ("error" in record):
            problems.append(f"records.jsonl and measurements.csv disagree on whether run {short(run_id)} failed")
    told = {str(r.get("run_id")): r.get("measurements_sha256") for r in records}
    for run_id, rows in frame[list(MEASUREMENT_COLUMNS)].groupby("run_id", sort=False):
        if run_id in told and rows_digest(rows.itertuples(index=False, name=None)) != told[str(run_id)]:
            problems.append(f"measurements.csv: the numbers of run {short(str(run_id))} are not those of its record")
    seen = frame[["run_id", "task", "model", "family", "seed"]].drop_duplicates()
    for run_id, *names in seen.itertuples(index=False, name=None):
        if run_id not in known:
            problems.append(f"measurements.csv: run {short(run_id)} has no record")
        elif tuple(names) != known[run_id]:
            problems.append(f"measurements.csv: run {short(run_id)} is {names}, its record says {list(known[run_id])}")
    lost = sorted(set(known) - set(frame["run_id"]))
    return problems + [f"records.jsonl: run {short(run_id)} has no measurements" for run_id in lost]
