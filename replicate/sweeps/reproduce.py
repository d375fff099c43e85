"""All steps of `replicate reproduce`: run a plan, write its report, compare with the committed reference."""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from replicate.errors import ReportError
from replicate.ledger.tables import Claims
from replicate.report.build import build
from replicate.report.compare import compare_with_reference
from replicate.report.ledger import by_verdict, read_claims_csv
from replicate.report.records import read_measurements
from replicate.runs.executor import Event, Executor, RunFolders
from replicate.runs.inline import Inline
from replicate.runs.limits import Limits
from replicate.runs.progress import Progress, clock
from replicate.runs.spec import AnySpec
from replicate.runs.store import exclusive, held, read_record, writable
from replicate.runs.subjects import subject_of
from replicate.sweeps.plan import SweepPlan
from replicate.sweeps.reuse import in_results
from replicate.sweeps.signals import until_signal
from replicate.sweeps.sweep import Sweep

#: exit codes
DONE, FAILED, STOPPED = 0, 1, 3
SAVED = "runs in progress have been saved, and the same command resumes them"


@dataclass(frozen=True)
class SweepOptions:
    """How a plan is carried out.

    Attributes:
        executor: computes the runs.
        claims: that the report judges.
        runs: folder of runs, REPLICATE_RUNS.
        results: folder of results; the profile has a folder in it.
        progress: shows the user what happens.
        time_budget: seconds after which the sweep stops; None for no limit.
    """

    executor: Executor
    claims: Claims
    runs: Path
    results: Path
    progress: Progress
    time_budget: float | None = None
    started: float = field(default_factory=time.monotonic)

    @property
    def deadline(self) -> float | None:
        """Monotonic time at which the sweep stops, or None."""
        return None if self.time_budget is None else self.started + self.time_budget


def reproduce(plan: SweepPlan, options: SweepOptions) -> int:
    """Compute every run of a plan, write results/PROFILE, and report how it compares with what was there before.

    Returns:
        The exit code: 0 all good, 1 some run failed or a disk could not be written, 3 stopped by the time budget or a
        signal with work left.
    """
    out = writable(options.results / plan.profile)
    sweep = Sweep(writable(options.runs / plan.profile))
    say = options.progress.say
    try:
        with held(sweep.root):
            reference = read_reference(out)
            say(sweep.open(plan.adds))
            for line in sweep.drop_other_plug_ins((*plan.specs, *plan.others)):
                say(line)
            complete = _compute(plan, sweep, options, reference)
            missing = [s for s in plan.specs if read_record(sweep.current / s.run_id()) is None]
            if not complete:
                say(f"stopped with {len(missing)} of {len(plan.specs)} runs left; {SAVED}")
                return STOPPED
            _report(plan, sweep, out, options, reference)
            if missing:
                counts = Counter(f"{s.model} on {s.task}" for s in missing)
                say("failed: " + ", ".join(f"{name} ({n} runs)" for name, n in sorted(counts.items())))
                say("the same command tries the failed runs again")
                return FAILED
            _close(plan, sweep, out, options)
            return DONE
    except OSError as error:
        what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        say(f"stopped: {what}. Finished runs are kept. Fix the problem and run the same command again")
        return FAILED


def _compute(plan: SweepPlan, sweep: Sweep, options: SweepOptions, reference: pd.DataFrame | None) -> bool:
    """Compute the runs that have no record yet; return whether all were tried."""
    progress, executor, deadline = options.progress, options.executor, options.deadline
    expected = expected_seconds(plan.specs, reference)
    # longest first packs the workers best; under a time budget shortest first finishes most
    sign = -1 if deadline is None else 1
    todo = sorted(plan.specs, key=lambda s: sign * expected[s.run_id()])
    progress.begin([(s.run_id(), expected[s.run_id()]) for s in todo], executor.jobs)
    for spec in todo:
        if read_record(sweep.current / spec.run_id()) is not None:
            progress.skip(spec.run_id())

    def listen(event: Event, spec: AnySpec, error: str) -> None:
        progress.event(event, spec.run_id(), spec.label, error)

    try:
        return until_signal(lambda: executor.run_all(todo, RunFolders(sweep.current), listen, deadline))
    finally:
        progress.end()


def _report(plan: SweepPlan, sweep: Sweep, out: Path, options: SweepOptions, reference: pd.DataFrame | None) -> None:
    """Write results/PROFILE; print the verdicts and the comparison with the reference."""
    say = options.progress.say
    say(f"writing tables, figures and report to {out}")
    with exclusive(out):
        keep = None if plan.adds else [s.run_id() for s in plan.others]
        build(sweep.current, out, plan.profile, plan.run_ids, options.claims, keep)
    if (out / "claims.csv").exists():
        verdicts = by_verdict(row["verdict"] for row in read_claims_csv(out / "claims.csv"))
        for verdict, count in verdicts.items():
            say(f"claims {verdict}: {count}")
    new = read_reference(out)
    if reference is None or new is None:
        say("there was no earlier result to compare with")
        return
    for line in compare_with_reference(new, reference):
        say(line)


def _close(plan: SweepPlan, sweep: Sweep, out: Path, options: SweepOptions) -> None:
    """Set the sweep aside, unless it adds to a profile that has more runs to compute."""
    left = [s.run_id() for s in plan.others if plan.adds and read_record(sweep.current / s.run_id()) is None]
    say = options.progress.say
    if not left:
        sweep.close()
    elif absent := set(left) - in_results(out):
        say(f"the sweep is not finished: {len(absent)} runs that this command does not compute have no record")
    say(f"report: {out / 'report.html'}")


def dry_run(plan: SweepPlan, results: Path, jobs: int) -> Iterator[str]:
    """Iterate over one line per run of a plan, and one with their number and time."""
    expected = expected_seconds(plan.specs, read_reference(results / plan.profile))
    yield from (f"{spec.run_id()[:12]} {spec.model} {spec.task} seed {spec.seed}" for spec in plan.specs)
    yield f"{len(plan.specs)} runs, {jobs} at a time, about {clock(sum(expected.values()) / jobs)}"


def expected_seconds(specs: Sequence[AnySpec], reference: pd.DataFrame | None) -> dict[str, float]:
    """Return the seconds that each run may take, by run id: those of the committed reference.

    Where the reference has no run of the model on the task: the experiment's own estimate, else the reference's mean.
    """
    known: dict[tuple[str, str], float] = {}
    if reference is not None:
        cost = reference[reference.metric.isin(["train_seconds", "evaluate_seconds"])]
        per_run = cost.groupby(["model", "task", "run_id"])["value"].sum()
        known = per_run.groupby(["model", "task"]).mean().to_dict()
    typical = sum(known.values()) / len(known) if known else 10.0
    return {s.run_id(): known.get((s.model, s.task)) or subject_of(s).expected_seconds() or typical for s in specs}


def read_reference(out: Path) -> pd.DataFrame | None:
    """Return the measurements of a results folder, bit for bit; None where there are none that can be read."""
    try:
        return read_measurements(out / "measurements.csv")
    except ReportError:
        return None


def run_alone(spec: AnySpec, root: Path, limits: Limits) -> tuple[int, str]:
    """Compute one run in this process, from its last checkpoint if it has one, and leave its record below root.

    Returns:
        (0, ""), (1, the error's line), or (3, "") where a signal stopped it with a checkpoint.
    """
    runs = RunFolders(root)
    folder = runs.folder(spec)
    folder.mkdir(parents=True, exist_ok=True)
    errors: list[str] = []
    with exclusive(folder):
        (folder / "record.json").unlink(missing_ok=True)  # the run is computed afresh
        complete = until_signal(lambda: Inline(limits).run_all([spec], runs, lambda _, __, e: errors.append(e)))
    if not complete:
        return STOPPED, ""
    return (FAILED, errors[-1]) if errors[-1] else (DONE, "")
