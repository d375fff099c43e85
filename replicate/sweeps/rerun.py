"""Rerun committed runs and compare their numbers.

A run's id covers everything that can change its numbers, except the machine and the code. So a run that is drawn from a
results folder is computed afresh from its spec alone and compared with the committed numbers: bit for bit on the same
machine, within the tolerances of `replicate.report.compare` on another. A difference is a failure
even if the commit or the sources differ; the message names them.
"""

import math
import random
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from replicate.errors import UsageError
from replicate.report.compare import Difference, differences
from replicate.report.labels import is_timing, short
from replicate.report.records import commit_of, load_runs, measurements, read_measurements, read_records
from replicate.runs.execute import check_data
from replicate.runs.executor import Executor, RunFolders
from replicate.runs.identity import other_plug_ins
from replicate.runs.progress import clock
from replicate.runs.provenance import UNKNOWN, machine_differences, source_here, source_version
from replicate.runs.spec import RESULTS_VERSION, AnySpec, spec_from_dict
from replicate.runs.store import read_record
from replicate.sweeps.signals import until_signal

#: labels of `Difference` that another machine excuses
TOLERATED = ("rounding", "within error")
#: columns of measurements.csv beside the value that are the same on any machine, and on the same one
ANYWHERE, EXACT = ("unit",), ("unit", "status", "stderr", "n")
#: how many differences of one run are listed; the others are counted
SHOWN = 10
COMMITTED, AFRESH = "as committed", "here"


@dataclass(frozen=True)
class Rerun:
    """One committed run and its rerun.

    Attributes:
        name: of the run, for a reader.
        numbers: how many values were compared.
        found: values whose bits differ.
        machine: differences in hardware or libraries; empty where bit equality is expected.
        source: the difference in the code in words; "" where it is the same.
        other: other differences.
        error: why the rerun failed; "" if it did not.
    """

    name: str
    numbers: int = 0
    found: tuple[Difference, ...] = ()
    machine: tuple[str, ...] = ()
    source: str = ""
    other: tuple[str, ...] = ()
    error: str = ""

    @property
    def bad(self) -> list[Difference]:
        """The values that had to match and did not."""
        return [d for d in self.found if not (self.machine and d.label in TOLERATED)]

    @property
    def held(self) -> bool:
        """Whether everything matched that had to."""
        return not (self.error or self.other or self.bad)

    def lines(self) -> list[str]:
        """Return the outcome in a line, followed by the differences that are not excused."""
        source = f"; {self.source}" if self.source else ""
        if self.error:
            return [f"{self.name}: FAILED: {self.error}{source}"]
        counts = Counter(d.label for d in self.found)
        same = self.numbers - sum(not math.isnan(d.reference) for d in self.found)
        parts = [f"{same} of {self.numbers} numbers bit for bit", *(f"{n} {label}" for label, n in counts.items())]
        how = f"by tolerance: {'; '.join(self.machine)}" if self.machine else "same machine"
        head = f"{self.name}: {'' if self.held else 'NOT AS COMMITTED: '}{', '.join(parts)} ({how}){source}"
        bad = [f"  {d.metric}: {d.label}: {d.reference!r} {COMMITTED}, {d.new!r} {AFRESH}" for d in self.bad]
        bad += [f"  {line}" for line in self.other]
        return [head, *bad[:SHOWN], *([f"  and {len(bad) - SHOWN} more"] if len(bad) > SHOWN else [])]


@dataclass(frozen=True)
class Report:
    """The outcome of rerunning drawn runs; `complete` is False where a signal ended it."""

    runs: tuple[Rerun, ...]
    complete: bool = True

    @property
    def code(self) -> int:
        """The exit code: 0 all matched, 1 something did not or nothing could be rerun, 3 stopped."""
        if not self.complete:
            return 3
        return 0 if self.runs and all(r.held for r in self.runs) else 1


def name_of(spec: AnySpec) -> str:
    """Return a run in words, its id first."""
    return f"run {short(spec.run_id())} {spec.label}"


def obstacle(spec: AnySpec) -> str:
    """Return why a committed run cannot be rerun on this machine with this code; "" where it can."""
    if spec.device == "cuda" and not torch.cuda.is_available():
        return "it needs a CUDA device"
    if spec.results_version != RESULTS_VERSION:
        return f"it was computed with results version {spec.results_version}, this code has {RESULTS_VERSION}"
    try:
        check_data(spec)
    except UsageError as error:
        return str(error)
    return ""


def draw(
    records: Sequence[Mapping[str, Any]], n: int, seed: int, say: Callable[[str], None]
) -> list[tuple[AnySpec, Mapping[str, Any]]]:
    """Draw up to n finished runs with their records at random; name those that cannot be rerun.

    The same records, seed and machine give the same runs, and a larger n only adds runs.
    """
    done = sorted((r for r in records if "error" not in r), key=lambda r: str(r.get("run_id")))
    drawn: list[tuple[AnySpec, Mapping[str, Any]]] = []
    for record in random.Random(seed).sample(done, len(done)):
        if len(drawn) == n:
            break
        try:
            spec = spec_from_dict(record.get("spec"))
        except UsageError as error:
            say(f"run {short(str(record.get('run_id')))} is not rerun: {error}")
            continue
        reason = obstacle(spec)
        if spec.run_id() != record.get("run_id"):
            reason = f"its id is committed as {short(str(record.get('run_id')))}"
        if reason:
            say(f"{name_of(spec)} is not rerun: {reason}")
        else:
            drawn.append((spec, record))
    return drawn


def seconds_taken(frame: pd.DataFrame, run_id: str) -> float:
    """Return the seconds that a run took when it was committed."""
    mine = frame[(frame["run_id"] == run_id) & frame["metric"].isin(["train_seconds", "evaluate_seconds"])]
    return float(mine["value"].sum())


def rerun(
    folder: Path, n: int, seed: int | None, executor: Callable[[str], Executor], say: Callable[[str], None]
) -> Report:
    """Rerun n committed runs of a results folder and compare their measurements with the committed ones.

    Nothing in the folder is changed; the runs are computed in a temporary one.

    Args:
        folder: results/PROFILE.
        n: how many, at least 1; fewer where the folder has fewer or this machine cannot rerun them.
        seed: of the draw; None draws one. It is printed, so that the draw can be repeated.
        executor: makes the executor of a kind of device, "cpu" or "cuda".
        say: receives every line for the user.

    Raises:
        ReportError: the folder's records or measurements cannot be read.
    """
    if seed is None:
        seed = random.SystemRandom().randrange(2**31)
    reference = read_measurements(folder / "measurements.csv")
    drawn = draw(read_records(folder / "records.jsonl"), n, seed, say)
    if not drawn:
        say(f"none of the runs in {folder} can be rerun here")
        return Report(())
    few = "" if len(drawn) == n else f" of the {n} requested"
    return rerun_drawn(drawn, reference, executor, say, f"{few} (--rerun-seed {seed})")


def rerun_drawn(
    drawn: Sequence[tuple[AnySpec, Mapping[str, Any]]],
    reference: pd.DataFrame,
    executor: Callable[[str], Executor],
    say: Callable[[str], None],
    how: str,
) -> Report:
    """Rerun the drawn runs in a temporary folder and compare them with the reference.

    Args:
        how: ends the first line for the user.
    """
    executors = {kind: executor(kind) for kind in sorted({spec.device for spec, _ in drawn})}
    wall = sum(seconds_taken(reference, s.run_id()) / executors[s.device].jobs for s, _ in drawn)
    say(f"rerunning {len(drawn)} runs{how}, which took about {clock(wall)}")
    with tempfile.TemporaryDirectory(prefix="replicate-rerun.") as temporary:
        root = Path(temporary)
        for kind, chosen in executors.items():
            specs = [spec for spec, _ in drawn if spec.device == kind]
            if not until_signal(lambda: chosen.run_all(specs, RunFolders(root), lambda *_: None)):  # noqa: B023
                say("stopped before every run was rerun")
                return Report((), complete=False)
        report = Report(tuple(_compared(drawn, root, reference)))
    for run in report.runs:
        for line in run.lines():
            say(line)
    held, exactly = sum(r.held for r in report.runs), sum(not r.machine for r in report.runs)
    how = f"{exactly} compared bit for bit, {len(report.runs) - exactly} within the tolerance for another machine"
    say(f"{held} of {len(report.runs)} runs match: {how}")
    return report


def _compared(drawn: Sequence[tuple[AnySpec, Mapping[str, Any]]], root: Path, reference: pd.DataFrame) -> list[Rerun]:
    loaded = load_runs(root)
    runs, new = {run.run_id: run for run in loaded.runs}, measurements(loaded)
    found: dict[str, list[Difference]] = {}
    for difference in differences(new, reference) if len(new) else ():
        found.setdefault(difference.run_id, []).append(difference)
    out = []
    for spec, record in drawn:
        run_id, name, source = spec.run_id(), name_of(spec), other_source(spec, record.get("provenance") or {})
        if run_id not in runs or runs[run_id].failed:
            error = runs[run_id].error if run_id in runs else "it left no record"
            out.append(Rerun(name, source=source, error=error))
            continue
        afresh = read_record(root / run_id) or {}
        machine = machine_differences(record.get("provenance") or {}, afresh["provenance"], COMMITTED, AFRESH)
        mine, committed = (_rows(frame, run_id) for frame in (new, reference))
        other = _other(mine, committed, not machine) + ([] if machine else _traces(record, afresh))
        numbers = int(committed["value"].notna().sum())
        out.append(Rerun(name, numbers, tuple(found.get(run_id, ())), tuple(machine), source, tuple(other)))
    return out


def _rows(frame: pd.DataFrame, run_id: str) -> pd.DataFrame:
    """Return a run's measurements without times and memory, ordered by name."""
    rows = frame[(frame["run_id"] == run_id) & ~frame["metric"].map(is_timing)]
    return rows.sort_values(["metric", "split", "kind"], kind="stable").set_index(["metric", "split", "kind"])


def _other(new: pd.DataFrame, committed: pd.DataFrame, exact: bool) -> list[str]:
    """Return the differences in the columns other than the values; `differences` reports rows missing on one side."""
    out = []
    for column in EXACT if exact else ANYWHERE:
        left, right = _cells(committed[column]), _cells(new[column])
        for key in left.keys() & right.keys():
            if left[key] != right[key]:
                out.append(f"{key[0]}: {column}: {left[key]} {COMMITTED}, {right[key]} {AFRESH}")
    return sorted(out)


def _cells(column: pd.Series) -> dict[Any, list[Any]]:
    """Return values by row name, as text of all their digits, so that nan equals nan."""
    out: dict[Any, list[Any]] = {}
    for key, value in column.items():
        out.setdefault(key, []).append("" if pd.isna(value) else str(value))
    return out


def _traces(record: Mapping[str, Any], afresh: Mapping[str, Any]) -> list[str]:
    """Return the differences in losses and weights, where the record has them."""
    old, new = record.get("history") or {}, afresh.get("history") or {}
    names = {"train": "training losses", "valid": "validation losses", "best_step": "selected step"}
    out = [f"the {name} differ" for key, name in names.items() if key in old and old[key] != new.get(key)]
    if "weights_sha256" in record and record["weights_sha256"] != afresh.get("weights_sha256"):
        out.append("the trained weights differ")
    return out


def other_source(spec: AnySpec, then: Mapping[str, Any]) -> str:
    """Return the difference between the code of a committed run and the code here; "" where it is the same."""
    commit, dirty = source_version()
    now = {"commit": commit, "dirty": dirty}
    if "source_sha256" in then:
        same = then["source_sha256"] == source_here()
    else:
        same = commit != UNKNOWN and now == {key: then.get(key) for key in now}
    full = [commit_of(p) or UNKNOWN for p in (then, now)]
    left, right = (c[:8] + ("-dirty" if c.endswith("-dirty") else "") for c in full)
    # without a hash of the sources only commits can be compared, and an unknown one is none
    what = "other code" if "source_sha256" in then or UNKNOWN not in full else "perhaps other code"
    out = [] if same else [f"{what}: commit {left} {COMMITTED}, {right} {AFRESH}"]
    if plugged := other_plug_ins(spec, then, COMMITTED, AFRESH):
        out.append(f"other plug-ins: {plugged}")
    return "; ".join(out)
