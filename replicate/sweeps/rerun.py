"""Committed runs made again, and what of their numbers comes back.

A run's id names everything that may change its numbers but the machine and the code. So a run that is drawn from a
results folder is computed afresh, from its spec alone, and held against what is committed: to the bit where the machine
is the same, within the tolerances of `replicate.report.compare` where it is another. Neither another commit nor other
sources excuse a difference; they are named beside it.
"""

from __future__ import annotations

import math
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from replicate.errors import UsageError
from replicate.registry import model_entry
from replicate.report.compare import Difference, differences
from replicate.report.labels import is_timing, short
from replicate.report.records import commit_of, load_runs, measurements, read_measurements, read_records
from replicate.runs.execute import check_data
from replicate.runs.executor import Executor, Runs
from replicate.runs.progress import clock
from replicate.runs.provenance import UNKNOWN, machine_differences, source_sha256, source_version
from replicate.runs.spec import RESULTS_VERSION, AnySpec, RunSpec, spec_from_dict
from replicate.runs.store import held, read_record
from replicate.sweeps.reproduce import Sweep, until_signal

#: labels of `Difference` that another machine, or training seeds together, excuses
TOLERATED = ("rounding", "within error")
#: columns of measurements.csv beside the value that are the same on any machine, and on the same one
ANYWHERE, EXACT = ("unit",), ("unit", "status", "stderr", "n")
#: so many differences of one run are spelled out; the rest are counted
SHOWN = 10
COMMITTED, AFRESH = "as committed", "here"


@dataclass(frozen=True)
class Rerun:
    """One committed run and its repetition.

    Attributes:
        name: of the run, for a reader.
        numbers: how many values were compared.
        found: values that are not the same bits.
        machine: in what the machine, or the company in which it was trained, is another; empty where the same bits are
            due.
        source: in what the code is another; "" where it is the same.
        other: what else is not as committed.
        error: why the repetition failed; "" if it did not.
    """

    name: str
    numbers: int = 0
    found: tuple[Difference, ...] = ()
    machine: tuple[str, ...] = ()
    source: str = ""
    other: tuple[str, ...] = ()
    error: str = ""

    @property
    def held(self) -> bool:
        """Whether everything that was due came back."""
        excused = TOLERATED if self.machine else ()
        return not (self.error or self.other or any(d.label not in excused for d in self.found))

    def lines(self) -> list[str]:
        """The outcome in a line, and what did not hold below it."""
        if self.error:
            return [f"{self.name}: FAILED: {self.error}{self._source()}"]
        counts = Counter(d.label for d in self.found)
        same = self.numbers - sum(not math.isnan(d.reference) for d in self.found)
        parts = [f"{same} of {self.numbers} numbers bit for bit", *(f"{n} {label}" for label, n in counts.items())]
        how = f"by tolerance: {'; '.join(self.machine)}" if self.machine else "same machine"
        head = f"{self.name}: {'' if self.held else 'NOT AS COMMITTED: '}{', '.join(parts)} ({how}){self._source()}"
        excused = TOLERATED if self.machine else ()
        bad = [f"  {d.metric}: {d.label}: {_text(d)}" for d in self.found if d.label not in excused]
        bad += [f"  {line}" for line in self.other]
        return [head, *bad[:SHOWN], *([f"  and {len(bad) - SHOWN} more"] if len(bad) > SHOWN else [])]

    def _source(self) -> str:
        return f"; other code: {self.source}" if self.source else ""


def _text(found: Difference) -> str:
    return f"{found.reference!r} {COMMITTED}, {found.new!r} {AFRESH}"


@dataclass(frozen=True)
class Report:
    """What came of a draw.

    Attributes:
        runs: those that were made again.
        complete: False where a signal ended it.
    """

    runs: tuple[Rerun, ...]
    complete: bool = True

    @property
    def code(self) -> int:
        """Exit code: 0 all came back, 1 something did not or nothing could be made again, 3 stopped."""
        if not self.complete:
            return 3
        return 0 if self.runs and all(r.held for r in self.runs) else 1


def name_of(spec: AnySpec) -> str:
    """A run in words, its id first."""
    return f"run {short(spec.run_id())} {spec.model} on {spec.task} seed {spec.seed}"


def obstacle(spec: AnySpec) -> str:
    """Why a committed run cannot be made again on this machine with this code; "" where it can."""
    if spec.device == "cuda" and not torch.cuda.is_available():
        return "it needs a CUDA device"
    if spec.results_version != RESULTS_VERSION:
        return f"its results version is {spec.results_version}, this code makes {RESULTS_VERSION}"
    try:
        if isinstance(spec, RunSpec):
            model_entry(spec.model)
        check_data(spec)
    except UsageError as error:
        return str(error)
    return ""


def draw(
    records: Sequence[Mapping[str, Any]], n: int, seed: int, say: Callable[[str], None]
) -> list[tuple[AnySpec, Mapping[str, Any]]]:
    """Up to n finished runs of a results folder with their records, at random; those that cannot be made are named.

    The same records, seed and machine give the same runs, and a larger n those of a smaller one and more.
    """
    done = sorted((r for r in records if "error" not in r), key=lambda r: str(r.get("run_id")))
    drawn: list[tuple[AnySpec, Mapping[str, Any]]] = []
    for record in random.Random(seed).sample(done, len(done)):
        if len(drawn) == n:
            break
        try:
            spec = spec_from_dict(record.get("spec"))
        except UsageError as error:
            say(f"run {short(str(record.get('run_id')))} is not re-run: {error}")
            continue
        reason = obstacle(spec)
        if spec.run_id() != record.get("run_id"):
            reason = f"its id is committed as {short(str(record.get('run_id')))}"
        if reason:
            say(f"{name_of(spec)} is not re-run: {reason}")
        else:
            drawn.append((spec, record))
    return drawn


def seconds_taken(frame: pd.DataFrame, run_id: str) -> float:
    """Seconds that a run took when it was committed."""
    mine = frame[(frame["run_id"] == run_id) & frame["metric"].isin(["train_seconds", "evaluate_seconds"])]
    return float(mine["value"].sum())


def rerun(
    folder: Path,
    n: int,
    seed: int | None,
    executor: Callable[[str], Executor],
    say: Callable[[str], None],
) -> Report:
    """Make n committed runs of a results folder again and compare what they measure with what is committed.

    Nothing in the folder is changed; the runs are made in a temporary one.

    Args:
        folder: results/PROFILE.
        n: how many, at least 1; fewer where the folder has fewer or this machine cannot make them.
        seed: of the draw; None draws one. It is said, so that the draw can be repeated.
        executor: makes what runs the specs of a kind of device, "cpu" or "cuda".
        say: told every line for the user.

    Raises:
        ReportError: the folder's records or measurements cannot be read.
    """
    if seed is None:
        seed = random.SystemRandom().randrange(2**31)
    reference = read_measurements(folder / "measurements.csv")
    drawn = draw(read_records(folder / "records.jsonl"), n, seed, say)
    if not drawn:
        say(f"none of the runs in {folder} can be made again here")
        return Report(())
    few = "" if len(drawn) == n else f" of the {n} asked for"
    return _make_again(drawn, reference, executor, say, f"{few} again (--rerun-seed {seed})")


def _make_again(
    drawn: Sequence[tuple[AnySpec, Mapping[str, Any]]],
    reference: pd.DataFrame,
    executor: Callable[[str], Executor],
    say: Callable[[str], None],
    how: str,
) -> Report:
    """Compute the drawn runs in a temporary folder and compare them with the reference; `how` ends the first line."""
    executors = {kind: executor(kind) for kind in sorted({spec.device for spec, _ in drawn})}
    wall = 0.0
    for kind, chosen in executors.items():
        wall += sum(seconds_taken(reference, s.run_id()) for s, _ in drawn if s.device == kind) / chosen.jobs
    say(f"making {len(drawn)} runs{how}, which took about {clock(wall)}")
    with tempfile.TemporaryDirectory(prefix="replicate-rerun.") as temporary:
        root = Path(temporary)
        for kind, chosen in executors.items():
            specs = [spec for spec, _ in drawn if spec.device == kind]
            if not until_signal(lambda: chosen.run_all(specs, Runs(root), lambda *_: None)):  # noqa: B023
                say("stopped before every run was made")
                return Report((), complete=False)
        report = Report(tuple(_compared(drawn, root, reference)))
    for run in report.runs:
        for line in run.lines():
            say(line)
    held = sum(r.held for r in report.runs)
    exactly = sum(not r.machine for r in report.runs)
    tolerant = len(report.runs) - exactly
    say(f"{held} of {len(report.runs)} runs are as committed; {exactly} compared to the bit, {tolerant} by tolerance")
    return report


def keep(
    sweep: Sweep,
    commit: str,
    planned: Collection[str],
    n: int,
    executor: Callable[[str], Executor],
    say: Callable[[str], None],
) -> int:
    """Let what a sweep of another commit has finished stand under this one, where that moves no number.

    A sweep that is finished as a whole is in progress again, so that what this commit has more is run.

    n of its runs, at random, are made again by the code that is here now, and must come back to the bit. Every record
    goes on naming the commit that it was made from. What was in progress is begun again, and what is planned no more is
    removed.

    Args:
        commit: of the sweep, or its first digits.
        planned: ids of the runs of the sweep that goes on.
        n, executor, say: as for `rerun`.

    Returns:
        Exit code: 0 they stand, 1 one did not come back, 3 stopped; nothing is changed unless it is 0.

    Raises:
        UsageError: there is no such sweep, or what differs from a commit is not committed.
    """
    if sweep.belongs_here():  # the same command again, after an interruption
        return 0
    there, (here, dirty) = sweep.version() or {}, source_version()
    found = str(there.get("commit", "none"))
    if len(commit) < 4 or not found.startswith(commit):
        raise UsageError(f"the sweep in {sweep.root} is of commit {found[:12]}, not {commit!r}.")
    if dirty or here == UNKNOWN or there.get("dirty") != "":
        raise UsageError("runs are kept from one commit to another; commit your changes, and start a sweep from there.")
    with held(sweep.root):
        loaded = load_runs(sweep.runs)
        finished = (read_record(sweep.runs / run.run_id) for run in loaded.done if run.run_id in planned)
        records = {r["run_id"]: r for r in finished if r is not None}
        drawn = draw(list(records.values()), n, random.SystemRandom().randrange(2**31), say)
        if records and not drawn:
            say("none of its runs can be made again here: none is kept")
            return 1
        if drawn:
            how = f" of commit {found[:8]} again by commit {here[:8]}"
            report = _make_again(drawn, measurements(loaded), executor, say, how)
            if report.code or any(r.machine for r in report.runs):
                say("not every run came back to the bit: none is kept")
                return report.code or 1
        sweep.reopen()
        for folder in (p for p in sweep.current.iterdir() if p.is_dir() and p.name not in records):
            shutil.rmtree(folder)
        sweep.belong_here()
    say(f"{len(records)} finished runs of commit {found[:8]} stand")
    return 0


def _compared(drawn: Sequence[tuple[AnySpec, Mapping[str, Any]]], root: Path, reference: pd.DataFrame) -> list[Rerun]:
    loaded = load_runs(root)
    runs, new = {run.run_id: run for run in loaded.runs}, measurements(loaded)
    found: dict[str, list[Difference]] = {}
    for difference in differences(new, reference) if len(new) else ():
        found.setdefault(difference.run_id, []).append(difference)
    out = []
    for spec, record in drawn:
        run_id, name, source = spec.run_id(), name_of(spec), other_source(record.get("provenance") or {})
        if run_id not in runs or runs[run_id].failed:
            error = runs[run_id].error if run_id in runs else "it left no record"
            out.append(Rerun(name, source=source, error=error))
            continue
        afresh = read_record(root / run_id) or {}
        provenance = record.get("provenance") or {}
        machine = machine_differences(provenance, afresh["provenance"], COMMITTED, AFRESH)
        if any("together" in sitting for sitting in provenance.get("sittings", ())):
            machine.append(f"seeds trained together {COMMITTED}, alone {AFRESH}")
        mine, committed = (_rows(frame, run_id) for frame in (new, reference))
        other = _other(mine, committed, exact=not machine)
        if not machine:
            other += _traces(record, afresh)
        numbers = int(committed["value"].notna().sum())
        out.append(Rerun(name, numbers, tuple(found.get(run_id, ())), tuple(machine), source, tuple(other)))
    return out


def _rows(frame: pd.DataFrame, run_id: str) -> pd.DataFrame:
    """A run's measurements but times and memory, in an order that its names decide."""
    rows = frame[(frame["run_id"] == run_id) & ~frame["metric"].map(is_timing)]
    return rows.sort_values(["metric", "split", "kind"], kind="stable").set_index(["metric", "split", "kind"])


def _other(new: pd.DataFrame, committed: pd.DataFrame, exact: bool) -> list[str]:
    """What stands beside the values and is not as committed; rows on one side only are `differences`' to name."""
    out = []
    for column in EXACT if exact else ANYWHERE:
        left, right = _cells(committed[column]), _cells(new[column])
        for key in left.keys() & right.keys():
            if left[key] != right[key]:
                out.append(f"{key[0]}: {column}: {left[key]} {COMMITTED}, {right[key]} {AFRESH}")
    return sorted(out)


def _cells(column: pd.Series) -> dict[Any, list[Any]]:
    """Values by row name, as text of all their digits: nan is like nan."""
    out: dict[Any, list[Any]] = {}
    for key, value in column.items():
        out.setdefault(key, []).append("" if pd.isna(value) else str(value))
    return out


def _traces(record: Mapping[str, Any], afresh: Mapping[str, Any]) -> list[str]:
    """Losses and weights that are not as committed, where the record tells them."""
    out = []
    old, new = record.get("history") or {}, afresh.get("history") or {}
    for key, name in (("train", "training losses"), ("valid", "validation losses"), ("best_step", "selected step")):
        if key in old and old[key] != new.get(key):
            out.append(f"the {name} differ")
    if "weights_sha256" in record and record["weights_sha256"] != afresh.get("weights_sha256"):
        out.append("the trained weights differ")
    return out


def other_source(then: Mapping[str, Any]) -> str:
    """In what the code of a committed run and the code here differ; "" where it is the same."""
    commit, dirty = source_version()
    now = {"commit": commit, "dirty": dirty}
    if "source_sha256" in then:
        same = then["source_sha256"] == source_sha256()
    else:
        same = commit != UNKNOWN and now == {key: then.get(key) for key in now}
    left, right = (commit_of(p) or UNKNOWN for p in (then, now))
    return "" if same else f"commit {_brief(left)} {COMMITTED}, {_brief(right)} {AFRESH}"


def _brief(commit: str) -> str:
    return commit[:8] + ("-dirty" if commit.endswith("-dirty") else "")
