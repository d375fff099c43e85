"""Show the user how a sweep proceeds: a live bar on a terminal, plain lines elsewhere."""

import time

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar


def clock(seconds: float) -> str:
    """Return seconds as h:mm:ss or m:ss."""
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"


class Progress:
    """Counts runs and estimates the time left from what the finished ones took against what was expected.

    Args:
        console: where to print; on anything but a terminal one plain line every `every` seconds at most.
    """

    def __init__(self, console: Console, every: float = 10.0) -> None:
        self.console, self.every = console, every
        self.expected: dict[str, float] = {}
        self.jobs = 1
        self.done = self.failed = self.skipped = 0
        self.running: dict[str, str] = {}
        self._started = self._last = self._finished_work = 0.0
        self._bar: Bar | None = None

    def say(self, line: str) -> None:
        """Print one line that stays."""
        (self._bar.console if self._bar else self.console).print(line, markup=False, highlight=False, soft_wrap=True)

    def begin(self, expected: list[tuple[str, float]], jobs: int) -> None:
        """Start with the runs to come, each with the seconds that it may take."""
        self.expected, self.jobs = dict(expected), jobs
        self._started = self._last = time.monotonic()
        total = sum(self.expected.values()) / jobs
        self.say(f"{len(expected)} runs, {jobs} at a time, about {clock(total)}")
        if self.console.is_terminal:
            runs, note = TextColumn("{task.completed:.0f}/{task.total:.0f} runs"), TextColumn("{task.fields[note]}")
            self._bar = Bar(runs, BarColumn(), note, console=self.console)
            self._task = self._bar.add_task("", total=len(expected), note="")
            self._bar.start()

    def skip(self, run_id: str) -> None:
        """Count a run that an earlier call finished."""
        self.expected.pop(run_id, None)
        self.skipped += 1
        self._show(force=False)

    def event(self, outcome: str, run_id: str, label: str, error: str) -> None:
        """Show that a run has started, is done, has failed, or lost its worker."""
        if outcome == "lost":
            self.say(f"lost: {label}: {error}")
        elif outcome == "started":
            self.running[run_id] = label
        else:
            self.running.pop(run_id, None)
            self._finished_work += self.expected.pop(run_id, 0.0)
            self.done += outcome == "done"
            self.failed += outcome == "failed"
        if outcome == "failed":
            self.say(f"failed: {label}: {error}")
        self._show(force=not self.expected)

    def left(self) -> float:
        """Estimate the seconds left: the expected work of unfinished runs, scaled by the speed of finished ones."""
        elapsed = time.monotonic() - self._started
        speed = self._finished_work / elapsed if elapsed > 5 and self._finished_work else float(self.jobs)
        return sum(self.expected.values()) / max(speed, 1e-9)

    def _show(self, force: bool) -> None:
        finished = self.done + self.failed + self.skipped
        note = f"{self.failed} failed, {clock(self.left())} left: {', '.join(self.running.values())}"
        if self._bar is not None:
            self._bar.update(self._task, completed=finished, note=note)
        elif force or time.monotonic() - self._last >= self.every:
            self._last = time.monotonic()
            self.say(f"{finished}/{finished + len(self.expected)} runs, {note}")

    def end(self) -> None:
        """Stop the live display and print the totals."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        elapsed = clock(time.monotonic() - self._started)
        self.say(f"{self.done} done, {self.skipped} done before, {self.failed} failed in {elapsed}")
