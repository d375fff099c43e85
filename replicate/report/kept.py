"""What a results folder keeps of its runs, so that other runs can join them and its report be written again.

Measurements and records are kept whole. What a comparison's pictures are drawn from, samples and grids, is not: such a
figure is carried over as it is, with its texts from figures.json, as long as the runs that it shows are kept.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from replicate.errors import ReportError
from replicate.report.drawing import ENDINGS, Drawing
from replicate.report.page import Shown
from replicate.report.records import FAILED, Run, Runs, read_measurements, read_records, record_problems
from replicate.validation import NAME, Problems, Rule, brief, check_table, check_value

#: the texts of every figure, and the runs whose arrays or plots it shows
INDEX = "figures.json"
#: what stands in a line of records.jsonl under the name that it has in a Run
_SAME = frozenset(
    {
        *("run_id", "spec", "provenance", "about", "paper", "error", "traceback_tail"),
        *("weights_sha256", "history", "examples", "classifiers"),
    }
)
#: names are those of files that are copied
_NAME = Rule(str, pattern=NAME)
_ENTRY = {
    "title": Rule(str),
    "caption": Rule(str),
    "also": Rule(tuple[str, ...]),
    "runs": Rule(tuple[str, ...]),
}
_COLUMNS = ["split", "metric", "value", "stderr", "kind", "unit", "n", "status"]


def kept_runs(folder: Path, ids: Iterable[str] | None = None) -> Runs:
    """The runs that a results folder tells of, whole but for their arrays; none where there are no results.

    Args:
        folder: results/PROFILE.
        ids: of the runs wanted; all by default.

    Raises:
        ReportError: measurements.csv or records.jsonl cannot be read, or they disagree.
    """
    wanted = None if ids is None else set(ids)
    if wanted == set() or not (folder / "records.jsonl").exists():
        return Runs(())
    frame, records = read_measurements(folder / "measurements.csv"), read_records(folder / "records.jsonl")
    if problems := record_problems(records, frame):  # they would be written anew as if they were right
        raise ReportError(f"{folder} disagrees with itself: {problems[0]}; `replicate verify` tells all")
    told = frame[frame["metric"] != FAILED].groupby("run_id", sort=False)
    rows = {str(run_id): tuple(_as_in_record(group)) for run_id, group in told}
    runs = []
    for line in records:
        if wanted is not None and line["run_id"] not in wanted:
            continue
        same = {k: v for k, v in line.items() if k in _SAME}
        plots = tuple(line["plots"]) if "plots" in line else None
        runs.append(Run(**same, folder=None, measurements=rows.get(line["run_id"], ()), plots=plots))
    return Runs(tuple(sorted(runs, key=Run.sort_key)))


def _as_in_record(rows: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """Rows of measurements.csv as a record has them: None for what a CSV leaves empty."""
    for row in rows[_COLUMNS].itertuples(index=False, name=None):
        yield {k: None if pd.isna(v) or v == "" else v for k, v in zip(_COLUMNS, row, strict=True)}


def joined(new: Runs, earlier: Runs) -> Runs:
    """The runs of both; of two of one model, task and seed the new one, unless that alone failed.

    Raises:
        ReportError: a new run was measured in another way than its neighbours, so that no table can have both.
    """
    told = {key: run for run in earlier.runs for key in _measured(run)}
    for run in new.runs:
        for key, value in _measured(run).items():
            if key in told and _measured(told[key])[key] != value:
                raise ReportError(
                    f"{run.model} on {run.task}, seed {run.seed}, cannot join {told[key].model} there: its {key[0]} is "
                    "another; run it with the profile and the data of these results"
                )
    out = {(r.task, r.model, r.seed): r for r in earlier.runs}
    for run in new.runs:
        before = out.get((run.task, run.model, run.seed))
        if not (run.failed and before is not None and not before.failed):
            out[(run.task, run.model, run.seed)] = run
    return Runs(tuple(sorted(out.values(), key=Run.sort_key)))


def write_index(drawings: Iterable[Drawing], carried: dict[str, Any], folder: Path) -> None:
    """Write figures.json: title, caption, further CSV files and runs of every figure by name."""
    index = {
        **carried,
        **{d.name: {"title": d.title, "caption": d.caption, "also": d.also, "runs": d.runs} for d in drawings},
    }
    text = json.dumps(index, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    (folder / INDEX).write_text(text, encoding="utf-8", newline="\n")


def read_index(folder: Path) -> dict[str, Any]:
    """What figures.json says.

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


def carried(earlier: Path, runs: Runs, drawn: Iterable[str]) -> dict[str, Any]:
    """Entries of the figures of an earlier report that cannot be drawn again and whose runs all stand in this one.

    Raises:
        ReportError: there is a kept run, and figures.json cannot be read.
    """
    kept = {r.run_id for r in runs.done if r.folder is None}
    if not kept:
        return {}
    known = set(drawn)
    return {
        name: entry
        for name, entry in read_index(earlier).items()
        if name not in known and entry["runs"] and kept.issuperset(entry["runs"])
    }


def carry(name: str, entry: dict[str, Any], runs: Runs, earlier: Path, folder: Path) -> Shown:
    """Copy a figure's files from an earlier report; its caption says which runs came after it was drawn."""
    for ending in ENDINGS:
        shutil.copyfile(earlier / "figures" / f"{name}.{ending}", folder / f"{name}.{ending}")
    shows = set(entry["runs"])
    groups = {r.group for r in runs.done if r.run_id in shows}
    later = [r for r in runs.done if r.group in groups and r.run_id not in shows]
    note = f" Drawn before {_named(later)} joined." if later else ""
    png = (folder / f"{name}.png").read_bytes()
    return Shown(name, entry["title"], entry["caption"] + note, png, tuple(entry["also"]))


def _measured(run: Run) -> dict[tuple[Any, ...], Any]:
    """What of a run's spec must be the same in all runs of the results, of a task, and of a task's seed."""
    spec = run.spec
    common = {(k,): spec.get(k) for k in ("profile", "results_version")}
    if run.is_experiment:
        return common
    return {
        **common,
        ("evaluation", run.task): spec.get("evaluation"),
        ("data_sha256", run.task, run.seed): spec.get("data_sha256"),
    }


def _named(runs: Sequence[Run]) -> str:
    experiments = all(r.is_experiment for r in runs)
    return ", ".join(sorted({f"seed {r.seed}" if experiments else r.model for r in runs}))
