"""The pool: failures are kept and retried, a killed child is noticed, and nothing finished is lost."""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path
from threading import Thread

import pytest

from replicate.runs.executor import Event, RunFolders
from replicate.runs.limits import Limits
from replicate.runs.pool import Pool, slots
from replicate.runs.spec import RunSpec, make_spec
from replicate.runs.store import read_record, write_json
from replicate.sweeps.reproduce import Sweep

GOOD = make_spec("marginals", "two-moons", profile="smoke")
DIVERGES = make_spec("realnvp", "two-moons", profile="smoke", settings={"lr": 1e30})


def pool(jobs: int, limits: Limits | None = None) -> Pool:
    return Pool(slots("cpu", jobs), limits or Limits())


def collect(events: list[tuple[Event, str, str]]):  # type: ignore[no-untyped-def]
    return lambda outcome, spec, error: events.append((outcome, spec.model, error))


def test_a_failed_run_is_told_kept_and_tried_again_and_the_others_go_on(tmp_path: Path) -> None:
    events: list[tuple[Event, str, str]] = []
    assert pool(2).run_all([DIVERGES, GOOD], RunFolders(tmp_path), collect(events))
    failed = [e for e in events if e[0] == "failed"]
    assert len(failed) == 1
    assert "training loss is" in failed[0][2]
    assert read_record(tmp_path / GOOD.run_id()) is not None
    left = json.loads((tmp_path / DIVERGES.run_id() / "failure.json").read_text())
    assert left["spec"] == DIVERGES.as_dict()
    again: list[tuple[Event, str, str]] = []
    pool(2).run_all([DIVERGES, GOOD], RunFolders(tmp_path), collect(again))
    assert [e[:2] for e in again] == [("started", "realnvp"), ("failed", "realnvp")]


def test_killed_child_is_a_failure_and_the_next_call_completes_it(tmp_path: Path) -> None:
    def kill(outcome: Event, spec: RunSpec, error: str) -> None:
        if outcome == "started":
            for child in multiprocessing.active_children():
                child.kill()
        else:
            outcomes.append((outcome, error))

    outcomes: list[tuple[Event, str]] = []
    pool(1).run_all([GOOD], RunFolders(tmp_path), kill)
    assert [o[0] for o in outcomes] == ["failed"]
    assert "ended with code -9 and left no record: it was killed" in outcomes[0][1]
    pool(1).run_all([GOOD], RunFolders(tmp_path), collect([]))
    assert read_record(tmp_path / GOOD.run_id()) is not None


@pytest.mark.parametrize("damage", ["truncated", "another spec", "not json", "missing"])
def test_damaged_record_does_not_count(tmp_path: Path, damage: str) -> None:
    folder = tmp_path / GOOD.run_id()
    pool(1).run_all([GOOD], RunFolders(tmp_path), collect([]))
    path = folder / "record.json"
    text = path.read_text()
    if damage == "truncated":
        path.write_text(text[: len(text) // 2])
    elif damage == "another spec":
        record = json.loads(text)
        record["spec"]["seed"] = 7
        write_json(path, record)
    elif damage == "not json":
        path.write_bytes(b"\xff\x00")
    else:
        path.unlink()
    assert read_record(folder) is None
    events: list[tuple[Event, str, str]] = []
    pool(1).run_all([GOOD], RunFolders(tmp_path), collect(events))
    assert [e[0] for e in events] == ["started", "done"]


def test_a_sweep_of_another_version_of_the_code_is_not_continued(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path)
    assert sweep.open() == "starting afresh"
    (sweep.current / "some-run").mkdir()
    assert sweep.open() == "resuming the unfinished sweep"
    write_json(sweep.current / "version.json", {"source_sha256": "0" * 64, "commit": "another", "dirty": ""})
    assert "another version of the code" in sweep.open()
    assert not (sweep.current / "some-run").exists()


def test_the_same_run_gives_the_same_weights_twice_and_when_it_is_killed_after_a_checkpoint(tmp_path: Path) -> None:
    spec = make_spec("realnvp", "two-moons", profile="smoke")
    killed = RunFolders(tmp_path / "killed")

    def kill(pid: int) -> None:
        for _ in range(5000):
            if list(killed.folder(spec).glob("checkpoints/*.checkpoint")):
                os.kill(pid, signal.SIGKILL)
                break
            time.sleep(0.005)

    def listen(outcome: Event, spec: RunSpec, error: str) -> None:
        outcomes.append(outcome)
        if outcome == "started":
            (child,) = multiprocessing.active_children()
            Thread(target=kill, args=(child.pid,)).start()

    outcomes: list[Event] = []
    pool(1, Limits(checkpoint_every=0.05)).run_all([spec], killed, listen)
    assert outcomes == ["started", "failed"]
    records = []
    for runs in (RunFolders(tmp_path / "a"), RunFolders(tmp_path / "b"), killed):
        pool(1).run_all([spec], runs, collect([]))
        record = read_record(runs.folder(spec))
        assert record is not None
        records.append(record)
    assert len({r["weights_sha256"] for r in records}) == 1
    assert [len(r["provenance"]["sittings"]) for r in records] == [1, 1, 2]


def test_a_deadline_stops_what_runs_and_starts_nothing_more(tmp_path: Path) -> None:
    events: list[tuple[Event, str, str]] = []
    endless = make_spec("realnvp", "two-moons", profile="smoke", settings={"steps": 1_000_000})
    assert not pool(1).run_all([endless, GOOD], RunFolders(tmp_path), collect(events), time.monotonic() + 1.0)
    assert events == [("started", "realnvp", "")]
    assert multiprocessing.active_children() == []
    assert not list(tmp_path.glob("*/*.json"))


KEEPS = """
import resource, sys, torch
from replicate.runs.execute import prepare_process

def steps():
    for _ in range(50):
        [torch.ones(1_000_000) for _ in range(8)]

if sys.argv[1] == "prepared":
    prepare_process("cpu")
steps()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
steps()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told what to do with freed memory")
def test_a_run_keeps_the_memory_that_it_frees() -> None:
    """Blocks of 4 MB, 400 of them: given back and taken again they would come as some 400,000 pages."""
    words = [sys.executable, "-c", KEEPS]
    # glibc starts here and raises the threshold by what it meets, so that a plain process may come to keep blocks too
    told = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"}
    prepared, plain = (int(subprocess.check_output([*words, how], env=told)) for how in ("prepared", "plain"))
    assert prepared < 2_000 < 100_000 < plain
