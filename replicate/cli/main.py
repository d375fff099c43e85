"""The command `replicate`.

Exit codes: 0 all good, 1 some run failed or a check did not hold, 2 bad usage, 3 stopped with work left.
"""

from __future__ import annotations

import gc
import json
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.table import Table

from replicate.cli.console import AsJson, Profile, console, errors
from replicate.cli.data import data_app
from replicate.errors import ClaimError, UsageError
from replicate.validation import PROFILES, harmless, parse_settings

if TYPE_CHECKING:
    from replicate.report.build import Claims
    from replicate.runs.executor import Executor
    from replicate.runs.limits import Limits

app = typer.Typer(
    help="Generative models of every family under one protocol, and the papers' claims checked.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(data_app, name="data")
Results = Annotated[Path, typer.Option("--results", help="Folder of committed results.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")]
RunLimit = Annotated[float, typer.Option(min=0, help="Seconds that one run may take before it counts as failed.")]
CheckpointEvery = Annotated[float, typer.Option(min=0, help="Seconds between the checkpoints of a run.")]


def fail(message: str, code: int = 2) -> NoReturn:
    """One clear line on stderr and the exit code."""
    errors.print(f"replicate: {harmless(message)}", style="red", markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(code)


def resolve_device(device: str) -> str:
    """The kind of device to use.

    Raises:
        UsageError: no such kind, or it is not there.
    """
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cpu", "cuda"):
        raise UsageError(f"device is {device!r}; it must be auto, cpu or cuda.")
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("no CUDA device was found; use --device cpu, or install the CUDA build of torch.")
    return device


def say(line: str) -> None:
    """A line of plain text, which names of files and runs may not turn into markup."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def again() -> str:
    """The command that was given, for who wants to go on with it."""
    return shlex.join(["replicate", *sys.argv[1:]])


def make_executor(
    device: str,
    jobs: int,
    runs_per_gpu: int,
    limits: Limits,
    scheduler: str | None,
    in_process: bool,
    together: bool = False,
) -> Executor:
    """Where runs are to be computed.

    Raises:
        UsageError: the options contradict each other, or nothing answers at the scheduler's address.
    """
    if scheduler and in_process:
        raise UsageError("--scheduler and --in-process exclude each other; give one of them.")
    if together and (scheduler or in_process):
        raise UsageError(
            "--together trains seeds in one child of this machine; leave out --scheduler and --in-process."
        )
    if in_process:
        from replicate.runs.inline import Inline

        return Inline(limits)
    if scheduler:
        from replicate.runs.cluster import Cluster

        return Cluster(scheduler, device, limits)
    from replicate.runs.pool import Pool, slots

    return Pool(slots(device, jobs, runs_per_gpu), limits, together)


def ledger_claims() -> Claims:
    """The claims of every paper and the tables that set print beside our numbers."""
    from replicate.ledger.claims import all_claims
    from replicate.ledger.tables import measure_tables
    from replicate.report.build import Claims

    return Claims(all_claims(), measure_tables())


@app.command("list")
def list_(as_json: AsJson = False) -> None:
    """Show every model, task, paper and profile."""
    from replicate.registry import models
    from replicate.runs.paper import broken_entries, papers
    from replicate.tasks.loading import tasks

    found = {
        "models": {n: {"family": e.family, "about": e.about, "paper": e.paper} for n, e in sorted(models().items())},
        "tasks": {n: {"kind": e.kind, "about": e.about} for n, e in sorted(tasks().items())},
        "papers": {n: {"experiments": [e.name for e in p.experiments]} for n, p in sorted(papers().items())},
        "profiles": ["smoke", "standard", "full"],
        "broken": broken_entries(),
    }
    if as_json:
        print(json.dumps(found, indent=1))
        return
    for title, columns in (("models", ("family", "about", "paper")), ("tasks", ("kind", "about"))):
        table = Table("name", *columns, title=title, title_justify="left")
        for name, row in found[title].items():  # type: ignore[attr-defined]
            table.add_row(name, *(row[c] for c in columns))
        console.print(table)
    table = Table("paper", "experiments", title="papers", title_justify="left")
    for key, found_paper in sorted(papers().items()):
        table.add_row(key, ", ".join(e.name for e in found_paper.experiments))
    console.print(table)
    for name, reason in broken_entries().items():
        errors.print(f"replicate: {name} cannot be used: {reason}", markup=False, highlight=False)


@app.command()
def run(
    model: str,
    task: str,
    seed: Annotated[int, typer.Option(help="0, 1, ..")] = 0,
    set_: Annotated[list[str] | None, typer.Option("--set", help="key=value; repeat for more.")] = None,
    profile: Profile = "standard",
    device: Device = "auto",
    precision: Annotated[str, typer.Option(help="float32 or float64.")] = "float32",
    out: Annotated[Path | None, typer.Option(help="Folder for the record (default REPLICATE_RUNS/single).")] = None,
    run_limit: RunLimit = 7200.0,
    checkpoint_every: CheckpointEvery = 30.0,
    as_json: AsJson = False,
) -> None:
    """Train and measure one model on one task; after an interruption the same command goes on."""
    from replicate.runs.limits import Limits
    from replicate.runs.spec import make_spec
    from replicate.runs.store import default_runs_folder, read_record, writable
    from replicate.sweeps.reproduce import STOPPED, run_alone

    settings = parse_settings(set_ or [])
    spec = make_spec(model, task, seed, profile, resolve_device(device), precision, settings)
    runs = writable(out or default_runs_folder() / "single")
    code, error = run_alone(spec, runs, Limits(run_limit, None, checkpoint_every))
    folder = runs / spec.run_id()
    if code == STOPPED:
        errors.print(f"stopped; go on with: {again()}", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(STOPPED)
    record = read_record(folder)
    if record is None:
        fail(f"{error} (details: {folder / 'failure.json'})", 1)
    if as_json:
        print(json.dumps(record, indent=1))
        return
    from replicate.model import SYMBOLS

    table = Table("metric", "", "value", "standard error", "unit", title=f"{model} on {task}, seed {seed}")
    for m in record["measurements"]:
        if m["status"] == "ok":
            stderr = "" if m["stderr"] is None else f"{m['stderr']:.3g}"
            table.add_row(m["metric"], SYMBOLS[m["kind"]], f"{m['value']:.5g}", stderr, m["unit"])
        else:
            table.add_row(m["metric"], "", m["status"], "", "")
    console.print(table)
    console.print(f"record: {folder / 'record.json'}", soft_wrap=True)


@app.command()
def reproduce(
    profile: Profile = "standard",
    jobs: Annotated[int, typer.Option(min=0, help="Runs side by side; 0 for one a core.")] = 0,
    seeds: Annotated[int, typer.Option(min=0, help="Seeds a model; 0 for the profile's own.")] = 0,
    device: Device = "auto",
    time_budget: Annotated[float | None, typer.Option(help="Stop after so many seconds, with exit code 3.")] = None,
    scheduler: Annotated[
        str | None, typer.Option(help="Address of a Dask scheduler (tcp://host:8786) whose workers compute.")
    ] = None,
    in_process: Annotated[
        bool, typer.Option("--in-process", help="One run after the other in this process, for a debugger.")
    ] = False,
    cuda_rows: Annotated[
        bool,
        typer.Option(
            "--cuda-rows",
            help="Run what needs a CUDA device and is not in the results yet, and no more; it joins the rest.",
        ),
    ] = False,
    missing: Annotated[
        bool, typer.Option("--missing", help="Run what is not in the results yet, and no more; it joins what is there.")
    ] = False,
    runs_per_gpu: Annotated[int, typer.Option(min=1, help="Runs that share a GPU.")] = 1,
    together: Annotated[
        bool, typer.Option("--together", help="Train all seeds at once where a model can; the same but for rounding.")
    ] = False,
    run_limit: RunLimit = 7200.0,
    memory_limit: Annotated[int | None, typer.Option(min=1, help="Megabytes of memory that one run may take.")] = None,
    checkpoint_every: CheckpointEvery = 30.0,
    results: Results = Path("results"),
    keep: Annotated[
        str,
        typer.Option(
            help="Commit of an unfinished sweep: what it has finished stands, if some of it, made again, is the same.",
            metavar="COMMIT",
        ),
    ] = "",
    keep_check: Annotated[int, typer.Option(min=1, help="So many kept runs, at random, are made again.")] = 5,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would run, and stop.")] = False,
) -> None:
    """Compute a profile afresh and write its tables, figures and report."""
    from replicate.runs import server

    if profile in PROFILES and not (scheduler or in_process or dry_run):
        server.start(("digits", "digits-binary"))  # of every profile
    from replicate.runs.limits import Limits
    from replicate.runs.progress import Progress, clock
    from replicate.runs.store import default_runs_folder
    from replicate.sweeps.plan import cuda_plan, whole_plan
    from replicate.sweeps.reproduce import Sweep, expected_seconds, read_ids, read_reference, reproduce

    # on a cluster it is the workers' devices that count, and only the user knows them
    if cuda_rows and device == "cpu":
        raise UsageError("--cuda-rows are what needs a CUDA device, and --device is cpu; leave out one of them.")
    device = "cuda" if cuda_rows else device
    device = resolve_device(device) if scheduler is None else {"auto": "cpu"}.get(device, device)
    if cuda_rows:
        (specs, skipped), (rest, _) = cuda_plan(profile, seeds or None), whole_plan(profile, "cpu", seeds or None)
    else:
        specs, skipped = whole_plan(profile, device, seeds or None)
        rest = cuda_plan(profile, seeds or None)[0] if device == "cpu" else []
    add = cuda_rows or missing
    if add:
        there = read_ids(results / profile)
        done = [s for s in specs if s.run_id() in there]
        if done:
            say(f"{len(done)} of {len(specs)} runs are in {results / profile} already")
        specs, rest = [s for s in specs if s.run_id() not in there], [*rest, *done]
    from replicate.runs.paper import broken_entries

    for name, reason in broken_entries().items():
        errors.print(f"replicate: {name} is left out: {reason}", markup=False, highlight=False, soft_wrap=True)
    for what in skipped:
        say(f"{what.name} is not run: {what.reason}")
    claims = ledger_claims()
    limits = Limits(run_limit, memory_limit, checkpoint_every)
    executor = make_executor(device, jobs, runs_per_gpu, limits, scheduler, in_process, together)
    if dry_run:
        expected = expected_seconds(specs, read_reference(results / profile))
        for spec in specs:
            print(f"{spec.run_id()[:12]} {spec.model} {spec.task} seed {spec.seed}")
        print(f"{len(specs)} runs, {executor.jobs} at a time, about {clock(sum(expected.values()) / executor.jobs)}")
        return
    runs = default_runs_folder()
    if keep:
        from replicate.sweeps.rerun import keep as keep_runs

        planned = {spec.run_id() for spec in (*specs, *rest)}
        code = keep_runs(Sweep(runs / profile), keep, planned, keep_check, lambda _: executor, say)
        if code:
            raise typer.Exit(code)
    if add and not specs:
        say("nothing is left to run")
        return
    show = Progress(console)
    code = reproduce(specs, profile, runs, results, executor, time_budget, show, claims, rest, add)
    if code == 3:
        say(f"go on with: {again()}")
    raise typer.Exit(code)


@app.command()
def report(
    profile: Profile = "standard",
    results: Results = Path("results"),
    readme: Annotated[
        Path | None, typer.Option(help="Also rewrite the ledger's line and the headline table of this README.")
    ] = None,
    add: Annotated[
        bool, typer.Option("--add", help="Let the runs join what the results have; without any, write that again.")
    ] = False,
    runs: Annotated[
        Path | None, typer.Option(help="Folder of runs (default: the profile's last finished sweep in REPLICATE_RUNS).")
    ] = None,
) -> None:
    """Write tables, figures and report again from the runs of the last finished sweep, or add runs to what is there."""
    from replicate.report.build import build
    from replicate.report.readme import refresh
    from replicate.runs.store import default_runs_folder, exclusive, writable
    from replicate.sweeps.reproduce import Sweep, read_ids

    sweep = Sweep(default_runs_folder() / profile)
    if runs is None:
        # runs that join may be of a sweep in progress, which is the newer one
        runs = sweep.runs if add or not sweep.finished.exists() else sweep.finished
    elif not runs.is_dir():
        raise UsageError(f"there is no folder of runs {runs}; `replicate run` makes one with --out.")
    if add or runs.exists():
        out, keep = writable(results / profile), None if add else ()
        lost = set() if add else read_ids(out) - {path.parent.name for path in runs.glob("*/record.json")}
        if lost:
            raise UsageError(
                f"{len(lost)} runs that {out} has are not in {runs}; give --add to keep them, or delete {out} first."
            )
        with exclusive(out):
            console.print(f"report: {build(runs, out, profile, claims=ledger_claims(), keep=keep)}", soft_wrap=True)
    elif readme is None:
        raise UsageError(
            f"there are no runs of profile {profile} in {sweep.root}; `make reproduce PROFILE={profile}` first."
        )
    if readme is not None:
        refresh(readme, results / profile)
        console.print(f"ledger line and headline table: {readme}", soft_wrap=True)


@app.command()
def compare(
    models: list[str],
    profile: Profile = "standard",
    metric: Annotated[str, typer.Option(help="Metric to compare by.")] = "nll",
    results: Results = Path("results"),
    as_json: AsJson = False,
) -> None:
    """Compare models on every task they share, paired by seed."""
    from replicate.registry import unknown
    from replicate.report.compare import compare_models, comparison_table
    from replicate.sweeps.reproduce import read_reference

    measured = read_reference(results / profile)
    if measured is None:
        raise UsageError(
            f"there is no {results / profile / 'measurements.csv'}; `make reproduce PROFILE={profile}` first."
        )
    if len(models) < 2:
        raise UsageError("name at least two models to compare.")
    for name in models:
        if name not in set(measured.model):
            raise unknown(
                "model", name, sorted(set(measured.model)), f"Only those in {results / profile} can be compared."
            )
    if metric not in set(measured.metric):
        raise unknown("metric", metric, sorted(set(measured.metric)), "`nll` is the default.")
    frame = compare_models(measured, models, metric)
    if as_json:
        print(frame.to_json(orient="records", indent=1))
        return
    console.print(comparison_table(frame).rich())


@app.command()
def claims(
    paper: Annotated[str | None, typer.Option(help="Only the claims of this paper, by its key.")] = None,
    verdict: Annotated[str | None, typer.Option(help="Only claims with this verdict.")] = None,
    profile: Profile = "standard",
    results: Results = Path("results"),
    as_json: AsJson = False,
) -> None:
    """Show every claim with what is printed, what we found, and the verdict."""
    from replicate.registry import unknown
    from replicate.report.ledger import read_claims_csv
    from replicate.report.verdicts import VERDICTS

    path = results / profile / "claims.csv"
    if not path.exists():
        raise UsageError(f"there is no {path}; `make reproduce PROFILE={profile}` writes it.")
    rows = read_claims_csv(path)
    keys = sorted({row["paper"] for row in rows})
    if paper is not None and paper not in keys:
        raise unknown("paper", paper, keys, f"The ledger has {', '.join(keys)}.")
    if verdict is not None and verdict not in VERDICTS:
        raise unknown("verdict", verdict, VERDICTS, f"It is one of {', '.join(VERDICTS)}.")
    shown = [r for r in rows if paper in (None, r["paper"]) and verdict in (None, r["verdict"])]
    if as_json:
        print(json.dumps(shown, indent=1))
        return
    _print_claims(shown)


def _print_claims(rows: list[dict[str, str]]) -> None:
    from replicate.report.ledger import claims_table, summary_line

    console.print(claims_table(rows).rich())
    if rows:
        say(summary_line(rows).replace("*", ""))


@app.command()
def verify(
    profile: Profile = "standard",
    results: Results = Path("results"),
    readme: Path = Path("README.md"),
    rerun: Annotated[int, typer.Option(min=0, help="Make so many random committed runs again and compare.")] = 0,
    rerun_seed: Annotated[int | None, typer.Option(help="Draw the same runs as an earlier call.")] = None,
    jobs: Annotated[int, typer.Option(min=0, help="Reruns side by side; 0 for one a core.")] = 0,
    run_limit: RunLimit = 7200.0,
) -> None:
    """Check committed results: files against the manifest, specs against their hashes, tables against records."""
    from replicate.report.build import remarks
    from replicate.report.build import verify as check
    from replicate.report.readme import PREFIX, stale

    folder = results / profile
    if not (folder / "MANIFEST.json").exists():
        raise UsageError(f"there is no {folder / 'MANIFEST.json'}; `make reproduce PROFILE={profile}` first.")
    problems = check(folder, ledger_claims())
    if profile in PREFIX and readme.exists() and stale(readme, folder):
        problems.append(
            f"what {readme} says between its markers is not what {folder} gives; "
            f"`replicate report --profile {profile} --readme {readme}`"
        )
    for problem in problems:
        errors.print(f"replicate: {problem}", markup=False, highlight=False, soft_wrap=True)
    for remark in remarks(folder):
        say(f"{folder}: {remark}")
    if not problems:
        console.print(f"{folder}: every file, spec and table agrees")
    code = 0
    if rerun:
        from replicate.runs.limits import Limits
        from replicate.sweeps.rerun import rerun as make_again

        limits = Limits(run_limit)
        found = make_again(
            folder, rerun, rerun_seed, lambda kind: make_executor(kind, jobs, 1, limits, None, False), say
        )
        code = found.code
    raise typer.Exit(max(code, int(bool(problems))))


def guarded(work: Callable[[], None]) -> None:
    """work(), with what a user can mend told in one line: exit code 2 for usage, 1 for a disk that does not work."""
    from replicate.errors import ReportError

    try:
        work()
    except (UsageError, ReportError, ClaimError) as error:
        message, code = str(error), 2
    except OSError as error:
        what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        message, code = f"{what}; mend that and call again", 1
    else:
        return
    errors.print(f"replicate: {harmless(message)}", style="red", markup=False, highlight=False, soft_wrap=True)
    sys.exit(code)


def main() -> None:
    """Entry point."""
    if shutil.get_terminal_size().columns < 100 and not console.is_terminal:
        console.width = errors.width = 160
    try:
        guarded(app)
    finally:
        gc.freeze()  # the process ends: to look for garbage among all that was imported takes a second


if __name__ == "__main__":
    main()
