"""Kills at random times: every sweep completes on the next call, with the bytes of the undisturbed sweep.

    python tests/chaos.py --kills 200 [--seed N] [--side-by-side 2] [--folder FOLDER]

A sweep of ten runs, two a family, is started, and random processes of it are killed by SIGKILL at random moments:
children that compute, one after the other; or the parent, in up to three calls; or, where a Dask cluster computes,
one of its workers. Then the same command is given once more. It must end well, and its measurements.csv, times and
memory left out, is compared byte for byte with that of an undisturbed sweep. Checkpoints are written every tenth of a
second, so that most kills find some.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from threading import Lock

import psutil
from helpers.small_sweep import FAMILIES, ROOT, call, command, environment, untimed

RUNS = (*FAMILIES, *(f"{name}:two-moons:100" for name in ("realnvp", "vae", "causal-conv", "sde-vp")))
WORDS = ("--every", "0.1", "--jobs", "2")
#: what is killed, and in how many of a hundred sweeps; a cluster has to be started first
MODES = {"children": 50, "parent": 35, "cluster": 15}
#: calls of a sweep whose parent is killed
MOST_CALLS = 3
#: longest time in seconds from one child's end to the next one's
BETWEEN = 1.5


@dataclass(frozen=True)
class Kill:
    """One kill.

    Attributes:
        target: whose process it was: "parent", "child" or "worker".
        after: seconds after the call's start.
        phase: what the sweep was doing: "starting", "training or measuring", "reporting".
    """

    target: str
    after: float
    phase: str


@dataclass(frozen=True)
class Undisturbed:
    """A sweep that nobody disturbs.

    Attributes:
        words: of its command.
        runs: how many it has.
        measurements: what must come of it, see `untimed`.
        seconds: how long it took.
    """

    words: tuple[str, ...]
    runs: int
    measurements: str
    seconds: float


@dataclass(frozen=True)
class Sweep:
    """One sweep and what came of it.

    Attributes:
        kills: in their order.
        resumed: runs whose record names more than one sitting.
        problem: "" if it completed on the call after the last kill, with the same bytes.
    """

    kills: tuple[Kill, ...]
    resumed: int
    problem: str


def alive(process: psutil.Process) -> bool:
    """Whether there is still something to kill."""
    return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)


def computing(parent: psutil.Process) -> list[psutil.Process]:
    """The children that compute: those that have opened their standard error in a run's folder."""
    found = []
    for process in parent.children(recursive=True):
        try:
            if os.readlink(f"/proc/{process.pid}/fd/2").endswith("stderr.txt"):
                found.append(process)
        except OSError:
            continue
    return found


@contextmanager
def cluster(folder: Path) -> Iterator[tuple[str, list[subprocess.Popen[bytes]]]]:
    """A Dask scheduler and two workers on this machine's loopback; yields the address and the workers."""
    told = folder / "scheduler.json"
    log = open(folder / "cluster.log", "wb")  # noqa: SIM115
    own = ("--host", "127.0.0.1", "--dashboard-address", "127.0.0.1:0")
    dask = [sys.executable, "-m", "dask"]

    def start(*words: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([*dask, *words], cwd=folder, env=environment(), stdout=log, stderr=log)

    started = [start("scheduler", "--port", "0", "--scheduler-file", str(told), *own)]
    try:
        places = [folder / f"worker{i}" for i in (1, 2)]
        one = ("--nthreads", "1", "--nworkers", "1", "--no-nanny", "--scheduler-file", str(told))
        started += [start("worker", *one, "--local-directory", str(place), *own) for place in places]
        while not told.exists():
            time.sleep(0.05)
        yield json.loads(told.read_text())["address"], started[1:]
    finally:
        for process in reversed(started):
            process.kill()
            process.wait()
        log.close()


def strike(
    rng: random.Random, target: str, sweep: subprocess.Popen[bytes], workers: list[subprocess.Popen[bytes]]
) -> bool:
    """Kill one process of the kind; False if there is none, for the sweep has ended."""
    parent = psutil.Process(sweep.pid)
    while alive(parent):
        victims = {"parent": [parent], "worker": [psutil.Process(w.pid) for w in workers]}.get(target)
        if victims is None:
            victims = computing(parent)
        if victims:
            try:
                rng.choice(victims).send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                continue
            return True
        time.sleep(0.01)
    return False


def phase(runs: Path, planned: int) -> str:
    """What a sweep of so many runs is doing, as its folder tells."""
    current = runs / "smoke" / "current"
    records, started = len(list(current.glob("*/record.json"))), len(list(current.glob("*/stderr.txt")))
    if not started:
        return "starting"
    return "reporting" if records == planned else "training or measuring"


def disturbed(number: int, seed: int, folder: Path, whole: Undisturbed, modes: Mapping[str, int]) -> Sweep:
    """One sweep, disturbed and called again.

    Args:
        whole: what is disturbed.
        modes: as `MODES`.
    """
    rng = random.Random(f"{seed}/{number}")
    folder.mkdir(parents=True)
    mode = rng.choices(list(modes), list(modes.values()))[0]
    if mode == "cluster":
        with cluster(folder) as (address, workers):  # of whose two workers one must be left
            targets = rng.sample(("worker", "parent"), rng.randint(1, 2))
            # whose runs start an interpreter each
            slower = replace(whole, words=(*whole.words, "--scheduler", address), seconds=2 * whole.seconds)
            return _disturbed(rng, targets, folder, slower, workers)
    targets = ["child"] if mode == "children" else ["parent"] * rng.randint(1, MOST_CALLS)
    return _disturbed(rng, targets, folder, whole, [])


def _disturbed(
    rng: random.Random, targets: list[str], folder: Path, whole: Undisturbed, workers: list[subprocess.Popen[bytes]]
) -> Sweep:
    kills: list[Kill] = []
    code = 1
    for target in targets:
        struck, code = _killed(rng, target, folder, whole, workers)
        kills += struck
        expected = {"parent": (-signal.SIGKILL, 0), "child": (0, 1), "worker": (0,)}[target]
        if code not in expected:
            return Sweep(tuple(kills), 0, f"a call ended with exit code {code} although only a {target} was killed")
        if code == 0:
            break
    if code != 0:
        again = call(folder, *whole.words)
        if again.returncode != 0:
            return Sweep(
                tuple(kills), 0, f"the next call ended with {again.returncode}: {(again.stdout + again.stderr)[-500:]}"
            )
    records = [json.loads(p.read_text()) for p in (folder / "runs" / "smoke" / "finished").glob("*/record.json")]
    resumed = sum(len(r["provenance"]["sittings"]) > 1 for r in records)
    same = untimed(folder) == whole.measurements
    return Sweep(tuple(kills), resumed, "" if same else "its measurements are not those of the undisturbed sweep")


def _killed(
    rng: random.Random, target: str, folder: Path, whole: Undisturbed, workers: list[subprocess.Popen[bytes]]
) -> tuple[list[Kill], int]:
    """One call of the sweep, the kills that it suffered before it ended, and its exit code."""
    quiet, begin, kills = subprocess.DEVNULL, time.monotonic(), list[Kill]()
    sweep = subprocess.Popen(command(folder, *whole.words), cwd=ROOT, env=environment(), stdout=quiet, stderr=quiet)
    wait = rng.uniform(0.3, whole.seconds if target != "child" else BETWEEN)
    while True:
        try:
            return kills, sweep.wait(wait)
        except subprocess.TimeoutExpired:
            doing = phase(folder / "runs", whole.runs)
        if strike(rng, target, sweep, workers):
            kills.append(Kill(target, time.monotonic() - begin, doing))
        if target != "child":
            return kills, sweep.wait()
        wait = rng.uniform(0.1, BETWEEN)


def undisturbed(folder: Path) -> Undisturbed:
    """Make the sweep that the disturbed ones are held to."""
    begin, words = time.monotonic(), (*RUNS, *WORDS)
    done = call(folder, *words)
    if done.returncode != 0:
        raise SystemExit(f"the undisturbed sweep failed: {done.stdout}{done.stderr}")
    return Undisturbed(words, len(RUNS), untimed(folder), time.monotonic() - begin)


def chaos(kills: int, seed: int, side_by_side: int, folder: Path) -> list[Sweep]:
    """Disturbed sweeps with at least so many kills in all; every one is printed as it ends."""
    whole = undisturbed(folder / "undisturbed")
    measured = whole.measurements.count("\n") - 1
    print(f"{whole.runs} runs, {measured} measurements, {whole.seconds:.1f} s undisturbed; seed {seed}")
    numbers, sweeps, lock = count(), [], Lock()

    def work() -> None:
        while sum(len(s.kills) for s in sweeps) < kills and not any(s.problem for s in sweeps):
            with lock:
                number = next(numbers)
            place = folder / f"sweep-{number}"
            sweep = disturbed(number, seed, place, whole, MODES)
            shutil.rmtree(place)
            with lock:
                sweeps.append(sweep)
                told = (
                    ", ".join(f"{k.target} after {k.after:.1f} s while {k.phase}" for k in sweep.kills) or "not killed"
                )
                end = sweep.problem or f"same bytes, {sweep.resumed} runs went on from a checkpoint"
                print(f"{sum(len(s.kills) for s in sweeps)} kills: sweep {number}: {told}: {end}", flush=True)

    with ThreadPoolExecutor(side_by_side) as pool:
        for ended in [pool.submit(work) for _ in range(side_by_side)]:
            ended.result()
    return sweeps


def summary(sweeps: list[Sweep]) -> str:
    """The figures of a whole test, in lines."""
    kills = [kill for sweep in sweeps for kill in sweep.kills]
    targets = ", ".join(f"{n} of a {target}" for target, n in sorted(Counter(k.target for k in kills).items()))
    phases = ", ".join(f"{n} while {what}" for what, n in sorted(Counter(k.phase for k in kills).items()))
    killed = [s for s in sweeps if s.kills]
    good = sum(not s.problem for s in killed)
    return (
        f"{len(kills)} kills in {len(killed)} sweeps ({targets}; {phases})\n"
        f"{sum(s.resumed for s in sweeps)} runs went on from a checkpoint\n"
        f"{good} of {len(killed)} killed sweeps completed on the next call with the bytes of the undisturbed one"
    )


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--side-by-side", type=int, default=2)
    parser.add_argument("--folder", type=Path)
    told = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="chaos-") as temporary:
        sweeps = chaos(told.kills, told.seed, told.side_by_side, told.folder or Path(temporary))
    print(summary(sweeps))
    sys.exit(any(s.problem for s in sweeps))


if __name__ == "__main__":
    main()
