"""A pool of child processes, one run each, forked from a clean server that has imported torch once.

Every run starts from the same state whatever ran before it and however many run beside it, so that the number of
workers cannot change a number.
"""

from __future__ import annotations

import json
import multiprocessing as mp
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Literal, cast

from replicate.runs.execute import failure, worker
from replicate.runs.spec import AnySpec
from replicate.runs.store import read_record, write_json

#: threads of every numerical library in a child; more would make results depend on the machine's cores
ONE_THREAD = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")

Outcome = Literal["started", "done", "failed"]
Listener = Callable[[Outcome, AnySpec, str], None]


@dataclass
class _Child:
    process: BaseProcess
    spec: AnySpec
    folder: Path


def _context() -> mp.context.ForkServerContext:
    for name in ONE_THREAD:
        os.environ[name] = "1"
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["__main__", "replicate.runs.execute", "replicate.runs.warm"])
    return context


def run_all(
    specs: Sequence[AnySpec],
    runs: Path,
    jobs: int,
    listen: Listener,
    deadline: float | None = None,
) -> bool:
    """Run the specs whose records are missing under runs/RUN_ID.

    Args:
        jobs: children at a time.
        listen: called with "started", "done" or "failed", the spec, and the error's line.
        deadline: monotonic time after which nothing is started and what runs is stopped.

    Returns:
        True if every spec has been tried; False if the deadline came first.
    """
    context = _context()
    waiting = [s for s in specs if read_record(runs / s.run_id()) is None]
    children: dict[int, _Child] = {}
    try:
        while waiting or children:
            if deadline is not None and time.monotonic() >= deadline:
                return False
            while waiting and len(children) < jobs:
                child = _start(context, waiting.pop(0), runs)
                children[child.process.sentinel] = child
                listen("started", child.spec, "")
            timeout = None if deadline is None else max(0.0, deadline - time.monotonic())
            for sentinel in wait(list(children), timeout):
                child = children.pop(cast(int, sentinel))
                child.process.join()
                error = _outcome(child)
                listen("failed" if error else "done", child.spec, error)
        return True
    finally:
        for child in children.values():
            child.process.kill()
            child.process.join()


def _start(context: mp.context.ForkServerContext, spec: AnySpec, runs: Path) -> _Child:
    folder = runs / spec.run_id()
    if folder.exists():
        shutil.rmtree(folder)  # a half-written or failed attempt
    arguments = (json.dumps(spec.as_dict()), str(folder), spec.device)
    process = context.Process(target=worker, args=arguments, name=f"{spec.model} on {spec.task} seed {spec.seed}")
    process.start()
    return _Child(process, spec, folder)


def _outcome(child: _Child) -> str:
    """The error's line, or "" where the record is there and whole."""
    if read_record(child.folder) is not None:
        return ""
    try:
        return str(json.loads((child.folder / "failure.json").read_text())["error"])
    except (OSError, ValueError, KeyError):
        error = f"the run's process ended with code {child.process.exitcode} and left no record"
        child.folder.mkdir(parents=True, exist_ok=True)
        write_json(child.folder / "failure.json", failure(child.spec, error))
        return error
