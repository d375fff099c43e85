"""A real Dask scheduler and real workers on loopback: the same bytes as here, whoever of them is killed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch

from replicate.errors import ClusterLost, UsageError
from replicate.report.labels import is_timing
from replicate.runs import cluster as module
from replicate.runs.cluster import Cluster
from replicate.runs.executor import Event, RunFolders
from replicate.runs.inline import Inline
from replicate.runs.limits import Limits
from replicate.runs.pool import Pool
from replicate.runs.provenance import source_version
from replicate.runs.spec import AnySpec, make_spec
from replicate.runs.store import read_record

pytest.importorskip("distributed", reason="Dask is not installed; `pip install 'scoreboard-replicate[cluster]'`")
import psutil  # comes with it

MODELS = ("marginals", "causal-conv", "vae", "neural-ebm")
SPECS = [make_spec(model, "two-moons", profile="smoke") for model in MODELS]
#: of these, computed on a cluster whose worker is killed, and on one that nobody disturbs
DISTURBED, UNDISTURBED = SPECS[:2], SPECS[2:]
DIVERGES = make_spec("realnvp", "two-moons", profile="smoke", settings={"lr": 1e30})
LONG = make_spec("realnvp", "two-moons", profile="smoke", settings={"steps": 600})
LIMITS = Limits(seconds=300.0, checkpoint_every=0.1)
#: also for the pages with which scheduler and workers show themselves
LOOPBACK = ("--host", "127.0.0.1", "--dashboard-address", "127.0.0.1:0")
#: seconds that anything here may take before the test is given up
PATIENCE = 120.0


@dataclass
class Dask:
    """A scheduler and workers, each a program of its own."""

    root: Path
    programs: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, *words: str) -> subprocess.Popen[bytes]:
        """Start `dask` with the words, its log in a file."""
        with open(self.root / f"{len(self.programs)}.log", "wb") as log:
            command = [sys.executable, "-m", "dask", *words, *LOOPBACK]
            program = subprocess.Popen(command, stdout=log, stderr=log, cwd=self.root)
        self.programs.append(program)
        return program

    def scheduler(self) -> subprocess.Popen[bytes]:
        """Start a scheduler on a free port."""
        self.file.unlink(missing_ok=True)
        program = self.start("scheduler", "--port", "0", "--scheduler-file", str(self.file))
        until(self.announced)
        return program

    def announced(self) -> bool:
        """Whether the file is there and written to its end: dask opens it before it writes."""
        try:
            return bool(self.address)
        except (FileNotFoundError, json.JSONDecodeError):
            return False

    def worker(self, *words: str) -> subprocess.Popen[bytes]:
        """Start a worker of one thread."""
        given = ("--nthreads", "1", "--nworkers", "1", "--no-nanny", "--local-directory", str(self.root))
        return self.start("worker", "--scheduler-file", str(self.file), *given, *words)

    @property
    def file(self) -> Path:
        """Where the scheduler says where it is."""
        return self.root / "scheduler.json"

    @property
    def address(self) -> str:
        """Of the scheduler."""
        return str(json.loads(self.file.read_text())["address"])

    def end(self) -> None:
        """Kill what is left."""
        for program in self.programs:
            program.kill()
        for program in self.programs:
            program.wait()


@contextmanager
def dask(root: Path, workers: int) -> Iterator[Dask]:
    """A cluster for a while."""
    source_version.cache_clear()  # the workers look at the files as they are now
    found = Dask(root)
    try:
        found.scheduler()
        for _ in range(workers):
            found.worker()
        yield found
    finally:
        found.end()


def refusal(address: str, device: str) -> str:
    """What `Cluster` has against an address, or "" where it takes it; it does not wait long for a worker."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PATIENCE", 0.5)
        try:
            assert Cluster(address, device, LIMITS).jobs == 1
        except UsageError as error:
            return str(error)
    return ""


@pytest.fixture(scope="module")
def growing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Dask, dict[str, str]]]:
    """A cluster, and what was refused while it had no worker, then one without a GPU."""
    with dask(tmp_path_factory.mktemp("dask"), workers=0) as found:
        refused = {"no worker": refusal(found.address, "cpu")}
        found.worker()
        until(lambda: len(offers(found.address)) == 1)
        refused |= {device: refusal(found.address, device) for device in ("cpu", "cuda")}
        yield found, refused


@pytest.fixture
def shared(growing: tuple[Dask, dict[str, str]]) -> Dask:
    """The cluster with both its workers; the one with a GPU is started again where a test has killed it."""
    found = growing[0]
    if len(offers(found.address)) < 2:
        found.worker("--resources", "GPU=1")
        until(lambda: len(offers(found.address)) == 2)
    return found


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> RunFolders:
    """The specs through the pool, undisturbed."""
    runs = RunFolders(tmp_path_factory.mktemp("pool"))
    assert Pool([None, None]).run_all(SPECS, runs, ignore)
    return runs


def until(condition) -> None:  # type: ignore[no-untyped-def]
    """Wait for something to become true."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.05)


def ignore(outcome: Event, spec: AnySpec, line: str) -> None:
    """A listener that does not care."""


def content(runs: RunFolders, spec: AnySpec) -> tuple[object, ...]:
    """All of a run that must not depend on where it was computed."""
    folder = runs.folder(spec)
    record = read_record(folder)
    assert record is not None
    with np.load(folder / "arrays.npz") as found:
        arrays = {name: found[name].tobytes() for name in found}
    measurements = [m for m in record["measurements"] if not is_timing(m["metric"])]
    assert measurements
    return record["weights_sha256"], (folder / "model.safetensors").read_bytes(), measurements, arrays


def same(one: RunFolders, other: RunFolders, specs: list[AnySpec]) -> bool:
    """Whether all these runs have the same content in both."""
    return [content(one, s) for s in specs] == [content(other, s) for s in specs]


def children(program: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The runs of a worker."""
    return psutil.Process(program.pid).children()


def test_the_same_specs_give_the_same_bytes_on_a_cluster_in_a_pool_and_inline_and_a_failure_stays_one(
    shared: Dask, reference: RunFolders, tmp_path: Path
) -> None:
    told: list[tuple[Event, str]] = []
    cluster, runs = Cluster(shared.address, "cpu", LIMITS), RunFolders(tmp_path / "cluster")
    assert cluster.jobs == 2
    assert cluster.run_all([DIVERGES, *UNDISTURBED], runs, lambda o, s, _: told.append((o, s.run_id())))
    for spec in UNDISTURBED:
        assert [o for o, run_id in told if run_id == spec.run_id()] == ["started", "done"]
    assert same(runs, reference, UNDISTURBED)

    assert [o for o, run_id in told if run_id == DIVERGES.run_id()] == ["started", "failed"]
    left = json.loads((runs.folder(DIVERGES) / "failure.json").read_text())
    assert "training loss is" in left["error"]
    assert left["spec"] == DIVERGES.as_dict()
    assert "train" in left["traceback_tail"]
    assert isinstance(left["stderr_tail"], str)

    inline, before = RunFolders(tmp_path / "inline"), torch.are_deterministic_algorithms_enabled()
    try:
        assert Inline().run_all(SPECS, inline, ignore)
    finally:
        torch.use_deterministic_algorithms(before)
    assert same(inline, reference, SPECS)


@pytest.mark.slow
def test_an_interrupted_run_sends_its_checkpoint_back_and_goes_on_from_it(shared: Dask, tmp_path: Path) -> None:
    whole = RunFolders(tmp_path / "pool")
    assert Pool([None]).run_all([LONG], whole, ignore)
    runs, cluster = RunFolders(tmp_path / "cluster"), Cluster(shared.address, "cpu", LIMITS)

    def interrupt() -> None:
        until(lambda: list(shared.root.rglob("*.checkpoint")))
        os.kill(os.getpid(), signal.SIGINT)

    thread = Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        cluster.run_all([LONG], runs, ignore)
    thread.join()
    assert len(list(runs.folder(LONG).glob("checkpoints/*.checkpoint"))) == 1
    assert not list(shared.root.rglob("run-*"))
    assert cluster.run_all([LONG], runs, ignore)
    record = read_record(runs.folder(LONG))
    assert record is not None
    assert len(record["provenance"]["sittings"]) == 2
    assert not (runs.folder(LONG) / "checkpoints").exists()
    assert same(runs, whole, [LONG])


def test_a_deadline_that_has_passed_starts_nothing(shared: Dask, tmp_path: Path) -> None:
    runs = RunFolders(tmp_path)
    assert not Cluster(shared.address, "cpu", LIMITS).run_all(SPECS, runs, pytest.fail, time.monotonic())
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_killed_scheduler_keeps_finished_runs_and_a_new_one_resumes(
    tmp_path: Path, reference: RunFolders, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "CONNECT", 5.0)
    runs, killed = RunFolders(tmp_path / "runs"), []

    with dask(tmp_path, workers=1) as found:

        def kill(outcome: Event, spec: AnySpec, line: str) -> None:
            if outcome == "started" and spec == SPECS[1]:
                found.programs[0].kill()
                killed.append(time.monotonic())

        cluster = Cluster(found.address, "cpu", LIMITS)
        with pytest.raises(ClusterLost, match=f"the scheduler at {found.address} is gone") as caught:
            cluster.run_all(SPECS[:2], runs, kill)
        assert time.monotonic() - killed[0] < 30
        assert len(str(caught.value).splitlines()) == 1
        assert capfd.readouterr().err == ""
        with pytest.raises(UsageError, match="no Dask scheduler answers"):
            cluster.run_all(SPECS[:2], runs, ignore)
        assert [read_record(runs.folder(s)) is not None for s in SPECS[:2]] == [True, False]

        found.scheduler()
        found.worker()
        told: list[Event] = []
        assert Cluster(found.address, "cpu", LIMITS).run_all(SPECS[:2], runs, lambda o, _, __: told.append(o))
    assert told == ["started", "done"]
    assert same(runs, reference, SPECS[:2])


@pytest.mark.slow
def test_run_that_kills_every_worker_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES", "0")
    with dask(tmp_path, workers=1) as found:

        def kill(outcome: Event, spec: AnySpec, line: str) -> None:
            told.append(outcome)
            if outcome == "started":
                found.programs[1].kill()

        told: list[Event] = []
        runs = RunFolders(tmp_path / "runs")
        assert Cluster(found.address, "cpu", LIMITS).run_all(SPECS[:1], runs, kill)
    assert told[-1] == "failed"
    left = json.loads((runs.folder(SPECS[0]) / "failure.json").read_text())
    assert "1 workers died with it" in left["error"]


def test_a_cluster_where_no_worker_can_take_a_run_is_refused_with_the_way_to_start_one(
    growing: tuple[Dask, dict[str, str]],
) -> None:
    found, refused = growing
    assert f"has no workers; start some with `dask worker {found.address}" in refused["no worker"]
    assert refused["cpu"] == ""
    assert re.search(r"none of the 1 workers .* --resources GPU=1", refused["cuda"])


def test_workers_with_other_code_are_refused_before_work_is_sent(
    shared: Dask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true = module.versions
    monkeypatch.setattr(module, "versions", lambda device: {**true(device), "torch": "1.0"})
    with pytest.raises(UsageError) as caught:
        Cluster(shared.address, "cpu", LIMITS).run_all(SPECS, RunFolders(tmp_path), pytest.fail)
    head, *lines = str(caught.value).splitlines()
    assert "give every worker the same checkout" in head
    assert len(lines) == 2
    for line in lines:
        assert line.startswith("tcp://127.0.0.1:")
        assert line.endswith(f"torch {true('cpu')['torch']} there, 1.0 here")
    assert not list(tmp_path.iterdir())


def test_workers_with_other_data_are_refused_before_work_is_sent(shared: Dask, tmp_path: Path) -> None:
    other = replace(SPECS[0], data_sha256="0" * 64)
    with pytest.raises(UsageError, match="the data of two-moons on this machine have sha256"):
        Cluster(shared.address, "cpu", LIMITS).run_all([other], RunFolders(tmp_path), pytest.fail)


@pytest.mark.slow
def test_later_worker_with_other_code_ends_the_sweep(
    shared: Dask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true = module.versions
    monkeypatch.setattr(module, "_check_workers", lambda *_: None)  # as if it had not been there
    monkeypatch.setattr(module, "versions", lambda device: {**true(device), "source files": "mine"})
    cluster, begin = Cluster(shared.address, "cpu", LIMITS), time.monotonic()
    with pytest.raises(UsageError, match=r"worker tcp://.* differs from this program: source files \w+ there, mine h"):
        cluster.run_all(SPECS, RunFolders(tmp_path), pytest.fail)
    assert time.monotonic() - begin < LIMITS.grace
    assert not list(tmp_path.rglob("*.json"))


@pytest.mark.slow
def test_a_run_that_wants_a_gpu_goes_to_the_worker_that_offers_one(shared: Dask, tmp_path: Path) -> None:
    (gpu,) = (address for address, offered in offers(shared.address).items() if "GPU" in offered)
    cluster, told = Cluster(shared.address, "cuda", LIMITS), []
    assert cluster.jobs == 1
    wants = replace(SPECS[0], device="cuda")
    assert cluster.run_all([wants], RunFolders(tmp_path), lambda o, _, line: told.append((o, line)))
    assert told[0] == ("started", f"on {gpu}")


def test_runs_of_a_killed_worker_are_reported_lost_and_rescheduled(
    shared: Dask, tmp_path: Path, reference: RunFolders
) -> None:
    told: list[tuple[Event, str]] = []
    killed: list[psutil.Process] = []
    doomed = shared.programs[-1]

    def kill(outcome: Event, spec: AnySpec, line: str) -> None:
        told.append((outcome, line))
        if [o for o, _ in told] == ["started", "started"]:
            killed.extend(children(doomed))
            doomed.kill()

    runs = RunFolders(tmp_path / "runs")
    assert Cluster(shared.address, "cpu", LIMITS).run_all(DISTURBED, runs, kill)
    assert len(killed) == 1
    until(lambda: not killed[0].is_running() or killed[0].status() == psutil.STATUS_ZOMBIE)
    lost = [line for o, line in told if o == "lost"]
    assert len(lost) == 1
    assert lost[0].startswith("worker tcp://127.0.0.1:")
    assert [o for o, _ in told].count("started") == 3
    assert same(runs, reference, DISTURBED)


def offers(address: str) -> dict[str, dict[str, float]]:
    """The resources of each worker."""
    with module._connected(address) as client:
        return {a: w["resources"] for a, w in client.scheduler_info(n_workers=-1)["workers"].items()}


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:1", "127.0.0.1", "no scheme://x", "tcp://nowhere.invalid:8786"])
def test_an_address_where_nothing_answers_is_named(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CONNECT", 0.5)
    with pytest.raises(UsageError, match=f"no Dask scheduler answers at {address} .*dask scheduler") as caught:
        Cluster(address, "cpu", LIMITS)
    assert len(str(caught.value).splitlines()) == 1


def test_without_dask_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(UsageError, match=r"pip install 'scoreboard-replicate\[cluster\]'"):
        Cluster("tcp://127.0.0.1:8786", "cpu", LIMITS)


def test_only_files_of_a_run_are_accepted_from_a_worker(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    taken = {"stderr.txt": b"x", "00000003.checkpoint": b"y"}
    module._keep(folder, {**taken, "../out.txt": b"", "other": b"", "checkpoints/00000001.checkpoint": b""})
    left = {p.name: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert left == taken
