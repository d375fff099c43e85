"""A pool of child processes, one run each, forked from a clean server that has imported torch once.

Every run starts from the same state whatever ran before it and however many run beside it, so that the number of
workers cannot change a number. On GPUs a slot is a device, or a share of one, and a child sees that device alone.

Seeds that are to be trained together are one child's job first. It leaves their checkpoints, and each is then a run
like any other; so it is where training them together failed.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import cast

from replicate.runs import server
from replicate.runs.child import job, make_ready, worker
from replicate.runs.executor import Listener, Runs, outcome
from replicate.runs.limits import DEFAULT, Limits
from replicate.runs.paper import find_experiment
from replicate.runs.spec import AnySpec, ExperimentSpec


def slots(device: str, jobs: int, runs_per_gpu: int = 1) -> list[str | None]:
    """What each child that runs at a time may see of the GPUs: a device's number, or None on the CPU.

    Args:
        device: "cpu" or "cuda".
        jobs: children at a time; 0 for one a core, on GPUs for as many as these offer.
        runs_per_gpu: children that share a GPU.
    """
    if device == "cpu":
        return [None] * (jobs or len(os.sched_getaffinity(0)))
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = named.split(",") if named else [str(i) for i in range(torch.cuda.device_count())]
    offered: list[str | None] = [gpu for _ in range(runs_per_gpu) for gpu in gpus]
    return offered[: jobs or len(offered)]


def groups(specs: Iterable[AnySpec], together: bool) -> list[list[AnySpec]]:
    """What a child each is to do: one run, or before it seeds of one experiment that are trained `together`.

    Such a group stands where its first run stood, and its runs follow it in `Pool.run_all`.
    """
    found: dict[str, list[AnySpec]] = {}
    for spec in specs:
        joins = together and isinstance(spec, ExperimentSpec) and find_experiment(spec.model, spec.task).together
        key = replace(spec, seed=0).run_id() if joins else spec.run_id()
        found.setdefault(key, []).append(spec)
    return list(found.values())


@dataclass
class _Child:
    process: BaseProcess
    runs: list[tuple[AnySpec, Path]]
    slot: str | None
    ends: float
    timed_out: bool = False


class Pool:
    """Runs in child processes on this machine.

    Args:
        slots: one entry a child that may run at a time, see `slots`.
        limits: of each run.
        together: train seeds together where an experiment can; what they leave is equal to rounding, not to the bit,
            and their records say so.
    """

    def __init__(self, slots: Sequence[str | None], limits: Limits = DEFAULT, together: bool = False) -> None:
        self.slots, self.limits, self.together = list(slots), limits, together

    @property
    def jobs(self) -> int:
        """Runs at a time."""
        return len(self.slots)

    def run_all(self, specs: Sequence[AnySpec], runs: Runs, listen: Listener, deadline: float | None = None) -> bool:
        """See `Executor`."""
        context = server.context()
        waiting = groups(runs.missing(specs), self.together)
        free = list(self.slots)
        children: dict[int, _Child] = {}
        try:
            while waiting or children:
                if deadline is not None and time.monotonic() >= deadline:
                    return False
                while waiting and free:
                    child = self._start(context, waiting.pop(0), runs, free.pop(0))
                    children[child.process.sentinel] = child
                    for spec, _ in child.runs:
                        listen("started", spec, "")
                for sentinel in wait(list(children), _until(children, deadline)):
                    child = children.pop(cast(int, sentinel))
                    child.process.join()
                    free.append(child.slot)
                    if len(child.runs) > 1:
                        waiting[:0] = [[spec] for spec, _ in child.runs]
                        self._tell_of_group(child, listen)
                        continue
                    error = self._error(child)
                    listen("failed" if error else "done", child.runs[0][0], error)
                for child in children.values():
                    self._enforce(child)
            return True
        finally:
            self._stop(list(children.values()))

    def _start(
        self, context: mp.context.ForkServerContext, specs: list[AnySpec], runs: Runs, slot: str | None
    ) -> _Child:
        asked = [(spec, runs.folder(spec)) for spec in specs]
        for _, folder in asked:
            make_ready(folder)
        name = f"{specs[0].model} on {specs[0].task} seed {', '.join(str(s.seed) for s in specs)}"
        process = context.Process(target=worker, args=(job(asked, self.limits, slot),), name=name)
        process.start()
        return _Child(process, asked, slot, time.monotonic() + self.limits.seconds)

    def _error(self, child: _Child) -> str:
        spec, folder = child.runs[0]
        return outcome(spec, folder, child.process.exitcode, self.limits if child.timed_out else None)

    def _tell_of_group(self, child: _Child, listen: Listener) -> None:
        """Say what ended a job that trains several seeds, if it was not done."""
        if child.process.exitcode:
            error = f"its seeds are not trained together, each goes on alone: {self._error(child)}"
            listen("lost", child.runs[0][0], error)

    def _enforce(self, child: _Child) -> None:
        """Ask a child that has used up its time to save and stop; kill it when it has not."""
        if time.monotonic() < child.ends:
            return
        if child.timed_out:
            child.process.kill()
        else:
            child.process.terminate()
        child.timed_out, child.ends = True, time.monotonic() + self.limits.grace

    def _stop(self, children: list[_Child]) -> None:
        """Let children save and stop, then kill what is left of them."""
        for child in children:
            child.process.terminate()
        end = time.monotonic() + self.limits.grace
        for child in children:
            child.process.join(max(0.0, end - time.monotonic()))
            if child.process.exitcode is None:
                child.process.kill()
                child.process.join()


def _until(children: dict[int, _Child], deadline: float | None) -> float:
    """Seconds until the next thing that may have to be done without any child's ending."""
    ends = [c.ends for c in children.values()] + ([] if deadline is None else [deadline])
    return max(0.0, min(ends) - time.monotonic())
