"""The whole way of `replicate reproduce`: plan, run, report, compare with the committed reference."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import pandas as pd

from replicate.errors import ReportError, Stopped
from replicate.report.build import Claims, build
from replicate.report.compare import compare_with_reference
from replicate.report.ledger import by_verdict, read_claims_csv
from replicate.report.records import read_measurements, read_records
from replicate.resume import stop_current
from replicate.runs.executor import Executor, Outcome, Runs
from replicate.runs.inline import Inline
from replicate.runs.limits import Limits
from replicate.runs.paper import find_experiment
from replicate.runs.progress import Progress
from replicate.runs.provenance import source_version
from replicate.runs.spec import AnySpec, ExperimentSpec
from replicate.runs.store import exclusive, held, read_record, writable, write_json

DONE, FAILED, STOPPED = 0, 1, 3


class Interrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM arrived."""


@dataclass(frozen=True)
class Sweep:
    """Where a profile's work in progress lies.

    A sweep belongs to one version of the code: after a change of commit it starts afresh, unless it is shown that the
    change moves no number of what is done (`sweeps.rerun.keep`). A finished sweep is set aside, so that the next
    call computes everything again, unless that is to add to it.
    """

    root: Path

    @property
    def current(self) -> Path:
        """Runs of the sweep in progress."""
        return self.root / "current"

    @property
    def finished(self) -> Path:
        """Runs of the last sweep that was completed."""
        return self.root / "finished"

    @property
    def runs(self) -> Path:
        """Runs of the sweep in progress, or where there is none of the finished one."""
        return self.current if self.current.exists() or not self.finished.exists() else self.finished

    def open(self, add: bool = False) -> str:
        """Make the folder ready; returns one line on what was found there.

        Args:
            add: go on with a finished sweep of this version, where there is none in progress.
        """
        if add and self.belongs_here():
            self.reopen()
        if self.current.exists():
            if self.belongs_here():
                return "going on with the unfinished sweep"
            shutil.rmtree(self.current)
            self.current.mkdir(parents=True)
            self.belong_here()
            return "the unfinished sweep was made by another version of the code; starting afresh"
        self.current.mkdir(parents=True)
        self.belong_here()
        return "starting afresh"

    def version(self) -> dict[str, Any] | None:
        """The commit of the sweep, in progress or finished, and the hash of what differed from it; None: not told."""
        try:
            found = json.loads((self.runs / "version.json").read_text())
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def belongs_here(self) -> bool:
        """Whether this version of the code made the sweep, uncommitted changes and all."""
        return self.version() == _version_here()

    def belong_here(self) -> None:
        """Mark the sweep in progress as this version's."""
        write_json(self.current / "version.json", _version_here())

    def reopen(self) -> None:
        """Make the finished sweep the one in progress, where there is none."""
        if self.runs == self.finished:
            self.finished.rename(self.current)

    def close(self) -> None:
        """Set the completed sweep aside."""
        shutil.rmtree(self.finished, ignore_errors=True)
        self.current.rename(self.finished)


def _version_here() -> dict[str, Any]:
    commit, dirty = source_version()
    return {"commit": commit, "dirty": dirty}


def expected_seconds(specs: list[AnySpec], reference: pd.DataFrame | None) -> dict[str, float]:
    """Seconds that each run may take, by run id: from the committed reference where it has the model and task.

    Elsewhere what an experiment for a CUDA device says of itself, or the mean of the reference.
    """
    known: dict[tuple[str, str], float] = {}
    if reference is not None:
        cost = reference[reference.metric.isin(["train_seconds", "evaluate_seconds"])]
        per_run = cost.groupby(["model", "task", "run_id"], as_index=False)["value"].sum()
        mean = per_run.groupby(["model", "task"], as_index=False)["value"].mean()
        known = dict(zip(zip(mean["model"], mean["task"], strict=True), mean["value"].astype(float), strict=True))
    typical = sum(known.values()) / len(known) if known else 10.0

    def guess(spec: AnySpec) -> float:
        needed = find_experiment(spec.model, spec.task).cuda_minutes if isinstance(spec, ExperimentSpec) else 0
        return 60 * needed or typical

    return {s.run_id(): known.get((s.model, s.task)) or guess(s) for s in specs}


def read_reference(out: Path) -> pd.DataFrame | None:
    """The measurements of a results folder, bit for bit; None where there are none that can be read."""
    try:
        return read_measurements(out / "measurements.csv")
    except ReportError:
        return None


def read_ids(out: Path) -> set[str]:
    """The ids of the finished runs that a results folder tells of; none where there are no results."""
    path = out / "records.jsonl"
    return {str(r.get("run_id")) for r in read_records(path) if "error" not in r} if path.exists() else set()


def reproduce(
    specs: list[AnySpec],
    profile: str,
    runs_root: Path,
    results: Path,
    executor: Executor,
    time_budget: float | None,
    show: Progress,
    claims: Claims,
    rest: Sequence[AnySpec] = (),
    add: bool = False,
) -> int:
    """Run every spec afresh, write results/PROFILE, and say how it compares with what was there before.

    Args:
        rest: what else the profile has and this call does not run: reported where the sweep or results/PROFILE has it.
        add: the specs join a sweep of the rest, a finished one too, which ends when both have been run; all that
            results/PROFILE has stays.

    Returns:
        0 all good, 1 some run failed or a disk did not take what was to be written, 3 stopped by the time budget or a
        signal with work left.
    """
    deadline = None if time_budget is None else time.monotonic() + time_budget
    out = writable(results / profile)
    sweep = Sweep(writable(runs_root / profile))
    try:
        return _reproduce(specs, profile, sweep, out, executor, deadline, show, claims, rest, add)
    except OSError as error:
        what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        show.say(f"stopped: {what}. What is finished is kept; mend that, and the same command goes on from here")
        return FAILED


def _reproduce(
    specs: list[AnySpec],
    profile: str,
    sweep: Sweep,
    out: Path,
    executor: Executor,
    deadline: float | None,
    show: Progress,
    claims: Claims,
    rest: Sequence[AnySpec],
    add: bool,
) -> int:
    reference = read_reference(out)
    with held(sweep.root):
        show.say(sweep.open(add))
        expected = expected_seconds(specs, reference)
        # longest first packs the workers best; under a time budget shortest first finishes most
        sign = -1 if deadline is None else 1
        todo = sorted(specs, key=lambda s: sign * expected[s.run_id()])
        show.begin([(s.run_id(), expected[s.run_id()]) for s in todo], executor.jobs)
        for spec in todo:
            if read_record(sweep.current / spec.run_id()) is not None:
                show.skip(spec.run_id())

        def listen(outcome: Outcome, spec: AnySpec, error: str) -> None:
            show.event(outcome, spec.run_id(), f"{spec.model} on {spec.task}, seed {spec.seed}", error)

        try:
            complete = until_signal(lambda: executor.run_all(todo, Runs(sweep.current), listen, deadline))
        finally:
            show.end()
        missing = [s for s in specs if read_record(sweep.current / s.run_id()) is None]
        if not complete:
            show.say(
                f"stopped with {len(missing)} of {len(specs)} runs left; what was in progress has saved itself, and "
                "the same command goes on from here"
            )
            return STOPPED
        show.say(f"writing tables, figures and report to {out}")
        with exclusive(out):
            keep = None if add else [s.run_id() for s in rest]
            build(sweep.current, out, profile, [s.run_id() for s in (*specs, *rest)], claims, keep)
        for verdict, count in standing(out).items():
            show.say(f"claims {verdict}: {count}")
        _compare(out, reference, show)
        if missing:
            counts = Counter(f"{s.model} on {s.task}" for s in missing)
            show.say("failed: " + ", ".join(f"{name} ({n} runs)" for name, n in sorted(counts.items())))
            show.say("the same command tries the failed runs again")
            return FAILED
        left = [s for s in rest if add and read_record(sweep.current / s.run_id()) is None]
        if not left:
            sweep.close()
        elif absent := {s.run_id() for s in left} - read_ids(out):
            show.say(f"the sweep stays open: {len(absent)} of the profile's other {len(rest)} runs are not there")
        show.say(f"report: {out / 'report.html'}")
        return DONE


def run_alone(spec: AnySpec, root: Path, limits: Limits) -> tuple[int, str]:
    """Run one spec in this process, from its last checkpoint if it has one, and leave its record below root.

    Returns:
        (0, ""), (1, the error's line), or (3, "") where a signal stopped it with a checkpoint.
    """
    runs = Runs(root)
    folder = runs.folder(spec)
    folder.mkdir(parents=True, exist_ok=True)
    errors: list[str] = []
    with exclusive(folder):
        (folder / "record.json").unlink(missing_ok=True)  # it is asked for afresh
        complete = until_signal(lambda: Inline(limits).run_all([spec], runs, lambda _, __, e: errors.append(e)))
    if not complete:
        return STOPPED, ""
    return (FAILED, errors[-1]) if errors[-1] else (DONE, "")


def standing(out: Path) -> dict[str, int]:
    """Claims by verdict in a results folder; empty where there is no ledger."""
    if not (out / "claims.csv").exists():
        return {}
    return by_verdict(row["verdict"] for row in read_claims_csv(out / "claims.csv"))


def until_signal(work: Callable[[], bool]) -> bool:
    """work()'s result, or False when SIGINT or SIGTERM ends it; a second signal ends the process at once."""

    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if not stop_current():  # a run in this very process saves itself first
            raise Interrupted

    before = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        return work()
    except (Interrupted, Stopped):
        return False
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


def _compare(out: Path, reference: pd.DataFrame | None, show: Progress) -> None:
    if reference is None:
        show.say("there was no earlier result to compare with")
        return
    new = read_reference(out)
    assert new is not None
    for line in compare_with_reference(new, reference):
        show.say(line)
