"""A sweep of a few runs through everything that `replicate reproduce` goes through; a program that tests may kill.

    python tests/helpers/small_sweep.py FOLDER (MODEL:TASK[:STEPS] ... | each)
        [--jobs N] [--in-process | --scheduler ADDRESS]
        [--every SECONDS] [--run-limit SECONDS] [--memory-limit MB] [--grace SECONDS] [--time-budget SECONDS]

`each` is one run of every model and every experiment that the smoke profile has, as it has them. Runs go to
FOLDER/runs, results to FOLDER/results. The exit code is that of `reproduce`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

if TYPE_CHECKING:
    from replicate.runs.spec import AnySpec

ROOT = Path(__file__).resolve().parents[2]
#: a run of each of the five families, and one that is fitted in one go; a second or two each
FAMILIES = (
    "realnvp:two-gaussians:120",
    "vae:two-gaussians:150",
    "neural-ebm:two-gaussians:30",
    "sde-vp:two-gaussians:150",
    "causal-conv:two-gaussians:100",
    "gaussian-mixture:two-gaussians",
)
#: instead of runs
EACH = "each"


def command(folder: Path, *words: str) -> list[str]:
    """The command line of a small sweep."""
    return [sys.executable, str(Path(__file__).resolve()), str(folder), *words]


def call(folder: Path, *words: str, plug_ins: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run one to its end.

    Args:
        plug_ins: a folder with packages and their entry points to be found beside ours.
    """
    return subprocess.run(
        command(folder, *words), cwd=ROOT, env=environment(plug_ins), capture_output=True, text=True, timeout=900
    )


def here(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run one to its end in this process, where a process of its own is not the point."""
    import torch

    from replicate.cli.command import guarded
    from replicate.runs.identity import plug_in
    from replicate.runs.provenance import source_here, source_version

    for asked in (source_version, source_here, plug_in):
        asked.cache_clear()  # a process of its own looks at the files as they are now
    out, err, code = StringIO(), StringIO(), 0
    before = torch.are_deterministic_algorithms_enabled()
    try:
        with redirect_stdout(out), redirect_stderr(err):
            guarded(lambda: main([str(folder), *words, "--in-process"]))
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        torch.use_deterministic_algorithms(before)
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())


def environment(plug_ins: Path | None = None) -> dict[str, str]:
    """The environment of one."""
    paths = [str(plug_ins)] if plug_ins else []
    return {**os.environ, "PYTHONPATH": os.pathsep.join([*paths, str(ROOT)]), "MPLBACKEND": "Agg"}


def untimed(folder: Path) -> str:
    """FOLDER's measurements.csv without what a clock or the memory gives."""
    from replicate.report.labels import is_timing

    path = folder / "results" / "smoke" / "measurements.csv"
    frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    return str(frame[~frame["metric"].map(is_timing)].to_csv(index=False))


def each() -> list[AnySpec]:
    """The first run of every model and of every experiment in the smoke profile."""
    from replicate.runs.spec import ExperimentSpec
    from replicate.sweeps.plan import whole_plan

    first: dict[str, AnySpec] = {}
    for spec in whole_plan("smoke")[0]:
        first.setdefault(spec.task if isinstance(spec, ExperimentSpec) else spec.model, spec)
    return list(first.values())


def chosen(runs: Sequence[str]) -> list[AnySpec]:
    """The specs of the words on the command line."""
    from dataclasses import replace

    from replicate.runs.spec import make_spec

    if list(runs) == [EACH]:
        return each()
    specs = []
    for text in runs:
        model, task, *steps = text.split(":")
        spec = make_spec(model, task, 0, "smoke")
        if steps:
            spec = replace(spec, training=replace(spec.training, steps=int(steps[0]), validate_every=50))
        specs.append(spec)
    return specs


def main(words: Sequence[str] | None = None) -> None:
    """See the module."""
    from rich.console import Console

    from replicate.ledger.tables import Claims
    from replicate.runs.inline import Inline
    from replicate.runs.limits import Limits
    from replicate.runs.pool import Pool, slots
    from replicate.runs.progress import Progress
    from replicate.sweeps.plan import SweepPlan
    from replicate.sweeps.reproduce import SweepOptions, reproduce

    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--in-process", action="store_true")
    parser.add_argument("--scheduler")
    parser.add_argument("--every", type=float, default=0.2)
    parser.add_argument("--run-limit", type=float, default=100.0)
    parser.add_argument("--memory-limit", type=int)
    parser.add_argument("--grace", type=float, default=20.0)
    parser.add_argument("--time-budget", type=float)
    told = parser.parse_args(words)
    limits = Limits(told.run_limit, told.memory_limit, told.every, told.grace)
    if told.scheduler:
        from replicate.runs.cluster import Cluster

        executor = Cluster(told.scheduler, "cpu", limits)
    elif told.in_process:
        executor = Inline(limits)
    else:
        executor = Pool(slots("cpu", told.jobs), limits)
    folder, progress = told.folder, Progress(Console(width=300))
    options = SweepOptions(executor, Claims(), folder / "runs", folder / "results", progress, told.time_budget)
    raise SystemExit(reproduce(SweepPlan("smoke", tuple(chosen(told.runs))), options))


if __name__ == "__main__":
    from replicate.cli.command import guarded

    guarded(main)
