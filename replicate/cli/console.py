"""The two consoles of the command, and shared printing functions."""

import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from replicate.validation import harmless

console = Console(markup=False, emoji=False)
errors = Console(stderr=True, markup=False, emoji=False)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for a program to read.")]
Profile = Annotated[str, typer.Option("--profile", help="smoke, standard or full.")]
Results = Annotated[Path, typer.Option("--results", help="Folder of results.")]


def say(line: str) -> None:
    """Print a line of plain text; names of files and runs cannot turn into markup."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def complain(line: str) -> None:
    """Print one line on stderr, after the command's name."""
    errors.print(f"replicate: {harmless(line)}", style="red", markup=False, highlight=False, soft_wrap=True)


def print_table(heads: Sequence[str], rows: Iterable[Sequence[str]], title: str | None = None) -> None:
    """Print rows of text under their heads."""
    from rich.table import Table

    table = Table(*heads, title=title, title_justify="left")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def this_command() -> str:
    """Return the command line that was given, so that the user can give it again."""
    return shlex.join(["replicate", *sys.argv[1:]])
