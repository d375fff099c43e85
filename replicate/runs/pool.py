"""A pool of child processes, one run each, forked from a clean server that has imported torch once.

Every run starts from the same state, whatever ran before it and however many run beside it, so that the number of
workers cannot change a number. A slot is a place for one run; on GPUs it is a device or a share of one, and the run
sees only that device.
"""

import multiprocessing as mp
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import cast

from replicate.runs import server
from replicate.runs.child import make_ready, worker
from replicate.runs.executor import Listener, RunFolders, outcome
from replicate.runs.limits import DEFAULT, Limits
from replicate.runs.spec import AnySpec

#: seconds that one wait may take: the system's has a limit
DAY = 86_400.0


def slots(device: str, jobs: int, runs_per_gpu: int = 1) -> list[str | None]:
    """Return what each child may see of the GPUs: a device's number, or None on the CPU.

    Args:
        device: "cpu" or "cuda".
        jobs: children at a time; 0 for one per core, on GPUs for as many as these offer.
        runs_per_gpu: children that share a GPU.
    """
    if device == "cpu":
        return [None] * (jobs or len(os.sched_getaffinity(0)))
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = named.split(",") if named else [str(i) for i in range(torch.cuda.device_count())]
    offered: list[str | None] = [gpu for _ in range(runs_per_gpu) for gpu in gpus]
    return offered[: jobs or len(offered)]


@dataclass
class _Child:
    process: BaseProcess
    spec: AnySpec
    folder: Path
    slot: str | None
    ends: float
    timed_out: bool = False


class Pool:
    """An `Executor` that runs child processes on this machine.

    Args:
        slots: one entry per child that may run at a time, see `slots`.
        limits: of each run.
    """

    def __init__(self, slots: Sequence[str | None], limits: Limits = DEFAULT) -> None:
        self.slots, self.limits, self.jobs = list(slots), limits, len(slots)

    def run_all(
        self, specs: Sequence[AnySpec], runs: RunFolders, listen: Listener, deadline: float | None = None
    ) -> bool:
        """See `Executor`."""
        context, waiting, free = server.context(), list(runs.missing(specs)), list(self.slots)
        children: dict[int, _Child] = {}
        try:
            while waiting or children:
                if deadline is not None and time.monotonic() >= deadline:
                    return False
                while waiting and free:
                    spec = waiting.pop(0)
                    child = self._start(context, spec, runs.folder(spec), free.pop(0))
                    children[child.process.sentinel] = child
                    listen("started", child.spec, "")
                ends = [c.ends for c in children.values()] + ([] if deadline is None else [deadline])
                for sentinel in wait(list(children), min(DAY, max(0.0, min(ends) - time.monotonic()))):
                    child = children.pop(cast(int, sentinel))
                    child.process.join()
                    free.append(child.slot)
                    exceeded = self.limits if child.timed_out else None
                    error = outcome(child.spec, child.folder, child.process.exitcode, exceeded)
                    listen("failed" if error else "done", child.spec, error)
                for child in children.values():
                    self._enforce(child)
            return True
        finally:
            self._stop(list(children.values()))

    def _start(self, context: mp.context.ForkServerContext, spec: AnySpec, folder: Path, slot: str | None) -> _Child:
        make_ready(folder)
        given = {"spec": spec.as_dict(), "folder": str(folder), "limits": asdict(self.limits), "visible": slot}
        process = context.Process(target=worker, args=(given,), name=spec.label)
        process.start()
        return _Child(process, spec, folder, slot, time.monotonic() + self.limits.seconds)

    def _enforce(self, child: _Child) -> None:
        """Ask a child that has used up its time to save and stop; kill it when it has not."""
        if time.monotonic() < child.ends:
            return
        (child.process.kill if child.timed_out else child.process.terminate)()
        child.timed_out, child.ends = True, time.monotonic() + self.limits.grace

    def _stop(self, children: list[_Child]) -> None:
        """Let children save and stop, then kill those that are left."""
        for child in children:
            child.process.terminate()
        end = time.monotonic() + self.limits.grace
        for child in children:
            child.process.join(max(0.0, end - time.monotonic()))
            if child.process.exitcode is None:
                child.process.kill()
                child.process.join()
