"""Commands that read: list, report, compare, claims."""

import json
from pathlib import Path
from typing import Annotated

import typer

from replicate.cli.console import AsJson, Profile, Results, complain, console, print_table, say
from replicate.errors import UsageError
from replicate.validation import check_profile


def list_(as_json: AsJson = False) -> None:
    """Show every model, task, paper and profile."""
    from replicate.cli.listing import listing

    found = listing()
    if as_json:
        print(json.dumps(found, indent=1))
        return
    for title, columns in (("models", ("family", "about", "paper")), ("tasks", ("kind", "about"))):
        print_table(("name", *columns), ([n, *(row[c] for c in columns)] for n, row in found[title].items()), title)
    lines = ([key, name, about] for key, paper in found["papers"].items() for name, about in paper["about"].items())
    print_table(("paper", "experiment", "about"), lines, "papers")
    for name, reason in found["broken"].items():
        complain(f"{name} cannot be used: {reason}")


def report(
    profile: Profile = "standard",
    results: Results = Path("results"),
    readme: Annotated[
        Path | None, typer.Option(help="Also rewrite the ledger's line and the headline table of this README.")
    ] = None,
    runs: Annotated[
        Path | None, typer.Option(help="Folder of runs to add (default: those of the profile in REPLICATE_RUNS).")
    ] = None,
) -> None:
    """Write the report again, with the runs of a folder added.

    Tables, figures and pages are written from the records in the results and those in the folder.
    """
    from replicate.ledger.tables import read_ledger
    from replicate.report.build import build
    from replicate.report.readme import refresh
    from replicate.runs.store import default_runs_folder, exclusive, writable
    from replicate.sweeps.sweep import Sweep

    check_profile(profile)
    out = results / profile
    if runs is None:
        if not results.is_dir():
            raise UsageError(f"there is no folder {results}; check --results.")
        runs = Sweep(default_runs_folder() / profile).runs
        if not runs.exists() and not (out / "records.jsonl").exists():
            raise UsageError(f"{out} has no records, and {runs} no runs; `make reproduce PROFILE={profile}` first.")
    elif not runs.is_dir():
        raise UsageError(f"there is no folder of runs {runs}; `replicate run` makes one with --out.")
    with exclusive(writable(out)):
        say(f"report: {build(runs, out, profile, claims=read_ledger(), keep=None)}")
    if readme is not None:
        refresh(readme, out)
        say(f"ledger line and headline table: {readme}")


def compare(
    models: list[str],
    profile: Profile = "standard",
    metric: Annotated[str, typer.Option(help="Metric to compare by.")] = "nll",
    results: Results = Path("results"),
    as_json: AsJson = False,
) -> None:
    """Compare models on their common tasks, by seed."""
    from replicate.registry import unknown
    from replicate.report.compare import compare_models, comparison_table
    from replicate.sweeps.reproduce import read_reference

    check_profile(profile)
    folder = results / profile
    if len(set(models)) < 2:
        raise UsageError("name at least two different models to compare.")
    measured = read_reference(folder)
    if measured is None:
        raise UsageError(f"there is no {folder / 'measurements.csv'}; `make reproduce PROFILE={profile}` first.")
    for name in models:
        if name not in set(measured.model):
            raise unknown("model", name, sorted(set(measured.model)), f"Only those in {folder} can be compared.")
    if metric not in set(measured.metric):
        raise unknown("metric", metric, sorted(set(measured.metric)), "`nll` is the default.")
    frame = compare_models(measured, models, metric)
    if as_json:
        print(frame.to_json(orient="records", indent=1))
        return
    console.print(comparison_table(frame).rich())


def claims(
    paper: Annotated[str | None, typer.Option(help="Only the claims of this paper, by its key.")] = None,
    verdict: Annotated[
        str | None, typer.Option(help='Only claims with this verdict, such as "not reproduced".')
    ] = None,
    profile: Profile = "standard",
    results: Results = Path("results"),
    as_json: AsJson = False,
) -> None:
    """Show claims: printed value, ours, verdict."""
    from replicate.registry import unknown
    from replicate.report.ledger import read_claims_csv
    from replicate.report.verdicts import VERDICTS

    check_profile(profile)
    path = results / profile / "claims.csv"
    if not path.exists():
        raise UsageError(f"there is no {path}; `make reproduce PROFILE={profile}` writes it.")
    rows = read_claims_csv(path)
    keys = sorted({row["paper"] for row in rows})
    if paper is not None and paper not in keys:
        raise unknown("paper", paper, keys, "`replicate list` shows all.")
    if verdict is not None and verdict not in VERDICTS:
        raise unknown("verdict", verdict, VERDICTS, f"It is one of {', '.join(VERDICTS)}.")
    shown = [r for r in rows if paper in (None, r["paper"]) and verdict in (None, r["verdict"])]
    if as_json:
        print(json.dumps(shown, indent=1))
    else:
        print_claims(shown)


def print_claims(rows: list[dict[str, str]]) -> None:
    """Print claims as a table, with one line that sums them up."""
    from replicate.report.ledger import claims_table, summary_line

    console.print(claims_table(rows).rich())
    if rows:
        say(summary_line(rows).replace("*", ""))
