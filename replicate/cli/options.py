"""Options of commands as values: a dataclass whose fields are the options of one command."""

import inspect
import math
from collections.abc import Callable
from dataclasses import fields
from typing import TypeVar, get_type_hints

import typer

from replicate.validation import MOST

T = TypeVar("T")


def seconds(text: str | float) -> float:
    """Read a number of seconds for Typer; infinity, or more than anybody can mean, is the most that timers take.

    Raises:
        BadParameter: it is no number, or is negative.
    """
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not value >= 0:
        raise typer.BadParameter(f"{text!r} is not a number of seconds, 0 or more, or inf for no limit")
    return min(value, float(MOST))


def takes(kind: type[T]) -> Callable[[Callable[[T], None]], Callable[..., None]]:
    """Give a command function, which takes one options value, the signature that Typer reads: one parameter per field.

    Args:
        kind: a dataclass; each field is annotated as Typer wants it.
    """
    hints = get_type_hints(kind, include_extras=True)
    signature = inspect.signature(kind)
    parameters = [signature.parameters[f.name].replace(annotation=hints[f.name]) for f in fields(kind)]  # type: ignore[arg-type]

    def decorate(command: Callable[[T], None]) -> Callable[..., None]:
        def call(**values: object) -> None:
            command(kind(**values))

        call.__name__, call.__doc__ = command.__name__, command.__doc__
        call.__signature__ = signature.replace(parameters=parameters, return_annotation=None)  # type: ignore[attr-defined]
        call.__annotations__ = hints
        return call

    return decorate
