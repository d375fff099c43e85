"""Commands that compute: run, reproduce, verify."""

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from replicate.cli.console import AsJson, Profile, Results, complain, console, print_table, say, this_command
from replicate.cli.options import seconds, takes
from replicate.errors import UsageError
from replicate.registry import MODELS, EntryPoints
from replicate.validation import MOST, check_profile, parse_settings

Device = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")]
Jobs = Annotated[int, typer.Option(min=0, help="Runs at a time; 0 for one per core.")]
RunLimit = Annotated[
    float, typer.Option(parser=seconds, metavar="SECONDS", help="Seconds after which a run counts as failed.")
]
CheckpointEvery = Annotated[
    float, typer.Option(parser=seconds, metavar="SECONDS", help="Seconds between the checkpoints of a run.")
]


@dataclass(frozen=True)
class RunOptions:
    """Options of `replicate run`."""

    model: str
    task: str
    seed: Annotated[int, typer.Option(help="Random seed, 0 or larger.")] = 0
    set_: Annotated[list[str] | None, typer.Option("--set", help="key=value; repeat for more.")] = None
    profile: Profile = "standard"
    device: Device = "auto"
    precision: Annotated[str, typer.Option(help="float32 or float64.")] = "float32"
    out: Annotated[Path | None, typer.Option(help="Folder for the record (default REPLICATE_RUNS/single).")] = None
    run_limit: RunLimit = 7200.0
    checkpoint_every: CheckpointEvery = 30.0
    as_json: AsJson = False


@takes(RunOptions)
def run(o: RunOptions) -> None:
    """Train and measure one model on one task.

    After an interruption the same command resumes the run.
    """
    settings = parse_settings(o.set_ or [])
    check_profile(o.profile)
    MODELS.require(o.model)  # an unknown name needs no import of torch
    EntryPoints("replicate.tasks", "task", "").require(o.task)
    from replicate.runs.limits import Limits
    from replicate.runs.spec import make_spec
    from replicate.runs.store import default_runs_folder, read_record, writable
    from replicate.sweeps.executors import resolve_device
    from replicate.sweeps.reproduce import STOPPED, run_alone

    spec = make_spec(o.model, o.task, o.seed, o.profile, resolve_device(o.device), o.precision, settings)
    runs = writable(o.out or default_runs_folder() / "single")
    code, error = run_alone(spec, runs, Limits(o.run_limit, None, o.checkpoint_every))
    folder = runs / spec.run_id()
    if code == STOPPED:
        complain(f"stopped; resume with: {this_command()}")
        raise typer.Exit(STOPPED)
    record = read_record(folder)
    if record is None:
        complain(f"{error} (details: {folder / 'failure.json'})")
        raise typer.Exit(1)
    if o.as_json:
        print(json.dumps(record, indent=1))
        return
    from replicate.model import SYMBOLS

    rows = []
    for m in record["measurements"]:
        if m["status"] == "ok":
            stderr = "" if m["stderr"] is None else f"{m['stderr']:.3g}"
            rows.append([m["metric"], SYMBOLS[m["kind"]], f"{m['value']:.5g}", stderr, m["unit"]])
        else:
            rows.append([m["metric"], "", m["status"], "", ""])
    print_table(("metric", "", "value", "standard error", "unit"), rows, spec.label)
    say(f"record: {folder / 'record.json'}")


@dataclass(frozen=True)
class ReproduceOptions:
    """Options of `replicate reproduce`."""

    profile: Profile = "standard"
    jobs: Jobs = 0
    seeds: Annotated[int, typer.Option(min=0, help="Seeds per model; 0 for the profile's own.")] = 0
    device: Device = "auto"
    time_budget: Annotated[
        float | None,
        typer.Option(parser=seconds, metavar="SECONDS", help="Stop after this many seconds, with exit code 3."),
    ] = None
    scheduler: Annotated[
        str | None, typer.Option(help="Compute on the workers of a Dask scheduler (tcp://host:8786).")
    ] = None
    in_process: Annotated[
        bool, typer.Option("--in-process", help="Compute one run after the other in this process, for a debugger.")
    ] = False
    cuda_rows: Annotated[
        bool,
        typer.Option("--cuda-rows", help="Run only the missing runs that need a GPU, and add them to the results."),
    ] = False
    reuse: Annotated[
        str,
        typer.Option(
            metavar="results|COMMIT",
            help="Skip runs that are computed already. results: those in the results folder, to which new runs are "
            "added. COMMIT: those of that commit's sweep, if a sample of them gives the same bits again.",
        ),
    ] = ""
    reuse_check: Annotated[int, typer.Option(min=1, help="Number of COMMIT's runs to rerun as a check.")] = 5
    runs_per_gpu: Annotated[int, typer.Option(min=1, help="Runs that share a GPU.")] = 1
    run_limit: RunLimit = 7200.0
    memory_limit: Annotated[
        int | None, typer.Option(min=1, max=MOST, help="Megabytes of memory that a run may use.")
    ] = None
    checkpoint_every: CheckpointEvery = 30.0
    results: Results = Path("results")
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the runs and stop.")] = False


@takes(ReproduceOptions)
def reproduce(o: ReproduceOptions) -> None:
    """Compute a profile and write its report.

    Everything is computed afresh, tables and figures too; unfinished work of an interrupted call is resumed.
    """
    from replicate.sweeps import executors

    check_profile(o.profile)
    executors.check_options(o.device, o.scheduler, o.cuda_rows, o.in_process)
    if not (o.scheduler or o.in_process or o.dry_run):
        from replicate.runs import server

        server.start(("digits", "digits-binary"))  # every profile has these tasks
    from replicate.ledger.tables import read_ledger
    from replicate.runs.limits import Limits
    from replicate.runs.paper import broken_entries
    from replicate.runs.progress import Progress
    from replicate.runs.store import default_runs_folder
    from replicate.sweeps import reuse
    from replicate.sweeps.plan import make_plan
    from replicate.sweeps.reproduce import STOPPED, SweepOptions, dry_run
    from replicate.sweeps.reproduce import reproduce as carry_out
    from replicate.sweeps.sweep import Sweep

    device = executors.sweep_device(o.device, o.scheduler, o.cuda_rows)
    have = reuse.in_results(o.results / o.profile) if o.cuda_rows or o.reuse == reuse.RESULTS else None
    plan = make_plan(o.profile, device, o.seeds or None, o.cuda_rows, have)
    if plan.reused:
        say(f"{plan.reused} of {plan.reused + len(plan.specs)} runs are in {o.results / o.profile} already")
    for name, reason in broken_entries().items():
        complain(f"{name} is left out: {reason}")
    for what in plan.skipped:
        say(f"{what.name} is not run: {what.reason}")
    limits = Limits(o.run_limit, o.memory_limit, o.checkpoint_every)
    executor = executors.make_executor(device, limits, o.jobs, o.runs_per_gpu, o.scheduler, o.in_process)
    if o.dry_run:
        for line in dry_run(plan, o.results, executor.jobs):
            print(line)
        return
    if o.reuse and o.reuse != reuse.RESULTS:
        sweep = Sweep(default_runs_folder() / o.profile)
        if code := reuse.adopt(sweep, o.reuse, plan.run_ids, o.reuse_check, executor, say):
            raise typer.Exit(code)
    if plan.adds and not plan.specs:
        say("nothing is left to run")
        return
    options = SweepOptions(executor, read_ledger(), default_runs_folder(), o.results, Progress(console), o.time_budget)
    code = carry_out(plan, options)
    if code == STOPPED:
        say(f"resume with: {this_command()}")
    raise typer.Exit(code)


def verify(
    profile: Profile = "standard",
    results: Results = Path("results"),
    readme: Annotated[Path, typer.Option(help="README whose generated part is checked.")] = Path("README.md"),
    rerun: Annotated[int, typer.Option(min=0, help="Rerun this many random committed runs and compare.")] = 0,
    rerun_seed: Annotated[
        int | None,
        typer.Option(help="Seed of the random choice; give that of an earlier call to choose the same runs."),
    ] = None,
    jobs: Jobs = 0,
    run_limit: RunLimit = 7200.0,
) -> None:
    """Check committed results.

    Files are compared with the manifest, specs with their hashes, tables with records.
    """
    from replicate.ledger.tables import read_ledger
    from replicate.report.build import remarks
    from replicate.report.build import verify as check
    from replicate.report.readme import PREFIX, stale

    check_profile(profile)
    folder = results / profile
    if not (folder / "MANIFEST.json").exists():
        raise UsageError(f"there is no {folder / 'MANIFEST.json'}; `make reproduce PROFILE={profile}` first.")
    problems = check(folder, read_ledger())
    if profile in PREFIX and readme.exists() and stale(readme, folder):
        again = f"`replicate report --profile {profile} --readme {shlex.quote(str(readme))}`"
        problems.append(f"the generated part of {readme} differs from {folder}; {again}")
    for problem in problems:
        complain(problem)
    for remark in remarks(folder):
        say(f"{folder}: {remark}")
    if not problems:
        say(f"{folder}: every file, spec and table agrees")
    code = 0
    if rerun:
        from replicate.runs.limits import Limits
        from replicate.sweeps.executors import make_executor
        from replicate.sweeps.rerun import rerun as rerun_some

        limits = Limits(run_limit)
        code = rerun_some(folder, rerun, rerun_seed, lambda kind: make_executor(kind, limits, jobs), say).code
    raise typer.Exit(max(code, int(bool(problems))))
