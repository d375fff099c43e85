"""Loops that go on where a killed process left them.

A run is a deterministic program. When it is called again after a kill, everything quick is simply done again; a long
loop goes through `resumable`, which remembers where it was:

    state = {"x": start, "generator": generator}
    for _ in resumable("langevin", steps, state):
        state["x"] = step(state["x"], state["generator"])
    return state["x"]

Whatever the loop changes must stand in `state` and be read from there. On the second call the n-th loop of the program
meets the n-th loop of the first: one that had ended is skipped with its last state, the one that was cut short goes
on from the last save. A loop inside the step of another is part of that step and is not remembered by itself.

Without a `Journal` (in tests, in notebooks) `resumable` is `range`. This module knows neither files nor models:
`replicate.runs.checkpoint` writes what a journal holds.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from replicate.errors import Stopped

#: what a loop changes: tensors, numbers, text, None, lists, tuples and mappings of them, generators, and objects
#: with `state_dict` and `load_state_dict`
State = dict[str, Any]


@runtime_checkable
class Stateful(Protocol):
    """A module, an optimizer, or anything else that gives and takes its state."""

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` takes back."""

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any:
        """Put a state back."""


def snapshot(value: Any) -> Any:
    """A copy of a state that later steps cannot change: tensors cloned, stateful objects as their states."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, Stateful):
        return snapshot(value.state_dict())
    if isinstance(value, Mapping):
        return {k: snapshot(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(snapshot(v) for v in value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(
        f"a {type(value).__name__} cannot be saved; a resumable state holds tensors, numbers, text, "
        "lists, mappings, generators and objects with state_dict"
    )


def restore(state: State, saved: Mapping[str, Any]) -> None:
    """Put a snapshot back: stateful objects and generators in place, everything else as new values."""
    for key, value in saved.items():
        now = state.get(key)
        if value is None:  # also what the loop itself let go of
            state[key] = None
        elif isinstance(now, torch.Generator):
            now.set_state(value.cpu())
        elif isinstance(now, Stateful):
            now.load_state_dict(value)
        else:
            state[key] = snapshot(value)


class Journal:
    """What one run remembers of its loops.

    Args:
        write: called with the whole content as a state; makes it durable.
        saved: what an earlier sitting wrote, or None.
        every: seconds between saves.
        shortest: loops that end in fewer seconds are not remembered but done again; a second, or `every` if less.
    """

    def __init__(
        self,
        write: Callable[[State], None],
        saved: Mapping[str, Any] | None = None,
        every: float = 30.0,
        shortest: float | None = None,
    ) -> None:
        self.write, self.every = write, every
        self.shortest = min(1.0, every) if shortest is None else shortest
        self.ended: dict[int, State] = {}
        self.cut: State | None = None
        self.saves, self.save_seconds = 0, 0.0
        self.stopping = False
        #: the last loop has ended: what is left is quick, and a request to stop comes too late
        self.finishing = False
        self._inside = self._abandoned = False
        self._next = 0
        self._last = time.monotonic()
        if saved is not None:
            self.ended, self.cut = dict(saved["ended"]), saved["cut"]

    @contextmanager
    def active(self) -> Iterator[Journal]:
        """Inside, `resumable` loops of this thread are remembered here."""
        token = _JOURNAL.set(self)
        try:
            yield self
        finally:
            _JOURNAL.reset(token)

    def abandon(self) -> None:
        """Do not remember the loop that runs now: an error is about to leave it, and the run may handle the error."""
        self._abandoned = self._inside

    def request_stop(self) -> None:
        """Stop at the next safe point; between two loops that is now.

        Raises:
            Stopped: nothing was half done.
        """
        self.stopping = not self.finishing
        if self.stopping and not self._inside:
            self._stop()

    def _stop(self) -> None:
        self.save()
        raise Stopped

    def save(self) -> None:
        """Write what is remembered."""
        begin = time.perf_counter()
        self.write({"ended": dict(self.ended), "cut": self.cut})
        self.saves += 1
        self.save_seconds += time.perf_counter() - begin
        self._last = time.monotonic()

    @property
    def nested(self) -> bool:
        """Whether a loop asked for now would run inside a step of another."""
        return self._inside

    @property
    def position(self) -> tuple[int, int, int]:
        """Loops that have ended, the number of the one that was cut short (-1: none), and its step."""
        return (len(self.ended), self.cut["at"], self.cut["step"]) if self.cut else (len(self.ended), -1, 0)

    def loop(self, name: str, steps: int, state: State) -> Iterator[int]:
        """The body of `resumable`."""
        if self.stopping:  # asked within a loop that was left by `break`
            self._stop()
        at, self._next = self._next, self._next + 1
        begin, first = time.monotonic(), 0
        known = self.ended.get(at)
        if known is None and self.cut is not None and self.cut["at"] == at:
            known = self.cut
        if known is not None:
            if (known["name"], known["steps"]) != (name, steps):
                raise RuntimeError(
                    f"loop {at} is {name!r} of {steps} steps, and the checkpoint has {known['name']!r} of "
                    f"{known['steps']}: the run is not the one that was interrupted; delete its checkpoints"
                )
            restore(state, known["state"])
            first = known["step"]
            begin -= known["seconds"]
        self._inside = True
        try:
            for step in range(first, steps):
                yield step
                if self.stopping or time.monotonic() - self._last >= self.every:
                    self.cut = self._entry(at, name, steps, step + 1, begin, state)
                    if self.stopping:
                        self._stop()
                    self.save()
            self._end(at, name, steps, begin, state)
        except GeneratorExit:  # the loop was left by `break`
            self._end(at, name, steps, begin, state)
            raise
        finally:
            self._inside = False
        if self.stopping:
            self._stop()

    def _end(self, at: int, name: str, steps: int, begin: float, state: State) -> None:
        """Remember that a loop has ended, with its last state, unless an error ended it."""
        if self._abandoned:
            self._abandoned = False
        elif at not in self.ended and time.monotonic() - begin >= self.shortest:
            self.ended[at] = self._entry(at, name, steps, steps, begin, state)
        if self.cut is not None and self.cut["at"] == at:
            self.cut = None

    @staticmethod
    def _entry(at: int, name: str, steps: int, step: int, begin: float, state: State) -> State:
        seconds = time.monotonic() - begin
        return {"at": at, "name": name, "steps": steps, "step": step, "seconds": seconds, "state": snapshot(state)}


class Together:
    """The journals of several runs whose loops are taken in step: each remembers its own, as if it ran alone.

    Args:
        journals: all at one position.
        every: seconds between saves, which all make after the same step.
    """

    def __init__(self, journals: Sequence[Journal], every: float) -> None:
        self.journals, self.every = journals, every
        self.stopping = self.nested = False

    @contextmanager
    def active(self) -> Iterator[Together]:
        """Inside, `resumable_together` loops of this thread are remembered here."""
        token = _JOURNAL.set(self)
        try:
            yield self
        finally:
            _JOURNAL.reset(token)

    def request_stop(self) -> None:
        """Stop after the step that runs; outside a loop that is now.

        Raises:
            Stopped: no loop runs.
        """
        self.stopping = True
        if not self.nested:
            raise Stopped

    def loop(self, name: str, steps: int, states: Sequence[State]) -> Iterator[int]:
        """The body of `resumable_together`."""
        loops = [journal.loop(name, steps, state) for journal, state in zip(self.journals, states, strict=True)]
        saved, self.nested = time.monotonic(), True
        try:
            while True:
                due = time.monotonic() - saved >= self.every
                saved = time.monotonic() if due else saved
                stopping = self.stopping  # a signal may come between two journals, and they must do the same
                for journal in self.journals:
                    journal.stopping, journal.every = stopping, 0.0 if due else math.inf
                taken = [_next(loop) for loop in loops]
                if stopping:
                    raise Stopped
                if taken[0] is None:
                    break
                yield taken[0]
        finally:
            self.nested = False
        for journal in self.journals:
            journal.save()


def _next(loop: Iterator[int]) -> int | None:
    """The loop's next step; None where it has ended, or saved and stopped."""
    try:
        return next(loop, None)
    except Stopped:
        return None


_JOURNAL: ContextVar[Journal | Together | None] = ContextVar("journal", default=None)


def stop_current() -> bool:
    """Ask the run in this thread, if there is one, to save and stop; for signal handlers.

    Returns:
        Whether there is one.

    Raises:
        Stopped: it could stop at once.
    """
    journal = _JOURNAL.get()
    if journal is None:
        return False
    journal.request_stop()
    return True


def resumable(name: str, steps: int, state: State) -> Iterator[int]:
    """range(steps) whose progress a run's journal remembers together with `state`.

    Args:
        name: what the loop does; checked when it goes on.
        steps: how many; the same at every call of the run.
        state: all that the steps change. Objects with `state_dict` and generators go on in place; other values are
            replaced, so read them from here. The loop may be left by `break`. An error that leaves it must end the run:
            one that may be caught outside calls `abandon_loop` first, so that it does not count as the loop's end.
    """
    return resumable_together(name, steps, [state])


def resumable_together(name: str, steps: int, states: Sequence[State]) -> Iterator[int]:
    """`resumable` for runs that take every step together, with a state of each; one state is one run alone.

    Raises:
        RuntimeError: several states in a run that is alone.
    """
    journal = _JOURNAL.get()
    if journal is None or journal.nested:
        return iter(range(steps))
    if isinstance(journal, Together):
        return journal.loop(name, steps, states)
    if len(states) != 1:
        raise RuntimeError(f"{name!r} trains {len(states)} runs together, and this run is alone")
    return journal.loop(name, steps, states[0])


def abandon_loop() -> None:
    """Forget the loop that runs now, before an error leaves it that the run may handle."""
    journal = _JOURNAL.get()
    if isinstance(journal, Journal):
        journal.abandon()
