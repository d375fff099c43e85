"""Loops that resume where a killed process left them.

A run is a deterministic program. When it is called again after a kill, it repeats everything that is quick. A long loop
goes through `resumable`, which remembers its progress:

    state = {"x": start, "generator": generator}
    for _ in resumable("langevin", steps, state):
        state["x"] = step(state["x"], state["generator"])
    return state["x"]

Everything that the loop changes must be in `state` and be read from there. In the second process the n-th loop matches
the n-th loop of the first: a loop that had ended is skipped with its last state, an interrupted one resumes from the
last save. A loop inside the step of another is part of that step and is not remembered by itself.

Without a `Journal` (in tests, in notebooks) `resumable` is `range`; `replicate.runs.checkpoint` writes one to disk.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from replicate.errors import Stopped

#: values that a loop changes: tensors, numbers, text, None, lists, tuples and mappings of them, generators, and objects
#: with `state_dict` and `load_state_dict`
State = dict[str, Any]


def _keeps_state(value: Any) -> bool:
    """Return whether a value gives and takes its state, as modules and optimizers do."""
    return hasattr(value, "state_dict") and hasattr(value, "load_state_dict")


def snapshot(value: Any) -> Any:
    """Copy a state so that later steps cannot change it: tensors cloned, stateful objects as their states."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, torch.Generator):
        return value.get_state()
    if _keeps_state(value):
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
    """Restore a snapshot: stateful objects and generators in place, everything else as new values."""
    for key, value in saved.items():
        now: Any = state.get(key)
        if value is None:  # the loop itself may have dropped it
            state[key] = None
        elif isinstance(now, torch.Generator):
            now.set_state(value.cpu())
        elif _keeps_state(now):
            now.load_state_dict(value)
        else:
            state[key] = snapshot(value)


class Journal:
    """The memory that a run has of its loops.

    Args:
        write: called with the whole content as a state; makes it durable.
        saved: what an earlier session wrote, or None.
        every: seconds between saves.
        shortest: loops that take fewer seconds are repeated, not remembered; a second, or `every` if less.
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
        self.ended: dict[int, State] = dict(saved["ended"]) if saved else {}
        self.cut: State | None = saved["cut"] if saved else None
        self.saves, self.save_seconds = 0, 0.0
        self.stopping = False
        #: the last loop has ended, the rest is quick, and a request to stop comes too late
        self.finishing = False
        self.inside = self.abandoned = False
        self._next, self._last = 0, time.monotonic()

    @contextmanager
    def active(self) -> Iterator[Journal]:
        """Inside, remember the `resumable` loops of this thread here."""
        token = _JOURNAL.set(self)
        try:
            yield self
        finally:
            _JOURNAL.reset(token)

    def request_stop(self) -> None:
        """Stop at the next safe point: at once between two loops, else after the step.

        Raises:
            Stopped: nothing was half done.
        """
        self.stopping = not self.finishing
        if self.stopping and not self.inside:
            self._stop()

    def _stop(self) -> None:
        self.save()
        raise Stopped

    def save(self) -> None:
        """Write the memory."""
        begin = time.perf_counter()
        self.write({"ended": dict(self.ended), "cut": self.cut})
        self.saves += 1
        self.save_seconds += time.perf_counter() - begin
        self._last = time.monotonic()

    def loop(self, name: str, steps: int, state: State) -> Iterator[int]:
        """Run the body of `resumable`."""
        if self.stopping:  # asked within a loop that was left by `break`
            self._stop()
        at, self._next = self._next, self._next + 1
        begin, first = time.monotonic(), 0
        cut = self.cut if self.cut and self.cut["at"] == at else None
        if known := self.ended.get(at) or cut:
            if (known["name"], known["steps"]) != (name, steps):
                raise RuntimeError(
                    f"loop {at} is {name!r} of {steps} steps, and the checkpoint has {known['name']!r} of "
                    f"{known['steps']}: the run is not the one that was interrupted; delete its checkpoints"
                )
            restore(state, known["state"])
            first, begin = known["step"], begin - known["seconds"]
        self.inside = True
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
            self.inside = False
        if self.stopping:
            self._stop()

    def _end(self, at: int, name: str, steps: int, begin: float, state: State) -> None:
        """Remember that a loop has ended, with its last state, unless an error ended it."""
        if self.abandoned:
            self.abandoned = False
        elif at not in self.ended and time.monotonic() - begin >= self.shortest:
            self.ended[at] = self._entry(at, name, steps, steps, begin, state)
        if self.cut and self.cut["at"] == at:
            self.cut = None

    @staticmethod
    def _entry(at: int, name: str, steps: int, step: int, begin: float, state: State) -> State:
        seconds = time.monotonic() - begin
        return {"at": at, "name": name, "steps": steps, "step": step, "seconds": seconds, "state": snapshot(state)}


_JOURNAL: ContextVar[Journal | None] = ContextVar("journal", default=None)


def stop_current() -> bool:
    """Ask the run in this thread, if there is one, to save and stop; for signal handlers.

    Returns:
        Whether there is one.

    Raises:
        Stopped: the run could stop at once.
    """
    if (journal := _JOURNAL.get()) is not None:
        journal.request_stop()
    return journal is not None


def resumable(name: str, steps: int, state: State) -> Iterator[int]:
    """Return range(steps); a run's journal remembers its progress together with `state`.

    Args:
        name: what the loop does; checked when the run resumes.
        steps: how many; the same in every session of the run.
        state: all that the steps change. Objects with `state_dict` and generators are restored in place; other values
            are replaced, so read them from here. `break` may leave the loop. An error that leaves it must end the run:
            one that may be caught outside calls `abandon_loop` first, so that it does not count as the loop's end.
    """
    journal = _JOURNAL.get()
    if journal is None or journal.inside:
        return iter(range(steps))
    return journal.loop(name, steps, state)


@contextmanager
def may_fail() -> Iterator[None]:
    """Forget the loops that ran inside when an error leaves them, so that a resumed run fails in the same way.

    The caller catches the error. Without this a resumed run would take these loops for finished.
    """
    journal = _JOURNAL.get()
    first = journal._next if journal else 0
    try:
        yield
    except Exception:
        if journal:
            journal.ended = {at: entry for at, entry in journal.ended.items() if at < first}
        raise


def abandon_loop() -> None:
    """Forget the loop that runs now, before an error leaves it that the run may handle."""
    if (journal := _JOURNAL.get()) is not None:
        journal.abandoned = journal.inside
