"""Compute runs on the workers of a Dask cluster, one run per task.

Dask chooses a worker for each run and reschedules the run when that worker goes away. `Cluster` submits no more runs
than there are slots, reports what happens to each, and writes the files that they return. No disk is shared: a run is
computed in a child program of its worker, in a folder of that worker, and its files return as bytes.

A run that is stopped by the deadline, by an interrupt or by its time limit saves itself and returns its newest
checkpoint; the next call sends it out again. When a worker dies, the checkpoints of its run are lost, and the run
starts from its beginning.

Dask's own messages are pickles, on both sides; whoever can reach the scheduler can run code on its workers and in this
process. The suite itself sends JSON and bytes, and takes nothing from a worker but bytes under names that it knows.
`distributed` is an optional extra, so it is imported where it is used.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import platform
import re
import shutil
import sys
import time
import uuid
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from queue import SimpleQueue
from subprocess import DEVNULL, PIPE, Popen, TimeoutExpired
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from replicate.errors import ClusterLost, UsageError
from replicate.runs.child import STDERR, STDERR_TAIL, STOPPED, make_ready
from replicate.runs.execute import check_data, failure
from replicate.runs.executor import Listener, RunFolders, outcome
from replicate.runs.identity import GROUPS, identify, is_own
from replicate.runs.limits import DEFAULT, Limits
from replicate.runs.provenance import LIBRARIES, UNKNOWN, source_sha256, source_version
from replicate.runs.server import ONE_THREAD
from replicate.runs.spec import AnySpec, spec_from_dict
from replicate.runs.store import read_record, write_atomic, write_json
from replicate.tasks.loading import forget_tasks

if TYPE_CHECKING:
    from distributed import Client, Future, Worker

#: seconds that a scheduler has to answer
CONNECT = 10.0
#: seconds that the workers have to describe themselves, reading and hashing the data included
INSPECT = 300.0
#: seconds that a cluster may be without any worker; a nanny restarts one in less
PATIENCE = 30.0
#: seconds between two looks at results, and at a child
TICK = 0.1
#: seconds beyond a run's own grace in which its checkpoint must have returned
RETURN = 10.0
#: files of a run's folder that return, in the order in which they are written: the record last
FILES = (STDERR, "failure.json", "arrays.npz", "model.safetensors", "record.json")
CHECKPOINT = re.compile(r"\d{8}\.checkpoint")


# -- versions of both sides


def versions(device: str) -> dict[str, str]:
    """Return by name what must not differ between this process and any that computes for it.

    Args:
        device: with "cuda" the build of torch may differ: a machine without a GPU may lead machines with one.
    """
    commit, dirty = source_version()
    found = {"commit": commit[:12], "uncommitted changes": dirty[:12], "source files": source_sha256()[:12]}
    found |= {"Python": platform.python_version(), **{name: metadata.version(name) for name in LIBRARIES}}
    if device == "cuda":
        found["torch"] = found["torch"].partition("+")[0]
    points = [(kind, point) for kind, group in GROUPS.items() for point in metadata.entry_points(group=group.group)]
    plugged = {f"plug-in {kind}:{point.name}": identify(point) for kind, point in points if not is_own(point)}
    return found | {
        key: f"{one['package']} {one['version']} of sources {one['sha256'][:12]}" for key, one in plugged.items()
    }


def differences(here: dict[str, str], there: dict[str, str]) -> list[str]:
    """Return one phrase per difference between two sides, with both values; an unknown commit is no difference."""
    labels = ("commit", "uncommitted changes")
    silent = [name for name in labels if UNKNOWN in (here.get(name), there.get(name))]
    names = [name for name in {**here, **there} if here.get(name) != there.get(name) and name not in silent]
    return [f"{name} {there.get(name) or 'none'} there, {here.get(name) or 'none'} here" for name in names]


async def inspect_worker(device: str, specs: list[dict[str, Any]]) -> tuple[dict[str, str], list[str]]:
    """On a worker: return its versions, and what is wrong with its data of these specs."""
    return await asyncio.to_thread(_inspected, device, specs)  # the worker must keep answering


def _inspected(device: str, specs: list[dict[str, Any]]) -> tuple[dict[str, str], list[str]]:
    problems = []
    for spec in specs:
        try:
            check_data(spec_from_dict(spec))
        except (ValueError, OSError) as error:
            problems.append(str(error))
    forget_tasks()  # a worker computes in child programs and must not keep the data itself
    return versions(device), problems


# -- on a worker

#: tokens of sweeps whose runs must save themselves and stop
_ended: set[str] = set()


def end_sweep(token: str) -> None:
    """On a worker: let every run of a sweep save itself and stop."""
    _ended.add(token)


def compute(request: str, checkpoint: bytes) -> dict[str, Any]:
    """Compute one run in a child program of this worker, in a folder of its own; this is the task that Dask gets.

    Args:
        request: JSON of a request that `_Sweep` makes.
        checkpoint: of an earlier session, or empty.

    Returns:
        worker: its address. refused: why nothing was computed, or "". code: the child's exit code. timed_out: whether
        it was stopped for the time it took. files: the run's files by name.
    """
    from distributed import get_worker

    worker, asked = get_worker(), json.loads(request)
    found: dict[str, Any] = {"worker": worker.address, "refused": "", "code": STOPPED, "timed_out": False, "files": {}}
    wrong = differences(asked["versions"], versions(asked["device"]))
    if wrong or asked["token"] in _ended:
        return {**found, "refused": "; ".join(wrong)}
    with TemporaryDirectory(prefix="run-", dir=worker.local_directory) as folder:
        root = Path(folder)
        if checkpoint:
            (root / "checkpoints").mkdir()
            write_atomic(root / "checkpoints" / asked["checkpoint"], checkpoint)
        code, timed_out = _run_child(worker, asked, root)
        return {**found, "code": code, "timed_out": timed_out, "files": _left(root)}


def _run_child(worker: Worker, asked: dict[str, Any], folder: Path) -> tuple[int, bool]:
    """Run a child; when its time is used up or its task is cancelled, let it save itself, then kill it.

    The child imports the files of this process, which were compared, and none of the current folder. Its standard input
    stays open: the child ends when this process does.

    Returns:
        The exit code, and whether the child was stopped for the time it took.
    """
    environment = {**os.environ, **dict.fromkeys(ONE_THREAD, "1"), "PYTHONPATH": os.pathsep.join(sys.path)}
    environment.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    command = [sys.executable, "-P", "-m", "replicate.runs.child"]
    given = {"spec": asked["spec"], "folder": str(folder), "limits": asked["limits"], "visible": None}
    with open(folder / STDERR, "ab") as log:
        child = Popen(command, bufsize=0, stdin=PIPE, stdout=DEVNULL, stderr=log, env=environment)
    assert child.stdin is not None
    with suppress(BrokenPipeError):  # it has ended already; its exit code says so
        child.stdin.write(json.dumps(given).encode() + b"\n")
    worker.log_event(asked["token"], {"key": asked["key"], "worker": worker.address})
    limits, stopping, timed_out = Limits(**asked["limits"]), False, False
    ends = time.monotonic() + limits.seconds
    try:
        while True:
            with suppress(TimeoutExpired):
                return child.wait(TICK), timed_out
            if stopping and time.monotonic() >= ends:
                child.kill()
            elif not stopping and (time.monotonic() >= ends or not _wanted(worker, asked["key"], asked["token"])):
                timed_out = time.monotonic() >= ends
                stopping, ends = True, time.monotonic() + limits.grace
                child.terminate()
    finally:
        child.kill()
        child.wait()
        child.stdin.close()


def _wanted(worker: Worker, key: str, token: str) -> bool:
    """Return whether a client still waits for a task and neither the worker nor the sweep is ending."""
    task = worker.state.tasks.get(key)
    closing = worker.status.name in ("closing", "closed", "failed")
    return not closing and token not in _ended and task is not None and task.state != "cancelled"


def _left(folder: Path) -> dict[str, bytes]:
    """Return a run's files and, where it is not finished, its newest checkpoint."""
    files = {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}
    if STDERR in files:
        files[STDERR] = files[STDERR][-STDERR_TAIL:]
    for path in sorted(folder.glob("checkpoints/*.checkpoint"))[-1:]:
        files[path.name] = path.read_bytes()
    return files


# -- in this process


class Cluster:
    """An `Executor` on a Dask cluster. It connects anew for each sweep; the cluster itself stays up.

    Args:
        address: of the scheduler, such as tcp://127.0.0.1:8786.
        device: "cpu": a worker takes a run per thread; or "cuda": a run per unit of its resource GPU.
        limits: of each run.

    Raises:
        UsageError: `distributed` is not installed, nothing answers at the address, or no worker there can take a run.
    """

    def __init__(self, address: str, device: str, limits: Limits = DEFAULT) -> None:
        self.address, self.device, self.limits = address, device, limits
        with _connected(address) as client:
            self.jobs = _wait_for_slots(client, address, device)  # with the workers that are there at first

    def run_all(
        self, specs: Sequence[AnySpec], runs: RunFolders, listen: Listener, deadline: float | None = None
    ) -> bool:
        """See `Executor`.

        Raises:
            UsageError: a worker has other code, libraries or data than this process, or no scheduler answers.
            ClusterLost: the scheduler or the last worker went away.
            OSError: the runs' folder cannot be written.
        """
        waiting = list(runs.missing(specs))
        if not waiting:
            return True
        with _connected(self.address) as client:
            try:
                _wait_for_slots(client, self.address, self.device)
                _check_workers(client, self.device, waiting)
                return _Sweep(client, self, runs, listen).run(waiting, deadline)
            except OSError as error:
                if error.errno is not None or isinstance(error, ClusterLost):  # the disk's errors have a number
                    raise
                raise ClusterLost(f"the cluster at {self.address} does not answer ({_first_line(error)})") from None


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0]


async def _who_answers(address: str) -> str:
    """Return the kind of Dask server at an address."""
    from distributed import Security, rpc

    async with rpc(address, connection_args=Security().get_connection_args("client")) as server:
        return str((await server.identity())["type"])


@contextmanager
def _connected(address: str) -> Iterator[Client]:
    """Connect a client to the scheduler for a while, Dask's log switched off: this module reports what matters, once.

    Raises:
        UsageError: none answers there, or `distributed` is not installed.
    """
    try:
        import distributed
    except ImportError:
        raise UsageError(
            "a cluster needs Dask, which is not installed; `pip install 'scoreboard-replicate[cluster]'`."
        ) from None
    for name in ("distributed", "distributed.client", "tornado.application", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:  # a client that cannot connect never closes completely, so ask first
        found = asyncio.run(asyncio.wait_for(_who_answers(address), CONNECT))
        reason = "" if found == "Scheduler" else f"a {found} does"
    except Exception as error:  # the exception depends on the program that answers there
        reason = _first_line(error) or f"none within {CONNECT:g} seconds"
    if reason:
        raise UsageError(
            f"no Dask scheduler answers at {address} ({reason}); start one with `dask scheduler`, or fix --scheduler."
        )
    client = distributed.Client(address, timeout=CONNECT, set_as_default=False, name="replicate")
    try:
        yield client
    finally:
        with suppress(OSError):
            client.close(timeout=CONNECT)


def _slots(client: Client, device: str) -> dict[str, int]:
    """Return the number of runs that each worker takes at a time, by its address."""
    offered = {}
    for address, worker in client.scheduler_info(n_workers=-1).get("workers", {}).items():
        threads = int(worker["nthreads"])
        offered[address] = min(threads, int(worker["resources"].get("GPU", 0))) if device == "cuda" else threads
    return offered


def _wait_for_slots(client: Client, address: str, device: str) -> int:
    """Return the number of runs that the cluster takes at a time; wait for the first worker.

    Raises:
        UsageError: there is no worker, or none with the resources of the runs.
    """
    with suppress(TimeoutError):
        client.wait_for_workers(1, PATIENCE)
    offered, gpu = _slots(client, device), " --resources GPU=1" if device == "cuda" else ""
    if not offered:
        raise UsageError(
            f"the scheduler at {address} has no workers; start some with `dask worker {address} --nthreads 1{gpu}`."
        )
    if not any(offered.values()):
        raise UsageError(
            f"none of the {len(offered)} workers at {address} offers the resource GPU; start one for each GPU with "
            f"`CUDA_VISIBLE_DEVICES=0 dask worker {address} --nthreads 1{gpu}`, or use --device cpu."
        )
    return sum(offered.values())


def _check_workers(client: Client, device: str, specs: Sequence[AnySpec]) -> None:
    """Compare code, libraries and data of every worker with those of this process.

    Raises:
        UsageError: every worker that differs and how, one per line.
    """
    data = {s.data_key: s.as_dict() for s in specs}
    here = versions(device)
    found = client.run(inspect_worker, device, list(data.values()), on_error="return", callback_timeout=INSPECT)
    problems = []
    for worker, answer in sorted(found.items()):
        if not isinstance(answer, Exception):
            there, wrong = answer
            if wrong := [*differences(here, there), *wrong]:
                problems.append(f"{worker}: {'; '.join(wrong)}")
        elif not _gone(client, worker, device):  # if it died meanwhile, its runs will be reported as lost
            problems.append(f"{worker}: it cannot describe itself ({type(answer).__name__}: {answer})")
    if problems:
        advice = "give every worker the same checkout, lock file and data, and start it again"
        raise UsageError("\n".join([f"workers differ from this program; {advice}:", *problems]))


def _gone(client: Client, worker: str, device: str) -> bool:
    """Return whether the scheduler has lost this worker, or notices it within seconds."""
    end = time.monotonic() + CONNECT
    while (there := worker in _slots(client, device)) and time.monotonic() < end:
        time.sleep(TICK)
    return not there


@dataclass
class _Flight:
    """A run that Dask has, and the address of the worker that runs it; "" where it has not started."""

    spec: AnySpec
    folder: Path
    future: Future
    worker: str = ""


class _Sweep:
    """One call of `Cluster.run_all`."""

    def __init__(self, client: Client, cluster: Cluster, runs: RunFolders, listen: Listener) -> None:
        from distributed import as_completed

        self.client, self.cluster, self.runs, self.listen = client, cluster, runs, listen
        self.token = f"replicate-{uuid.uuid4().hex}"
        self.versions = versions(cluster.device)
        self.flights: dict[str, _Flight] = {}
        self.slots, self.idle_since = 0, time.monotonic()
        self.done = as_completed(loop=client.loop, with_results=True, raise_errors=False)
        self.events: SimpleQueue[tuple[str, dict[str, Any]]] = SimpleQueue()
        self.events.put(("add-worker", {}))  # those that are there already
        client.subscribe_topic(self.token, lambda event: self.events.put(("started", event[1])))
        # the scheduler reports workers that come and go there
        client.subscribe_topic("all", lambda event: self.events.put((event[1].get("action", ""), event[1])))

    def run(self, specs: Sequence[AnySpec], deadline: float | None) -> bool:
        """Do the work of `Cluster.run_all`, connected."""
        waiting = deque(specs)
        try:
            while waiting or self.flights:
                if deadline is not None and time.monotonic() >= deadline:
                    return False
                self._check_scheduler()
                self._hear()
                while waiting and len(self.flights) < self.slots:
                    self._submit(waiting.popleft())
                for future, result in self._back():
                    self._finish(future, result)
            return True
        finally:
            try:
                if self.flights and self.slots and self.client.status == "running":
                    self._save()
            finally:
                for flight in self.flights.values():
                    flight.future.release()

    def _save(self) -> None:
        """Let running runs save themselves, and keep their checkpoints."""
        try:
            self.client.run(end_sweep, self.token, on_error="ignore", callback_timeout=CONNECT)
        except OSError:
            return  # unreachable workers stop when the client disconnects; their checkpoints are lost
        end = time.monotonic() + self.cluster.limits.grace + RETURN
        while self.flights and time.monotonic() < end and self.client.status == "running":
            for future, result in self._back():
                flight = self.flights.pop(str(future.key), None)
                if flight is not None and future.status == "finished":
                    _keep(flight.folder, result["files"])

    def _back(self) -> Iterator[tuple[Future, Any]]:
        """Iterate over the tasks that have ended since the last look; wait a moment where there are none."""
        if not self.done.has_ready():
            time.sleep(TICK)
        while self.done.has_ready():  # one by one, so that none is lost where the reader stops
            yield next(self.done)

    def _submit(self, spec: AnySpec) -> None:
        folder, key = self.runs.folder(spec), f"replicate-{spec.run_id()}-{self.token[-32:]}"
        make_ready(folder)
        newest = max(folder.glob("checkpoints/*.checkpoint"), default=None)
        request = {
            **{"key": key, "token": self.token, "device": self.cluster.device, "versions": self.versions},
            **{"spec": spec.as_dict(), "limits": asdict(self.cluster.limits)},
            "checkpoint": newest.name if newest else "",
        }
        given = json.dumps(request), newest.read_bytes() if newest else b""
        resources = {"GPU": 1} if self.cluster.device == "cuda" else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a checkpoint is large, and meant to be
            future = self.client.submit(compute, *given, key=key, resources=resources, retries=0, pure=False)
        self.flights[key] = _Flight(spec, folder, future)
        self.done.add(future)

    def _hear(self) -> None:
        """Handle the events of the workers and the scheduler; wait for a while when no worker is left."""
        moved = False
        while not self.events.empty():
            action, event = self.events.get()
            moved = moved or action in ("add-worker", "remove-worker")
            if action == "started":
                self._start(event["key"], event["worker"])
            elif action == "remove-worker":
                for key in [*event["processing-tasks"], *event["lost-computed-tasks"]]:
                    self._lose(key, event["worker"])
        if moved:
            self.slots = sum(_slots(self.client, self.cluster.device).values())
        if self.slots:
            self.idle_since = time.monotonic()
        elif time.monotonic() - self.idle_since > PATIENCE:
            raise ClusterLost(f"the scheduler at {self.cluster.address} has no workers left; start some")

    def _start(self, key: str, worker: str) -> None:
        flight = self.flights.get(key)
        if flight is not None and not flight.worker:
            flight.worker = worker
            self.listen("started", flight.spec, f"on {worker}")

    def _lose(self, key: str, worker: str) -> None:
        flight = self.flights.get(key)
        if flight is not None and flight.worker == worker:
            flight.worker = ""
            self.listen("lost", flight.spec, f"worker {worker} went away; rescheduled")

    def _check_scheduler(self, cancelled: bool = False) -> None:
        """Raise when the connection to the scheduler broke, even if it was restored: its tasks are cancelled then."""
        if cancelled or self.client.status != "running":
            raise ClusterLost(f"the scheduler at {self.cluster.address} is gone; start it and its workers again")

    def _finish(self, future: Future, result: Any) -> None:
        """Write the files of a task that has ended, and report it."""
        self._check_scheduler(future.status == "cancelled")
        if future.status == "finished" and not result["refused"]:
            self._start(str(future.key), result["worker"])  # if its start event has not arrived yet
        flight = self.flights.pop(str(future.key))
        if future.status == "error":
            error = _explained(result[1])
            write_json(flight.folder / "failure.json", failure(flight.spec, error))
        elif result["refused"]:
            raise UsageError(
                f"worker {result['worker']} differs from this program: {result['refused']}. Give it the same "
                "checkout and lock file, and start it again."
            )
        else:
            _keep(flight.folder, result["files"])
            exceeded = self.cluster.limits if result["timed_out"] else None
            error = outcome(flight.spec, flight.folder, result["code"], exceeded)
        future.release()
        self.listen("failed" if error else "done", flight.spec, error)


def _explained(error: BaseException) -> str:
    """Return the error of a run whose task itself failed."""
    from distributed import KilledWorker

    if isinstance(error, KilledWorker):
        workers = error.allowed_failures + 1
        return f"it was given up after {workers} workers died with it, the last at {error.last_worker.address}"
    return f"its worker could not run it: {type(error).__name__}: {_first_line(error)}"


def _keep(folder: Path, files: dict[str, bytes]) -> None:
    """Write the files that a run returned into its folder, the record last; ignore files of other names."""
    for name in FILES:
        if name in files:
            write_atomic(folder / name, files[name])
    checkpoints = folder / "checkpoints"
    if read_record(folder) is not None:
        shutil.rmtree(checkpoints, ignore_errors=True)
        return
    for name in filter(CHECKPOINT.fullmatch, files):
        checkpoints.mkdir(exist_ok=True)
        write_atomic(checkpoints / name, files[name])
