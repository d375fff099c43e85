"""From a folder of runs to results/PROFILE, and the check that such a folder still agrees with itself.

`build` is a pure function of the records: the same records give the same bytes. It writes beside the results first
and moves files into place when all are there, so that a failure half-way leaves the earlier results whole.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from replicate.errors import ReportError
from replicate.ledger.tables import Claims
from replicate.report import ledger as claims_ledger
from replicate.report.drawing import Drawing, save, style
from replicate.report.figures import all_figures
from replicate.report.kept import carried, carry, joined, kept_runs, read_index, write_index
from replicate.report.labels import TIMING_METRICS, short
from replicate.report.ledger import Plain
from replicate.report.page import Shown, render
from replicate.report.pairs import paired_table
from replicate.report.plots import experiment_drawings
from replicate.report.records import (
    SUMMARY_COLUMNS,
    Run,
    Runs,
    load_runs,
    measurements,
    read_measurements,
    read_records,
    read_summary,
    record_problems,
    summary,
    write_measurements,
    write_summary,
)
from replicate.report.tables import Results, Table, all_tables, to_csv, to_latex, to_markdown
from replicate.runs.orphan import die_with_parent

__all__ = ["MANIFEST", "TIMING_METRICS", "build", "remarks", "verify", "write_manifest"]

MANIFEST = "MANIFEST.json"
#: folders whose earlier files are ours to remove
OWNED = ("tables", "figures")
#: numbers of summary.csv must be recomputed to this relative precision: they are written with ten digits
PRECISION = 1e-8


def sha256(path: Path) -> str:
    """sha256 of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def results_files(folder: Path) -> list[str]:
    """Every file below a results folder but the manifest, as sorted relative paths with forward slashes."""
    files = (p for p in folder.rglob("*") if p.is_file() and p != folder / MANIFEST)
    return sorted(p.relative_to(folder).as_posix() for p in files)


def write_manifest(folder: Path) -> Path:
    """Write MANIFEST.json with the sha256 of every other file below a results folder."""
    digests = {name: sha256(folder / name) for name in results_files(folder)}
    path = folder / MANIFEST
    path.write_text(json.dumps(digests, indent=1, sort_keys=True) + "\n", encoding="utf-8", newline="\n")
    return path


def _write_records(runs: Runs, path: Path) -> None:
    lines = (json.dumps(run.as_record(), sort_keys=True, allow_nan=False) for run in runs.runs)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8", newline="\n")


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")


def _write_all(runs: Runs, profile: str, folder: Path, claims: Claims, earlier: Path) -> None:
    frame = measurements(runs)
    compared = measurements(runs.comparison)
    results, totals = Results(compared), summary(compared)
    write_measurements(frame, folder / "measurements.csv")
    write_summary(summary(frame), folder / "summary.csv")
    _write_records(runs, folder / "records.jsonl")
    judged = claims_ledger.entries(claims.papers, frame, profile)
    if judged:
        _write(folder / "claims.csv", claims_ledger.to_csv(judged, profile))
    tables = all_tables(results)
    plain = _plain(frame, [run.as_record() for run in runs.runs], claims, profile)
    (folder / "tables").mkdir()
    for name, text in _table_texts(tables, judged, plain).items():
        _write(folder / "tables" / name, text)
    with style():
        drawings = [*all_figures(results, runs.comparison), *experiment_drawings(runs.runs)]
        shown = _saved(drawings, folder / "figures")
    old = carried(earlier, runs, [d.name for d in drawings])
    shown += [carry(name, entry, runs, earlier, folder / "figures") for name, entry in old.items()]
    write_index(drawings, old, folder)
    _write(folder / "report.html", render(runs, results, totals, tables, shown, profile, judged, plain))


def _plain(frame: pd.DataFrame, records: list[dict[str, Any]], claims: Claims, profile: str) -> list[Plain]:
    """The tables of print beside our numbers, and that of models paired by test example."""
    pairs = paired_table(records)
    return [*claims_ledger.filled_tables(claims.tables, frame, claims.papers, profile), *([pairs] if pairs else [])]


def _table_texts(tables: list[Table], judged: list[claims_ledger.Entry], plain: list[Plain]) -> dict[str, str]:
    """The text of every file in tables/, by name."""
    out = {}
    for table in tables:
        for ending, write in (("csv", to_csv), ("md", to_markdown), ("tex", to_latex)):
            out[f"{table.name}.{ending}"] = write(table)
    for text in [claims_ledger.ledger_table(judged), *plain] if judged else plain:
        out |= {f"{text.name}.csv": text.csv(), f"{text.name}.md": text.markdown(), f"{text.name}.tex": text.latex()}
    return out


#: drawings that forked workers inherit: figures are costly to send
_DRAWINGS: list[Drawing] = []


def _save_one(index: int, folder: Path) -> bytes:
    return save(_DRAWINGS[index], folder)


def _saved(drawings: list[Drawing], folder: Path) -> list[Shown]:
    """Write every figure, side by side on the cores there are; a figure's bytes depend on it alone."""
    workers = min(len(os.sched_getaffinity(0)), len(drawings))
    if workers < 2 or "fork" not in multiprocessing.get_all_start_methods():
        return [Shown.of(d, save(d, folder)) for d in drawings]
    _DRAWINGS[:] = drawings
    try:
        with ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), die_with_parent) as pool:
            pngs = list(pool.map(_save_one, range(len(drawings)), repeat(folder)))
    finally:
        _DRAWINGS.clear()
    return [Shown.of(d, png) for d, png in zip(drawings, pngs, strict=True)]


def build(
    runs_folder: Path,
    out_folder: Path,
    profile: str,
    run_ids: Iterable[str] | None = None,
    claims: Claims = Claims(),
    keep: Iterable[str] | None = (),
) -> Path:
    """Write measurements, summary, records, tables, figures, report and manifest of a folder of runs.

    Other files in the results folder stay and enter the manifest; earlier tables and figures that are no longer made
    are removed.

    Args:
        runs_folder: its sub-folders are runs.
        out_folder: results/PROFILE; made if missing.
        profile: named in the report.
        run_ids: the runs to report on; all in the folder by default.
        claims: judged on these runs; without any there is no ledger.
        keep: ids of runs that the results folder tells of and that stay in it, None for all; the others join them.

    Returns:
        The path of report.html.

    Raises:
        ReportError: there are no runs, or one cannot be read.
    """
    earlier = kept_runs(out_folder, keep)
    new = Runs(()) if earlier.runs and not runs_folder.is_dir() else load_runs(runs_folder, run_ids)
    runs = joined(new, earlier)
    if not runs.runs:
        raise ReportError(f"there are no finished runs in {runs_folder}; `replicate reproduce` makes them")
    out_folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out_folder.name}.", dir=out_folder.resolve().parent) as temporary:
        fresh = Path(temporary)
        _write_all(runs, profile, fresh, claims, out_folder)
        if not claims.papers:
            (out_folder / "claims.csv").unlink(missing_ok=True)
        for name in OWNED:
            shutil.rmtree(out_folder / name, ignore_errors=True)
        for name in results_files(fresh):
            target = out_folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(fresh / name, target)
    write_manifest(out_folder)
    return out_folder / "report.html"


# -- the check


def verify(out_folder: Path, claims: Claims = Claims()) -> list[str]:
    """What is wrong with a results folder, one line a problem; an empty list where everything agrees.

    Checks that every file is the one that the manifest names, that summary.csv follows from measurements.csv, that
    every run id is the sha256 of its spec, that measurements and records speak of the same runs and numbers, that
    every verdict follows from claims.csv and measurements.csv alone, that every record says where and with what it was
    made, and, where all that agrees, that every table is the one that the measurements give.

    Args:
        claims: where given, claims.csv must also judge what they state, and the ledger's tables are checked too.
    """
    problems = _manifest_problems(out_folder)
    try:
        frame = read_measurements(out_folder / "measurements.csv")
        records = read_records(out_folder / "records.jsonl")
        problems += _summary_problems(summary(frame), read_summary(out_folder / "summary.csv"))
        if claims.papers or (out_folder / "claims.csv").exists():
            rows = claims_ledger.read_claims_csv(out_folder / "claims.csv")
            problems += claims_ledger.problems(rows, frame)
            problems += claims_ledger.definition_problems(rows, claims.papers) if claims.papers else []
    except ReportError as error:
        return [*problems, str(error)]
    problems += record_problems(records, frame) + _provenance_problems(records, frame)
    problems += _figure_problems(out_folder, {str(r.get("run_id")) for r in records})
    return problems or _table_problems(out_folder, frame, records, claims)


def remarks(out_folder: Path) -> list[str]:
    """What a reader of a results folder should know although nothing in it is wrong, one line each.

    Results that were just made from a changed working tree are of this kind: they agree with themselves, and the commit
    they name does not give them back.

    Raises:
        ReportError: records.jsonl cannot be read.
    """
    done = [_provenance(r) for r in read_records(out_folder / "records.jsonl") if "error" not in r]
    counts = {
        "were made with uncommitted changes: the commit that they name does not give them back": sum(
            p.get("dirty") not in ("", None, "unknown") for p in done
        ),
        "were made outside a repository and name no commit": sum(
            p.get("commit") in ("", None, "unknown") for p in done
        ),
        "were made before records named their libraries and kernels in full": sum("format" not in p for p in done),
    }
    return [f"{n} of {len(done)} runs {what}" for what, n in counts.items() if n]


def _table_problems(folder: Path, frame: pd.DataFrame, records: list[dict[str, Any]], claims: Claims) -> list[str]:
    experiments = {r["run_id"] for r in records if r["spec"].get("kind") == "experiment"}
    judged: list[claims_ledger.Entry] = []
    profile = ""  # of claims, where there are any
    if claims.papers:
        profile = claims_ledger.read_claims_csv(folder / "claims.csv")[0]["profile"]
        judged = claims_ledger.entries(claims.papers, frame, profile)
    plain = _plain(frame, records, claims, profile)
    right = _table_texts(all_tables(Results(frame[~frame["run_id"].isin(experiments)])), judged, plain)
    return [
        f"tables/{name} is not the table that the measurements give"
        for name, text in right.items()
        if not (folder / "tables" / name).exists() or (folder / "tables" / name).read_text(encoding="utf-8") != text
    ]


def _manifest_problems(folder: Path) -> list[str]:
    try:
        named = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        digests = {str(k): str(v) for k, v in named.items()}
    except (OSError, ValueError, AttributeError) as error:
        return [f"{folder / MANIFEST} cannot be read: {error}"]
    there = set(results_files(folder))
    problems = [f"{name} is in the manifest and not in the folder" for name in sorted(set(digests) - there)]
    problems += [f"{name} is in the folder and not in the manifest" for name in sorted(there - set(digests))]
    changed = (name for name in sorted(there & set(digests)) if sha256(folder / name) != digests[name])
    return problems + [f"{name} is not the file that the manifest names: its sha256 differs" for name in changed]


def _summary_problems(computed: pd.DataFrame, written: pd.DataFrame) -> list[str]:
    right, found = _by_key(computed), _by_key(written)
    problems = [] if len(found) == len(written) else ["summary.csv has the same row twice"]
    for key in dict.fromkeys([*right, *found]):
        name = f"summary.csv: {key[0]} / {key[1]} / {key[3]}"
        if key not in found or key not in right:
            where = "summary.csv" if key not in found else "measurements.csv"
            problems.append(f"{name} ({key[4]}) is missing from {where}")
            continue
        for column, a, b in zip(SUMMARY_COLUMNS[len(key) :], right[key], found[key], strict=True):
            if not _agree(a, b):
                problems.append(f"{name}: {column} is {b}, measurements.csv gives {a}")
    return problems


def _by_key(frame: pd.DataFrame) -> dict[tuple[Any, ...], tuple[Any, ...]]:
    """The numbers of each row of a summary by its six names."""
    return {row[:6]: row[6:] for row in frame[list(SUMMARY_COLUMNS)].itertuples(index=False, name=None)}


def _agree(a: Any, b: Any) -> bool:
    if isinstance(a, float):
        return bool(np.isclose(a, float(b), rtol=PRECISION, atol=1e-300, equal_nan=True))
    return bool(a == b)


def _figure_problems(folder: Path, known: set[str]) -> list[str]:
    """Figures without texts, texts without a figure, and figures of runs that have no record."""
    try:
        index = read_index(folder)
    except ReportError as error:
        return [str(error)]
    there = {p.stem for p in (folder / "figures").glob("*.png")}
    problems = [f"figures.json has no entry for {name}" for name in sorted(there - set(index))]
    problems += [f"figures.json names {name}, which is not in figures" for name in sorted(set(index) - there)]
    strange = (name for name, entry in sorted(index.items()) if not known.issuperset(entry["runs"]))
    return problems + [f"figures.json: {name} shows a run that has no record" for name in strange]


#: what the provenance of a record says: the code, the libraries, the machine, the settings of the kernels, the times
PROVENANCE = frozenset(
    {
        *("format", "commit", "dirty", "source_sha256", "lock_sha256"),
        *("libraries", "torch", "python", "libc", "platform", "driver", "cuda", "cudnn"),
        *("device", "cpu_model", "cpu_capability", "threads", "blas_threads"),
        *("deterministic", "cudnn_deterministic", "cudnn_benchmark", "cublas_workspace"),
        *("tf32", "cudnn_tf32", "matmul_precision"),
        *("started", "finished", "sittings"),
    }
)


def _provenance(record: Mapping[str, Any]) -> Mapping[str, Any]:
    found = record.get("provenance")
    return found if isinstance(found, Mapping) else {}


def _provenance_problems(records: list[dict[str, Any]], frame: pd.DataFrame) -> list[str]:
    """What records lack of their provenance, and where measurements.csv tells another story.

    Results from before provenance had a format are not asked for keys that nobody wrote then (`remarks` names them).
    One record with a format is enough to ask them all.
    """
    done = [r for r in records if "error" not in r]
    asked = any("format" in _provenance(r) for r in done)
    told = {row[0]: row[1:] for row in frame[["run_id", "device", "commit"]].itertuples(index=False, name=None)}
    weighed = set(frame.loc[frame["metric"] == "peak_memory_mb", "run_id"])
    problems = []
    for record in done:
        run_id, found = str(record.get("run_id")), _provenance(record)
        name = f"records.jsonl: run {short(run_id)}"
        if asked and PROVENANCE - set(found):
            problems.append(f"{name} does not say its {', '.join(sorted(PROVENANCE - set(found)))}")
        if asked and run_id not in weighed:
            problems.append(f"{name} has no peak memory among its measurements")
        commit = Run(run_id, record.get("spec") or {}, Path(), provenance=found).commit
        device = str(found.get("device") or "")
        if told.get(run_id, (device, commit)) != (device, commit):
            problems.append(f"{name} was made on {device!r} at {commit!r}, measurements.csv says {told[run_id]}")
    return problems
