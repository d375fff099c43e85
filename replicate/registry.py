"""Find models, tasks and papers by name through entry points; a plug-in's are found the same way as the suite's own.

Nothing here imports torch: names are known before anything is loaded.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Generic, TypeVar

from replicate.errors import UsageError

if TYPE_CHECKING:
    from replicate.model import ModelEntry

T = TypeVar("T")


def unknown(what: str, name: str, known: Iterable[str], next_step: str) -> UsageError:
    """Return the error for an unknown name: one line with the nearest names and the command that lists them."""
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    return UsageError(f"unknown {what} {name!r}.{hint} {next_step}")


class EntryPoints(Generic[T]):
    """The objects that the entry points of one group name.

    Args:
        group: of the entry points, such as "replicate.models".
        noun: what one of them is called in messages.
        kind: MODULE:CLASS that each must be an instance of; imported when the first is loaded.
        next_step: ends the message about an unknown name.
    """

    def __init__(self, group: str, noun: str, kind: str, next_step: str = "`replicate list` shows all.") -> None:
        self.group, self.noun, self.kind, self.next_step = group, noun, kind, next_step

    @cached_property
    def points(self) -> dict[str, EntryPoint]:
        """The entry points by name; nothing is loaded."""
        return {point.name: point for point in sorted(entry_points(group=self.group), key=lambda p: p.name)}

    @cached_property
    def _loaded(self) -> tuple[dict[str, T], dict[str, str]]:
        from replicate.process_state import asked_to_stop, contained

        module, _, name = self.kind.partition(":")
        kind = getattr(importlib.import_module(module), name)
        found: dict[str, T] = {}
        broken: dict[str, str] = {}
        for point in self.points.values():
            package = f" (package {point.dist.name})" if point.dist else ""
            with contained(f"plug-in {point.name}{package}", "at import"):
                try:
                    entry = point.load()
                    wrong = f"{point.value} is a {type(entry).__name__}, not a {name}"
                    problem = getattr(entry, "problem", "") if isinstance(entry, kind) else wrong
                except BaseException as error:  # a plug-in that cannot be imported must not take the others down
                    if asked_to_stop(error):
                        raise
                    problem = f"{type(error).__name__}: {error}"
            if problem:
                broken[point.name] = problem
            else:
                found[point.name] = entry
        return found, broken

    @property
    def found(self) -> dict[str, T]:
        """Every object that could be loaded, by name."""
        return self._loaded[0]

    @property
    def broken(self) -> dict[str, str]:
        """The reason for each entry point that cannot be used, by name."""
        return self._loaded[1]

    def require(self, name: str) -> None:
        """Check a name before anything is loaded; raises UsageError if there is no such entry point."""
        if name not in self.points and name not in self.__dict__.get("_loaded", ({}, {}))[0]:
            raise unknown(self.noun, name, self.points, self.next_step)

    def get(self, name: str) -> T:
        """Return the object of this name; raises UsageError if there is none, or it cannot be loaded."""
        self.require(name)
        if name in self.broken:
            raise UsageError(f"{self.noun} {name!r} cannot be used: {self.broken[name]}. Fix or uninstall its package.")
        return self.found[name]

    def forget(self) -> None:
        """Look for entry points and load them again at the next use."""
        for name in ("points", "_loaded"):
            self.__dict__.pop(name, None)


MODELS: EntryPoints[ModelEntry] = EntryPoints("replicate.models", "model", "replicate.model:ModelEntry")


def models() -> dict[str, ModelEntry]:
    """Return every model that could be imported, by name."""
    return MODELS.found


def model_entry(name: str) -> ModelEntry:
    """Return the entry of a model; raises UsageError if there is no such model, or it cannot be imported."""
    return MODELS.get(name)
