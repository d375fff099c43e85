"""The command `replicate data`: show the tasks' data and the data files, check them, fetch missing ones."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from replicate.cli.console import AsJson, Profile, complain, console, print_table, say
from replicate.errors import FetchError, UsageError

if TYPE_CHECKING:
    from replicate.data.catalog import Entry
    from replicate.data.fetch import Show

Names = Annotated[list[str] | None, typer.Argument(help="Files or folders; default: all that have an address.")]

data_app = typer.Typer(
    help="Show the data: tasks' sizes and sha256, and the files that papers' experiments read.",
    invoke_without_command=True,
    rich_markup_mode=None,
)


@data_app.callback()
def tasks(context: typer.Context, as_json: AsJson = False) -> None:
    """Show each task's sizes, the sha256 that enters a run's hash; `files`, `fetch` and `check` for data files."""
    if context.invoked_subcommand is not None:
        return
    from replicate.tasks.loading import load_task, tasks

    rows: dict[str, dict[str, object]] = {}
    away: dict[str, str] = {}
    broken: dict[str, str] = {}
    for name, entry in sorted(tasks().items()):
        if missing := entry.absent():
            away[name] = missing
            continue
        try:
            task = load_task(name)
        except UsageError as error:
            broken[name] = str(error)
            continue
        rows[name] = {part: len(getattr(task, part)) for part in ("train", "valid", "test")}
        rows[name] |= {"dim": task.info.dim, "domain": task.info.domain, "sha256": task.sha256()}
    if as_json:
        print(json.dumps({**rows, **{name: {"absent": why} for name, why in {**away, **broken}.items()}}, indent=1))
        return
    lines = ([name, *(str(v)[:16] for v in row.values())] for name, row in rows.items())
    print_table(("task", "train", "valid", "test", "dim", "domain", "sha256"), lines)
    for name, why in away.items():
        say(f"{name} is absent: {why}")
    for why in broken.values():
        complain(why)
    say("`replicate data files` shows the files behind them; densities and digits need none.")


def _status(entry: Entry) -> tuple[str, Path | None, str]:
    """Return whether a file is present, absent or damaged, its path, and what is wrong with it."""
    from replicate.data.files import damage, find

    path = find(entry.name)
    if path is None:
        return "absent", None, ""
    wrong = damage(path, entry)
    return ("damaged" if wrong else "present"), path, wrong


@data_app.command("files")
def files_(as_json: AsJson = False) -> None:
    """Show every data file that the suite knows, with status, size and licence."""
    from replicate.data.catalog import catalog
    from replicate.data.files import data_folder

    rows: dict[str, dict[str, object]] = {}
    for name, entry in catalog().items():
        status, path, wrong = _status(entry)
        rows[name] = {"status": status, "problem": wrong, "path": str(path) if path else None}
        rows[name] |= {key: getattr(entry, key) for key in ("size", "sha256", "licence", "urls", "note")}
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    lines = ([n, str(r["status"]), f"{r['size']:,}", str(r["licence"]).partition(";")[0]] for n, r in rows.items())
    print_table(("file", "status", "bytes", "licence"), lines)
    say(f"The folder is {data_folder()}; `replicate data fetch` downloads missing files.")


def _chosen(names: list[str]) -> list[Entry]:
    """Return the entries of these names or folders; raises UsageError if there is no such file or folder."""
    from replicate.data.catalog import catalog
    from replicate.registry import unknown

    known = catalog()
    found: dict[str, Entry] = {}
    for name in names:
        inside = {n: e for n, e in known.items() if n == name or n.startswith(name.rstrip("/") + "/")}
        if not inside:
            folders = {n.rsplit("/", 1)[0] for n in known}
            raise unknown("data file", name, [*known, *folders], "`replicate data files` shows all.")
        found |= inside
    return list(found.values())


@contextlib.contextmanager
def _bar(name: str) -> Iterator[Show]:
    """Show a progress bar on a terminal, nothing elsewhere."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = TextColumn(name, markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(name, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total or None)


@data_app.command("fetch")
def fetch_(names: Names = None) -> None:
    """Download data files that are missing or damaged, and check each by its sha256."""
    from replicate.data.catalog import catalog
    from replicate.data.fetch import fetch
    from replicate.data.files import data_folder, find

    folder = data_folder()
    failed = False
    chosen = _chosen(names) if names else [e for e in catalog().values() if e.urls]
    for i, entry in enumerate(chosen):
        status, path, wrong = _status(entry)
        if status == "present":
            say(f"{entry.name} is present: {path}")
            continue
        if wrong:
            say(f"{entry.name} is damaged: {wrong}")
        try:
            with _bar(entry.name) as show:
                say(f"{entry.name} is fetched: {fetch(entry, folder, show=show, also=chosen[i + 1 :])}")
        except FetchError as error:
            failed = True
            complain(str(error))
    if not names and (others := [e.name for e in catalog().values() if not e.urls and find(e.name) is None]):
        say(f"no download address for: {', '.join(others)}; `replicate data fetch NAME` prints where to get it.")
    raise typer.Exit(int(failed))


@data_app.command("pack-runs")
def pack_runs_(archive: Path, profile: Profile = "full") -> None:
    """Pack a sweep's records and checkpoints into one file, for another machine with the same sources."""
    from replicate.runs.store import default_runs_folder
    from replicate.sweeps.archive import pack_runs

    moved = pack_runs(default_runs_folder(), profile, archive)
    say(f"{archive} ({archive.stat().st_size:,} bytes) has {moved}.")


@data_app.command("unpack-runs")
def unpack_runs_(archive: Path) -> None:
    """Add the runs in a file of `pack-runs` to the sweep on this machine; `replicate reproduce` resumes it."""
    from replicate.runs.store import default_runs_folder
    from replicate.sweeps.archive import unpack_runs

    say(f"from {archive}: {unpack_runs(archive, default_runs_folder())}.")


@data_app.command("check")
def check() -> None:
    """Check every data file that is present against its published sha256."""
    from replicate.data.catalog import catalog
    from replicate.data.files import data_folder

    there = {n: found[1:] for n, entry in catalog().items() if (found := _status(entry))[0] != "absent"}
    damaged = {name: (path, wrong) for name, (path, wrong) in there.items() if wrong}
    for name, (path, wrong) in damaged.items():
        again = f"`replicate data fetch {name}` downloads it again"
        complain(f"{path}: {wrong}; {again if catalog()[name].urls else 'download it again'}")
    say(f"{len(there) - len(damaged)} of {len(there)} files in {data_folder()} are as published.")
    raise typer.Exit(int(bool(damaged)))
