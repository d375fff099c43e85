"""From a folder of runs to results/PROFILE, and the check that such a folder agrees with itself.

`build` is a pure function of the records: the same records give the same bytes. It writes beside the results first and
moves files into place when all are there, so that a failure leaves the earlier results whole.
"""

import hashlib
import json
import math
import multiprocessing
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from replicate.errors import ReportError
from replicate.ledger.tables import NO_CLAIMS, Claims
from replicate.report import ledger as claims_ledger
from replicate.report import records
from replicate.report.drawing import Figure, save, style
from replicate.report.figures import all_figures
from replicate.report.kept import carried, carry, combined, kept_runs, read_index, write_index
from replicate.report.labels import TIMING_METRICS, short
from replicate.report.page import render
from replicate.report.pairs import paired_table
from replicate.report.plots import experiment_figures
from replicate.report.records import RecordedRun, RecordedRuns
from replicate.report.tables import Results, all_tables
from replicate.report.text_table import TextTable
from replicate.runs.orphan import die_with_parent

__all__ = ["MANIFEST", "TIMING_METRICS", "build", "remarks", "verify", "write_manifest"]

MANIFEST = "MANIFEST.json"
#: folders whose earlier files a build removes
OWNED = ("tables", "figures")
#: relative precision to which numbers of summary.csv and tables, written with ten digits, are recomputed
PRECISION = 1e-8


def sha256(path: Path) -> str:
    """Return the sha256 of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def results_files(folder: Path) -> list[str]:
    """Return every file below a results folder but the manifest, as sorted relative paths with forward slashes.

    What desktops and editors leave in any folder (.DS_Store, Thumbs.db, backups) is none of ours.
    """
    files = (p.relative_to(folder) for p in folder.rglob("*") if p.is_file() and p != folder / MANIFEST)
    return sorted(p.as_posix() for p in files if not any(map(_is_left_by_a_desktop, p.parts)))


def _is_left_by_a_desktop(name: str) -> bool:
    return name.startswith((".", "~$", "#")) or name.endswith("~") or name.lower() in ("thumbs.db", "desktop.ini")


def write_manifest(folder: Path) -> Path:
    """Write MANIFEST.json with the sha256 of every other file below a results folder."""
    digests = {name: sha256(folder / name) for name in results_files(folder)}
    _write(folder / MANIFEST, json.dumps(digests, indent=1, sort_keys=True) + "\n")
    return folder / MANIFEST


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")


def _write_all(runs: RecordedRuns, profile: str, folder: Path, claims: Claims, earlier: Path) -> None:
    frame, compared = records.measurements(runs), records.measurements(runs.comparison)
    results, tables = Results(compared), all_tables(Results(compared))
    records.write_measurements(frame, folder / "measurements.csv")
    records.write_summary(records.summary(frame), folder / "summary.csv")
    lines = (json.dumps(run.as_record(), sort_keys=True, allow_nan=False) + "\n" for run in runs.runs)
    _write(folder / "records.jsonl", "".join(lines))
    ledger = claims_ledger.entries(claims.papers, frame, profile)
    if ledger:
        _write(folder / "claims.csv", claims_ledger.to_csv(ledger, profile))
    printed = _printed(frame, runs.runs, claims, profile)
    (folder / "tables").mkdir()
    for name, text in _renderings(tables, ledger, printed).items():
        _write(folder / "tables" / name, text)
    with style():
        drawn = [*all_figures(results, runs.comparison), *experiment_figures(runs.runs)]
        figures = _saved(drawn, folder / "figures")
    old = carried(earlier, runs, [f.name for f in drawn])
    write_index(drawn, old, folder)
    figures += [carry(name, entry, runs, earlier, folder / "figures") for name, entry in old.items()]
    _write(
        folder / "report.html",
        render(runs, results, records.summary(compared), tables, figures, profile, ledger, printed),
    )


def _printed(frame: pd.DataFrame, runs: Iterable[RecordedRun], claims: Claims, profile: str) -> list[TextTable]:
    """Return the tables of print beside our numbers, and that of models paired by test example."""
    return [*claims_ledger.filled_tables(claims.tables, frame, claims.papers, profile), *paired_table(runs)]


def _renderings(
    tables: Iterable[TextTable], ledger: list[claims_ledger.Entry], printed: Iterable[TextTable]
) -> dict[str, str]:
    """Return the text of every file in tables/, by name."""
    every = [*tables, *([claims_ledger.ledger_table(ledger)] if ledger else []), *printed]
    return {name: text for table in every for name, text in table.renderings().items()}


#: figures that forked workers inherit: drawings are costly to send
_FIGURES: list[Figure] = []


def _save_one(index: int, folder: Path) -> bytes:
    return save(_FIGURES[index], folder)


def _saved(figures: list[Figure], folder: Path) -> list[Figure]:
    """Write every figure, in parallel on all cores; a figure's bytes depend on it alone."""
    workers = min(len(os.sched_getaffinity(0)), len(figures))
    if workers < 2 or "fork" not in multiprocessing.get_all_start_methods():
        pngs = [save(f, folder) for f in figures]
    else:
        _FIGURES[:] = figures
        try:
            with ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), die_with_parent) as pool:
                pngs = list(pool.map(_save_one, range(len(figures)), repeat(folder)))
        finally:
            _FIGURES.clear()
    return [replace(f, canvas=None, png=png) for f, png in zip(figures, pngs, strict=True)]


def build(
    runs_folder: Path,
    out_folder: Path,
    profile: str,
    run_ids: Iterable[str] | None = None,
    claims: Claims = NO_CLAIMS,
    keep: Iterable[str] | None = (),
) -> Path:
    """Write measurements, summary, records, tables, figures, report and manifest of a folder of runs.

    Other files in the results folder stay and are added to the manifest; a build removes earlier tables and figures
    that it does not write.

    Args:
        runs_folder: its sub-folders are runs.
        out_folder: results/PROFILE; made if missing.
        profile: named in the report.
        run_ids: the runs of the report; all in the folder by default.
        claims: judged on these runs; without any there is no ledger.
        keep: ids of runs to keep of those that the results folder records, None for all; the new runs are added.

    Returns:
        The path of report.html.

    Raises:
        ReportError: there are no runs, one cannot be read, or a new one cannot be added to those kept.
    """
    earlier = kept_runs(out_folder, keep)
    new = RecordedRuns(()) if earlier.runs and not runs_folder.is_dir() else records.load_runs(runs_folder, run_ids)
    runs = combined(new, earlier)
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


def verify(out_folder: Path, claims: Claims = NO_CLAIMS) -> list[str]:
    """List what is wrong with a results folder, one line per problem.

    Check that every file is the one in the manifest, that summary.csv follows from measurements.csv, that every run id
    is the sha256 of its spec, that measurements and records have the same runs and numbers, that every verdict follows
    from claims.csv and measurements.csv alone, that every record has its provenance, and, where all that agrees, that
    every table follows from the measurements.

    Args:
        claims: where given, claims.csv must also judge what they state, and the ledger's tables are checked too.
    """
    problems = _manifest_problems(out_folder)
    try:
        frame = records.read_measurements(out_folder / "measurements.csv")
        lines = records.read_records(out_folder / "records.jsonl")
        problems += _summary_problems(records.summary(frame), records.read_summary(out_folder / "summary.csv"))
        if claims.papers or (out_folder / "claims.csv").exists():
            rows = claims_ledger.read_claims_csv(out_folder / "claims.csv")
            problems += claims_ledger.problems(rows, frame)
            problems += claims_ledger.definition_problems(rows, claims.papers) if claims.papers else []
    except ReportError as error:
        return [*problems, str(error)]
    problems += records.record_problems(lines, frame) + _provenance_problems(lines, frame)
    problems += _figure_problems(out_folder, {str(r.get("run_id")) for r in lines})
    return problems or _table_problems(out_folder, frame, lines, claims)


def remarks(out_folder: Path) -> list[str]:
    """List what a reader of a results folder should know although nothing in it is wrong, one line each.

    Results of a changed working tree are of this kind: they agree with themselves, but a rerun at the commit that they
    name may differ.

    Raises:
        ReportError: records.jsonl cannot be read.
    """
    done = [_provenance(r) for r in records.read_records(out_folder / "records.jsonl") if "error" not in r]
    none = ("", None, "unknown")
    found = {
        "were made with uncommitted changes: the commit that they name does not reproduce them": [
            p.get("dirty") not in none for p in done
        ],
        "were made outside a repository and name no commit": [p.get("commit") in none for p in done],
        "were made before records named their libraries and kernels in full": ["format" not in p for p in done],
    }
    return [f"{sum(those)} of {len(done)} runs {what}" for what, those in found.items() if any(those)]


def _table_problems(folder: Path, frame: pd.DataFrame, lines: list[dict[str, Any]], claims: Claims) -> list[str]:
    runs = RecordedRuns(tuple(map(records.recorded_line, lines)))
    compared = frame[frame["run_id"].isin([r.run_id for r in runs.comparison.runs])]
    ledger: list[claims_ledger.Entry] = []
    profile = ""  # of claims, where there are any
    if claims.papers:
        profile = claims_ledger.read_claims_csv(folder / "claims.csv")[0]["profile"]
        ledger = claims_ledger.entries(claims.papers, frame, profile)
    right = _renderings(all_tables(Results(compared)), ledger, _printed(frame, runs.runs, claims, profile))
    return [
        f"tables/{name} is not the table that the measurements give"
        for name, text in right.items()
        if not (folder / "tables" / name).exists()
        or not same_text((folder / "tables" / name).read_text(encoding="utf-8"), text)
    ]


#: a number with a point in a table
_DECIMAL = re.compile(r"(\d+\.\d+(?:e[+-]?\d+)?)")


def same_text(written: str, computed: str) -> bool:
    """Return whether two texts are the same but for the last digits of their decimal numbers.

    Another version of scipy gives other last bits of a t-quantile, and ten written digits can show them.
    """
    if written == computed:
        return True
    left, right = _DECIMAL.split(written), _DECIMAL.split(computed)  # every other part is a number
    numbers = zip(left[1::2], right[1::2], strict=False)
    return left[::2] == right[::2] and all(math.isclose(float(a), float(b), rel_tol=PRECISION) for a, b in numbers)


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
    names = [f[list(records.SUMMARY_COLUMNS)].itertuples(index=False, name=None) for f in (computed, written)]
    right, found = ({row[:6]: row[6:] for row in rows} for rows in names)
    problems = [] if len(found) == len(written) else ["summary.csv has the same row twice"]
    for key in right | found:
        name = f"summary.csv: {key[0]} / {key[1]} / {key[3]}"
        if key not in found or key not in right:
            where = "summary.csv" if key not in found else "measurements.csv"
            problems.append(f"{name} ({key[4]}) is missing from {where}")
            continue
        for column, a, b in zip(records.SUMMARY_COLUMNS[len(key) :], right[key], found[key], strict=True):
            number = isinstance(a, float)
            if not (np.isclose(a, float(b), rtol=PRECISION, atol=1e-300, equal_nan=True) if number else a == b):
                problems.append(f"{name}: {column} is {b}, measurements.csv gives {a}")
    return problems


def _figure_problems(folder: Path, known: set[str]) -> list[str]:
    """List figures without texts, texts without a figure, and figures of runs that have no record."""
    try:
        index = read_index(folder)
    except ReportError as error:
        return [str(error)]
    there = {Path(name).stem for name in results_files(folder) if name.startswith("figures/") and name.endswith(".png")}
    problems = [f"figures.json has no entry for {name}" for name in sorted(there - set(index))]
    problems += [f"figures.json names {name}, which is not in figures" for name in sorted(set(index) - there)]
    strange = (name for name, entry in sorted(index.items()) if not known.issuperset(entry["runs"]))
    return problems + [f"figures.json: {name} shows a run that has no record" for name in strange]


#: keys of a record's provenance: the code, the libraries, the machine, the settings of the kernels, the times
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


def _provenance_problems(lines: list[dict[str, Any]], frame: pd.DataFrame) -> list[str]:
    """List what records lack of their provenance, and where measurements.csv contradicts it.

    Results from before provenance had a format need not have its keys (`remarks` lists them). As soon as one record has
    a format, all must have the keys.
    """
    done = [r for r in lines if "error" not in r]
    required = PROVENANCE if any("format" in _provenance(r) for r in done) else frozenset()
    written = {row[0]: row[1:] for row in frame[["run_id", "device", "commit"]].itertuples(index=False, name=None)}
    weighed = set(frame.loc[frame["metric"] == "peak_memory_mb", "run_id"])
    problems = []
    for record in done:
        run_id, found = str(record.get("run_id")), _provenance(record)
        name = f"records.jsonl: run {short(run_id)}"
        if required - set(found):
            problems.append(f"{name} does not say its {', '.join(sorted(required - set(found)))}")
        if required and run_id not in weighed:
            problems.append(f"{name} has no peak memory among its measurements")
        here = str(found.get("device") or ""), records.commit_of(found)
        if written.get(run_id, here) != here:
            problems.append(f"{name} was made on {here[0]!r} at {here[1]!r}, measurements.csv says {written[run_id]}")
    return problems
