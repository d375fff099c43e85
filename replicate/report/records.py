"""Run records in, two tables out: one row per measurement, and one row per number with its interval over seeds.

The report computes everything from these two tables and the runs' own histories and arrays.
"""

from __future__ import annotations

import hashlib
import json
import math
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from replicate.errors import RecordError, ReportError
from replicate.metrics.intervals import FEWEST, t_interval
from replicate.report.labels import family_key, metric_key, short, task_key
from replicate.runs.record import parse_failure, parse_record
from replicate.runs.spec import spec_hash

MEASUREMENT_COLUMNS = (
    *("run_id", "task", "model", "family", "seed", "split", "metric"),
    *("value", "stderr", "kind", "unit", "n", "status", "device", "commit"),
)
SUMMARY_COLUMNS = (
    *("task", "model", "family", "metric", "kind", "unit"),
    *("mean", "ci_low", "ci_high", "n_seeds", "run_ids"),
)
#: the metric of a run without a record in the measurements, and of their count in the summary
FAILED = "failed_runs"
#: nominal coverage of every interval in the report
LEVEL = 0.95
#: splits that models learn from: their numbers are in measurements.csv and in no summary
LEARNT_SPLITS = ("train", "valid")


def commit_of(provenance: Mapping[str, Any]) -> str:
    """Return the commit that a run was computed at, with "-dirty" where the tree had changes."""
    commit = str(provenance.get("commit") or "")
    known = commit not in ("", "unknown")
    return f"{commit}-dirty" if known and provenance.get("dirty") else commit


@dataclass(frozen=True)
class RecordedRun:
    """One run as its folder, or a results folder, records it: by default a model of the comparison.

    Attributes:
        run_id: sha256 of the canonical spec.
        spec: the specification (model, task, family, seed, settings).
        folder: of arrays.npz, if there is one; None for a run that a results folder records (`kept_runs`).
        measurements: rows as dictionaries; empty for a failed run.
        history: losses by step; empty for a failed run.
        provenance: commit, device, versions, times.
        about, paper: the model in one line, and its source.
        error, traceback_tail: why a failed run failed; "" for a whole one.
        weights_sha256: of a trained model's safetensors; "" for an experiment.
        plots: an experiment's plots; None where the results folder that records the run did not keep them.
        examples: packed log p of every test example, by task.
        classifiers: sha256 of the weights of each classifier whose features judged samples, by task.
    """

    run_id: str
    spec: Mapping[str, Any]
    folder: Path | None = None
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
    def compared(self) -> bool:
        """Whether the tables compare it with other models; else it is a run of a paper's experiment.

        An experiment's model is the paper's key, its task the experiment's name.
        """
        return self.spec.get("kind") != "experiment"

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
        return commit_of(self.provenance)

    @property
    def label(self) -> str:
        """The name of what it trained, which a paper's key does not identify, among all that were trained on a task."""
        return self.model if self.compared else self.task

    def agreement(self) -> dict[tuple[Any, ...], Any]:
        """Return the parts of its spec that all runs of the results, of a task, and of a task's seed must share."""
        shared: dict[tuple[Any, ...], Any] = {(k,): self.spec.get(k) for k in ("profile", "results_version")}
        if self.compared:
            shared["evaluation", self.task] = self.spec.get("evaluation")
            shared["data_sha256", self.task, self.seed] = self.spec.get("data_sha256")
        return shared

    @property
    def arrays_file(self) -> Path | None:
        """The file of its arrays; None where it kept none."""
        path = self.folder / "arrays.npz" if self.folder is not None else None
        return path if path is not None and path.exists() else None

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the run's arrays by name; none where it kept none.

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
        """Return one line of records.jsonl: the run without its measurements and arrays."""
        head = {"run_id": self.run_id, "spec": dict(self.spec), "measurements_sha256": rows_digest(_rows(self))}
        if self.failed:
            return {**head, "error": self.error, "traceback_tail": self.traceback_tail}
        common = {"provenance": dict(self.provenance), "about": self.about, "paper": self.paper}
        trained = {"weights_sha256": self.weights_sha256, "history": dict(self.history)} if self.compared else {}
        plots = [] if self.compared else list(self.plots or ())
        optional = {"examples": dict(self.examples), "classifiers": dict(self.classifiers), "plots": plots}
        return {**head, **common, **trained, **{k: v for k, v in optional.items() if v}}


def recorded_line(line: Mapping[str, Any], measurements: tuple[Mapping[str, Any], ...] = ()) -> RecordedRun:
    """Return the run that a line of records.jsonl describes; its fields have the same names."""
    given = {f.name: line[f.name] for f in fields(RecordedRun) if f.name in line}
    plots = tuple(line["plots"]) if "plots" in line else None
    own = {"run_id": str(line.get("run_id")), "folder": None, "measurements": measurements, "plots": plots}
    return RecordedRun(**{**given, **own})


@dataclass(frozen=True)
class RecordedRuns:
    """All runs of one report, sorted by task, family, model and seed."""

    runs: tuple[RecordedRun, ...]

    @staticmethod
    def of(runs: Iterable[RecordedRun]) -> RecordedRuns:
        """Sort runs in any order."""
        return RecordedRuns(
            tuple(sorted(runs, key=lambda r: (task_key(r.task), family_key(r.family), r.model, r.seed, r.run_id)))
        )

    @property
    def done(self) -> tuple[RecordedRun, ...]:
        """The runs with a record."""
        return tuple(r for r in self.runs if not r.failed)

    @property
    def failed(self) -> tuple[RecordedRun, ...]:
        """The runs with a failure instead of a record."""
        return tuple(r for r in self.runs if r.failed)

    @property
    def comparison(self) -> RecordedRuns:
        """The runs of models, without the papers' experiments."""
        return RecordedRuns(tuple(r for r in self.runs if r.compared))


def _read_run(path: Path) -> RecordedRun:
    parse = parse_failure if path.name == "failure.json" else parse_record
    try:
        data = parse(path.read_bytes())
    except (OSError, RecordError) as error:
        why = "; ".join(str(error).splitlines())
        raise ReportError(f"{path} is not a whole record ({why}); delete its folder and run again") from None
    run = recorded_line(data, tuple(data.get("measurements", ())))
    return replace(run, folder=path.parent, plots=run.plots or ())


def load_runs(folder: Path, keep: Iterable[str] | None = None) -> RecordedRuns:
    """Return every finished or failed run below a folder, and skip unfinished work.

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
    for place in sorted(p for p in folder.iterdir() if p.is_dir() and (wanted is None or p.name in wanted)):
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
    return RecordedRuns.of(runs)


def _rows(run: RecordedRun) -> Iterable[tuple[Any, ...]]:
    head = (run.run_id, run.task, run.model, run.family, run.seed)
    tail = (str(run.provenance.get("device") or ""), run.commit)
    if run.failed:
        yield (*head, "", FAILED, None, None, None, None, None, f"failed: {' '.join(run.error.split())}", *tail)
    for m in run.measurements:
        numbers = tuple(m.get(k) for k in ("value", "stderr", "kind", "unit", "n"))
        yield (*head, m.get("split") or "", m["metric"], *numbers, m.get("status") or "ok", *tail)


def rows_digest(rows: Iterable[tuple[Any, ...]]) -> str:
    """Return the sha256 of a run's rows of measurements.csv, in any order: it ties records.jsonl to the numbers."""
    numbers = {MEASUREMENT_COLUMNS.index(c) for c in ("value", "stderr", "n")}

    def text(i: int, value: Any) -> str:
        empty = value is None or value is pd.NA or value == "" or value != value
        return "" if empty else repr(float(value)) if i in numbers else str(value)

    lines = sorted("\x1f".join(text(i, v) for i, v in enumerate(row)) for row in rows)
    return hashlib.sha256("\x1e".join(lines).encode()).hexdigest()


def _row_key(row: tuple[Any, ...]) -> tuple[Any, ...]:
    at = dict(zip(MEASUREMENT_COLUMNS, row, strict=True))
    return (metric_key(at["metric"]), at["split"], str(at["kind"] or ""))


def measurements(runs: RecordedRuns) -> pd.DataFrame:
    """Return one row per measurement, with MEASUREMENT_COLUMNS, in an order that the records alone decide.

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
    """Return the 95 % t-interval of the mean over seeds; (nan, nan) below three seeds or where one is not finite."""
    x = [float(v) for v in values]
    if len(x) < FEWEST or not all(map(math.isfinite, x)):
        return math.nan, math.nan
    low, high = t_interval(x, LEVEL)
    return float(low), float(high)


def good_rows(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the measurements that have a number and are not of a split that models learn from."""
    return frame[(frame["status"] == "ok") & frame["value"].notna() & ~frame["split"].isin(LEARNT_SPLITS)]


def mean(values: Sequence[float]) -> float:
    """Return the mean, summed without rounding in between, so that the order of the seeds cannot matter."""
    return math.fsum(values) / len(values)


def grouped(frame: pd.DataFrame) -> dict[tuple[str, str, str, str, str, str], list[tuple[int, float, str]]]:
    """Return (seed, value, run id) by (task, family, model, metric, kind, unit), of measurements with a number."""
    out: dict[tuple[str, str, str, str, str, str], list[tuple[int, float, str]]] = {}
    rows = good_rows(frame)
    keys = zip(*(rows[c] for c in ("task", "family", "model", "metric", "kind", "unit")), strict=True)
    for key, seed, value, run_id in zip(keys, rows["seed"], rows["value"], rows["run_id"], strict=True):
        out.setdefault(key, []).append((int(seed), float(value), str(run_id)))
    return {key: sorted(out[key], key=lambda s: (s[0], s[2])) for key in sorted(out)}


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """Return one row per (task, model, metric, kind) with the mean over seeds and its 95 % t-interval.

    Only measurements with a number count. Where runs failed, a row `failed_runs` (kind exact, unit runs) holds
    their count as its mean, all tried seeds as `n_seeds` and the failed runs as `run_ids`.
    """
    rows: list[tuple[Any, ...]] = []
    for (task, family, model, metric, kind, unit), seeds in grouped(frame).items():
        values, ids = [value for _, value, _ in seeds], ";".join(run_id for *_, run_id in seeds)
        rows.append((task, model, family, metric, kind, unit, mean(values), *interval(values), len(values), ids))
    lost = frame[frame["metric"] == FAILED].sort_values(["seed", "run_id"])
    for (task, model, family), ids in lost.groupby(["task", "model", "family"])["run_id"]:
        tried = frame.loc[(frame["task"] == task) & (frame["model"] == model), "run_id"].nunique()
        numbers = (float(len(ids)), math.nan, math.nan)
        rows.append((task, model, family, FAILED, "exact", "runs", *numbers, tried, ";".join(ids)))
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
    """Read the lines of records.jsonl.

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
    """List where records.jsonl and measurements.csv disagree on runs, specs or numbers, one line per problem."""
    problems = []
    names = ("task", "model", "family", "seed")
    known = {str(r.get("run_id")): r for r in records}
    lost = set(frame.loc[frame["metric"] == FAILED, "run_id"])
    for record in records:
        run_id = str(record.get("run_id"))
        if spec_hash(record["spec"]) != run_id:
            problems.append(f"records.jsonl: run {short(run_id)} is not the sha256 of its spec")
        if (run_id in lost) != ("error" in record):
            problems.append(f"records.jsonl and measurements.csv disagree on whether run {short(run_id)} failed")
    for run_id, rows in frame[list(MEASUREMENT_COLUMNS)].groupby("run_id", sort=False):
        given = known.get(str(run_id))
        if given and given.get("measurements_sha256") != rows_digest(rows.itertuples(index=False, name=None)):
            problems.append(f"measurements.csv: the numbers of run {short(str(run_id))} are not those of its record")
    for run_id, *found in frame[["run_id", *names]].drop_duplicates().itertuples(index=False, name=None):
        if run_id not in known:
            problems.append(f"measurements.csv: run {short(run_id)} has no record")
        elif found != (said := [known[run_id]["spec"].get(k) for k in names]):
            problems.append(f"measurements.csv: run {short(run_id)} is {found}, its record says {said}")
    missing = sorted(set(known) - set(frame["run_id"]))
    return problems + [f"records.jsonl: run {short(run_id)} has no measurements" for run_id in missing]
