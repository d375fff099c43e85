"""Options of commands as values: a dataclass whose fields are the options of one command."""

import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import TypeVar, get_type_hints

T = TypeVar("T")


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
