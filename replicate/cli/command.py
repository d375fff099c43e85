"""Every command of `replicate`, and the exit code of each.

Exit codes: 0 all good, 1 a run failed, a check failed or a disk could not be written, 2 bad usage, 3 stopped with work
left.
"""

import gc
import io
import shutil
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from replicate import __version__
from replicate.cli import results, sweeps
from replicate.cli.console import complain, console, errors
from replicate.cli.data import data_app
from replicate.errors import ClaimError, ReportError, UsageError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Run generative models of every family under one protocol, and check the claims of their papers."""


app.command("list")(results.list_)
app.command("run")(sweeps.run)
app.command("reproduce")(sweeps.reproduce)
app.command("report")(results.report)
app.command("compare")(results.compare)
app.command("claims")(results.claims)
app.command("verify")(sweeps.verify)
app.add_typer(data_app, name="data")


def guarded(work: Callable[[], None]) -> None:
    """Run work(); report user errors in one line and exit with 2 (usage) or 1 (disk)."""
    try:
        work()
    except (UsageError, ReportError, ClaimError) as error:
        message, code = str(error), 2
    except OSError as error:
        what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        message, code = f"{what}; fix that and run the command again", 1
    else:
        return
    complain(message)
    sys.exit(code)


def prepare_output() -> None:
    """Fit the output to where it goes: wide lines for a file, and no character that its encoding does not have."""
    columns = shutil.get_terminal_size().columns
    if columns < 100 and not console.is_terminal:
        console.width = errors.width = 160
    elif console.width < 1:  # COLUMNS=0
        console.width = errors.width = columns
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def main() -> None:
    """Run the command with the words of `sys.argv`."""
    prepare_output()
    try:
        guarded(app)
    finally:
        gc.freeze()  # the process ends: searching all imported objects for garbage takes a second
