"""A results folder is enough to write its report again, and to add other runs to it.

It keeps measurements and records whole, and not the samples and grids that the pictures of a comparison show. Such a
figure is carried over as it is, with its texts from figures.json, as long as the runs that it shows are kept.
"""

import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from replicate.errors import ReportError
from replicate.report.drawing import ENDINGS, Figure
from replicate.report.records import (
    FAILED,
    RecordedRun,
    RecordedRuns,
    read_measurements,
    read_records,
    record_problems,
    recorded_line,
)
from replicate.validation import NAME, Problems, Rule, brief, check_table, check_value

#: the texts of every figure, and the runs whose arrays or plots it shows
INDEX = "figures.json"
#: figures are files that are copied
_NAME = Rule(str, pattern=NAME)
_ENTRY = {**dict.fromkeys(("title", "caption"), Rule(str)), **dict.fromkeys(("also", "runs"), Rule(tuple[str, ...]))}
_COLUMNS = ["split", "metric", "value", "stderr", "kind", "unit", "n", "status"]


def kept_runs(folder: Path, ids: Iterable[str] | None = None) -> RecordedRuns:
    """Return the runs that a results folder records, whole but for their arrays; none where there are no results.

    Args:
        folder: results/PROFILE.
        ids: of the runs wanted; all by default.

    Raises:
        ReportError: measurements.csv or records.jsonl cannot be read, or they disagree.
    """
    wanted = None if ids is None else set(ids)
    if wanted == set() or not (folder / "records.jsonl").exists():
        return RecordedRuns(())
    frame, records = read_measurements(folder / "measurements.csv"), read_records(folder / "records.jsonl")
    if problems := record_problems(records, frame):  # a new report would make them look right
        raise ReportError(f"{folder} disagrees with itself: {problems[0]}; `replicate verify` lists every problem")
    found = frame[frame["metric"] != FAILED].groupby("run_id", sort=False)
    rows = {str(run_id): tuple(_as_in_record(group)) for run_id, group in found}
    lines = (line for line in records if wanted is None or line["run_id"] in wanted)
    return RecordedRuns.of(recorded_line(line, rows.get(line["run_id"], ())) for line in lines)


def _as_in_record(rows: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """Return rows of measurements.csv as a record has them: None for what a CSV leaves empty."""
    for row in rows[_COLUMNS].itertuples(index=False, name=None):
        yield {k: None if pd.isna(v) or v == "" else v for k, v in zip(_COLUMNS, row, strict=True)}


def combined(new: RecordedRuns, earlier: RecordedRuns) -> RecordedRuns:
    """Add new runs to earlier ones; of two runs of one model, task and seed keep the new one, unless only it failed.

    Raises:
        ReportError: the spec of a new run differs from its neighbours', so that no table can have both.
    """
    settings = {key: (run.model, value) for run in earlier.runs for key, value in run.agreement().items()}
    for run in new.runs:
        for key, value in run.agreement().items():
            other, theirs = settings.get(key, ("", value))
            if theirs != value:
                raise ReportError(
                    f"{run.model} on {run.task}, seed {run.seed}, cannot be added to {other} there: its {key[0]} "
                    "differs; run it with the profile and the data of these results"
                )
    out = {(r.task, r.model, r.seed): r for r in earlier.runs}
    for run in new.runs:
        before = out.get((run.task, run.model, run.seed))
        if not (run.failed and before is not None and not before.failed):
            out[(run.task, run.model, run.seed)] = run
    return RecordedRuns.of(out.values())


def write_index(figures: Iterable[Figure], carried: dict[str, Any], folder: Path) -> None:
    """Write figures.json: title, caption, further CSV files and runs of every figure by name."""
    index = carried | {f.name: {key: getattr(f, key) for key in _ENTRY} for f in figures}
    text = json.dumps(index, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    (folder / INDEX).write_text(text, encoding="utf-8", newline="\n")


def read_index(folder: Path) -> dict[str, Any]:
    """Read figures.json.

    Raises:
        ReportError: it cannot be read.
    """
    path = folder / INDEX
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ReportError(f"{path} cannot be read: {error}") from None
    problems = Problems()
    if not isinstance(found, dict):
        problems.add(f"{path} is {brief(found)}; it must be a table")
        found = {}
    for name, entry in found.items():
        check_value("name", name, _NAME, lambda _, problem: problems.add(problem), str(path))
        check_table(entry, _ENTRY, f"{brief(name)} in {path}", lambda _, problem: problems.add(problem))
    problems.refuse(ReportError)
    return found


def carried(earlier: Path, runs: RecordedRuns, drawn: Iterable[str]) -> dict[str, Any]:
    """Return the entries of an earlier report's figures that cannot be drawn again and whose runs are all in this one.

    Raises:
        ReportError: there is a kept run, and figures.json cannot be read.
    """
    kept = {r.run_id for r in runs.done if r.folder is None}
    index, known = read_index(earlier) if kept else {}, set(drawn)
    fit = (name for name, entry in index.items() if entry["runs"] and kept.issuperset(entry["runs"]))
    return {name: index[name] for name in fit if name not in known}


def carry(name: str, entry: dict[str, Any], runs: RecordedRuns, earlier: Path, folder: Path) -> Figure:
    """Copy a figure's files from an earlier report; its caption names the runs that are newer than the figure."""
    for ending in ENDINGS:
        shutil.copyfile(earlier / "figures" / f"{name}.{ending}", folder / f"{name}.{ending}")
    shows = set(entry["runs"])
    subjects = {_subject(r) for r in runs.done if r.run_id in shows}
    newer = [r for r in runs.done if _subject(r) in subjects and r.run_id not in shows]
    later = {r.model if r.compared else f"seed {r.seed}" for r in newer}
    note = f" Drawn before {', '.join(sorted(later))} joined." if later else ""
    png = (folder / f"{name}.png").read_bytes()
    return Figure(name, entry["title"], entry["caption"] + note, also=tuple(entry["also"]), png=png)


def _subject(run: RecordedRun) -> tuple[str, str]:
    """Return what a run's pictures show: every model of a task, or every seed of an experiment."""
    return run.task, "" if run.compared else run.model
