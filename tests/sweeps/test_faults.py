"""Faults that a sweep survives: each ends in completed work or in one clear line and a non-zero exit."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import psutil
import pytest
from helpers.small_sweep import ROOT, call, command, environment, here, untimed

from replicate.errors import UsageError
from replicate.registry import MODELS
from replicate.runs.paper import PAPERS
from replicate.runs.store import held
from replicate.tasks.loading import TASKS

GOOD = "marginals:two-moons"
QUICK = "realnvp:two-gaussians:80"

SICK = """
import os
import sys
import time

import torch

from replicate.model import Model, ModelEntry, Training


class Sick(Model):
    family = "reference"
    capabilities = frozenset({"log_prob"})

    def __init__(self, info, kind):
        super().__init__()
        self.theta = torch.nn.Parameter(torch.zeros(2))
        self.kind, self.hoard = kind, []

    def loss(self, batch, generator):
        if self.kind == "nan":
            return self.theta.sum() * float("nan")
        if self.kind == "raises":
            print("said before it died", file=sys.stderr)
            raise ZeroDivisionError("nothing works <b>today</b>")
        if self.kind == "hungry":
            for _ in range(80):
                self.hoard.append(torch.empty(250_000_000))  # a gigabyte
        if self.kind == "endless":
            time.sleep(0.1)
        if self.kind == "stuck":
            print("stuck", file=sys.stderr, flush=True)
            while True:
                time.sleep(0.1)
        if self.kind == "exits":
            sys.exit(0)
        if self.kind == "crashes":
            os.abort()
        return (batch - self.theta).square().sum(1).mean()

    def log_prob(self, x):
        return -(x - self.theta).square().sum(1)


def entry(kind, steps=60):
    return ModelEntry("reference", kind, "none", lambda info: Sick(info, kind), frozenset({"continuous"}),
                      training=Training(steps=steps, batch_size=32))


NAN, RAISES, HUNGRY, EXITS, CRASHES = map(entry, ("nan", "raises", "hungry", "exits", "crashes"))
ENDLESS, STUCK = entry("endless", 1_000_000), entry("stuck")
"""
KINDS = ("nan", "raises", "hungry", "endless", "stuck", "exits", "crashes")


@pytest.fixture(scope="module")
def plug_ins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a package of sick models, and two whose import fails, as if installed."""
    folder = tmp_path_factory.mktemp("plug-ins")
    (folder / "sick.py").write_text(SICK)
    (folder / "quits.py").write_text("import sys\nsys.exit('not today')\n")
    points = "".join(f"sick-{kind} = sick:{kind.upper()}\n" for kind in KINDS)
    about = folder / "sick-0.1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: sick\nVersion: 0.1\n")
    text = f"[replicate.models]\n{points}absent = nowhere_to_be_found:MODEL\nquits = quits:MODEL\n"
    (about / "entry_points.txt").write_text(text)
    return folder


@pytest.fixture(scope="module")
def sick_sweep(plug_ins: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, int]:
    """One sweep of every sick model and two healthy ones: its folder, what it said, its exit code."""
    folder = tmp_path_factory.mktemp("sick")
    limits = ("--jobs", "2", "--run-limit", "15", "--memory-limit", "3000", "--grace", "2", "--every", "1")
    runs = [f"sick-{kind}:two-gaussians:{1_000_000 if kind == 'endless' else 60}" for kind in KINDS]
    done = call(folder, *runs, GOOD, QUICK, *limits, plug_ins=plug_ins)
    return folder, done.stdout + done.stderr, done.returncode


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        ("nan", "TrainingError: the training loss is nan at step 1; lower lr or set grad_clip"),
        ("raises", "ZeroDivisionError: nothing works <b>today</b>"),
        ("hungry", "memory"),
        ("endless", "took longer than 15 seconds (--run-limit)"),
        ("stuck", "took longer than 15 seconds (--run-limit)"),
        ("exits", "Exited: SystemExit(0) in Sick.loss (sick.py, line "),
        ("crashes", "ended with code -6 and left no record"),
    ],
)
def test_failing_model_is_reported_in_one_line_and_listed_in_tables(
    sick_sweep: tuple[Path, str, int], kind: str, line: str
) -> None:
    folder, said, code = sick_sweep
    assert code == 1
    (told,) = [t for t in said.splitlines() if t.startswith(f"failed: sick-{kind} on two-gaussians, seed 0: ")]
    assert line in told
    assert "Traceback" not in said
    rows = pd.read_csv(folder / "results" / "smoke" / "measurements.csv", keep_default_na=False)
    (row,) = rows[rows.model == f"sick-{kind}"].to_dict("records")
    assert row["metric"] == "failed_runs"
    assert row["status"].startswith("failed: ")


def test_healthy_runs_beside_sick_ones_are_all_measured(sick_sweep: tuple[Path, str, int]) -> None:
    rows = pd.read_csv(sick_sweep[0] / "results" / "smoke" / "measurements.csv", keep_default_na=False)
    assert {"marginals", "realnvp"} <= set(rows[rows.status == "ok"].model)
    assert "restored" not in sick_sweep[1]  # no entry point of the suite changes the process
    assert "2 done, 0 done before, 7 failed" in sick_sweep[1]


def test_failure_has_the_standard_error_of_the_run(sick_sweep: tuple[Path, str, int]) -> None:
    folder = sick_sweep[0] / "runs" / "smoke" / "current"
    left = [json.loads(p.read_text()) for p in folder.glob("*/failure.json")]
    (failure,) = [f for f in left if f["spec"]["model"] == "sick-raises"]
    assert "said before it died" in failure["stderr_tail"]
    assert "ZeroDivisionError" in failure["traceback_tail"]


def test_run_that_exceeded_its_time_has_saved_itself(sick_sweep: tuple[Path, str, int]) -> None:
    folder = sick_sweep[0] / "runs" / "smoke" / "current"
    specs = {p.parent: json.loads(p.read_text())["spec"]["model"] for p in folder.glob("*/failure.json")}
    (endless,) = [f for f, model in specs.items() if model == "sick-endless"]
    assert list((endless / "checkpoints").glob("*.checkpoint"))


@pytest.fixture
def plugged(plug_ins: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inside, this process finds the plug-ins."""
    found = (MODELS, TASKS, PAPERS)
    monkeypatch.syspath_prepend(plug_ins)
    for kind in found:
        kind.forget()
    yield
    for kind in found:
        kind.forget()


@pytest.mark.usefixtures("plugged")
def test_plug_ins_that_cannot_be_imported_are_named_and_stop_nothing(replicate) -> None:  # type: ignore[no-untyped-def]
    code, out, _ = replicate("list", "--json")
    assert code == 0
    found = json.loads(out)
    assert "ModuleNotFoundError" in found["broken"]["absent"]
    assert found["broken"]["quits"] == "SystemExit: not today"
    assert "sick-nan" in found["models"]
    code, _, err = replicate("run", "quits", "two-moons")
    assert code == 2
    assert err == "replicate: model 'quits' cannot be used: SystemExit: not today. Fix or uninstall its package.\n"


# -- signals


def start(folder: Path, *words: str, plug_ins: Path | None = None) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command(folder, *words), cwd=ROOT, env=environment(plug_ins), stdout=pipe, stderr=subprocess.STDOUT, text=True
    )


def until(happened: Callable[[], object], process: subprocess.Popen[str], polls: int = 10_000) -> None:
    """Wait until something has happened, as long as the process lives."""
    for _ in range(polls):
        if happened() or process.poll() is not None:
            break
        time.sleep(0.02)
    assert happened()


def checkpoints(folder: Path) -> list[Path]:
    return list((folder / "runs" / "smoke" / "current").glob("*/checkpoints/*.checkpoint"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The measurements of QUICK and GOOD."""
    folder = tmp_path_factory.mktemp("undisturbed")
    done = here(folder, QUICK, GOOD)
    assert done.returncode == 0, done.stdout
    return untimed(folder)


@pytest.mark.parametrize(
    ("number", "words"), [(signal.SIGINT, ()), pytest.param(signal.SIGTERM, ("--in-process",), marks=pytest.mark.slow)]
)
def test_signal_saves_and_stops_and_the_next_call_gives_the_same_bytes(
    tmp_path: Path, undisturbed: str, number: signal.Signals, words: tuple[str, ...]
) -> None:
    first = start(tmp_path, QUICK, GOOD, *words)
    until(lambda: checkpoints(tmp_path), first)
    first.send_signal(number)
    said, _ = first.communicate(timeout=60)
    assert first.returncode == 3, said
    assert "runs in progress have been saved, and the same command resumes them" in said
    assert checkpoints(tmp_path)
    again = here(tmp_path, QUICK, GOOD)
    assert again.returncode == 0, again.stdout
    assert untimed(tmp_path) == undisturbed
    records = [json.loads(p.read_text()) for p in (tmp_path / "runs" / "smoke" / "finished").glob("*/record.json")]
    (quick,) = [r for r in records if r["spec"]["model"] == "realnvp"]
    assert len(quick["provenance"]["sittings"]) == 2


@pytest.mark.slow
def test_time_budget_saves_running_runs(tmp_path: Path, undisturbed: str) -> None:
    first = here(tmp_path, QUICK, GOOD, "--every", "60", "--time-budget", "0.7")
    assert first.returncode == 3, first.stdout
    assert checkpoints(tmp_path)
    done = here(tmp_path, QUICK, GOOD)
    assert done.returncode == 0, done.stdout
    assert untimed(tmp_path) == undisturbed


@pytest.mark.slow
def test_second_interrupt_stops_at_once_and_leaves_no_process(tmp_path: Path, plug_ins: Path) -> None:
    first = start(tmp_path, "sick-stuck:two-gaussians:60", plug_ins=plug_ins)
    log = tmp_path / "runs" / "smoke" / "current"
    until(lambda: any("stuck" in path.read_text() for path in log.glob("*/stderr.txt")), first)
    family = psutil.Process(first.pid).children(recursive=True)
    first.send_signal(signal.SIGINT)
    time.sleep(1.0)
    assert first.poll() is None  # it waits for the run to save itself
    first.send_signal(signal.SIGINT)
    first.communicate(timeout=10)
    assert first.returncode == -signal.SIGINT
    _, alive = psutil.wait_procs(family, timeout=10)
    assert alive == []


@pytest.mark.slow
def test_interrupted_single_run_resumes_with_the_printed_command(tmp_path: Path) -> None:
    words = ["run", "realnvp", "two-gaussians", "--profile", "smoke", "--set", "steps=120"]
    full = [sys.executable, "-m", "replicate", *words, "--checkpoint-every", "0.2", "--json"]

    def env(name: str) -> dict[str, str]:
        return {**environment(), "REPLICATE_RUNS": str(tmp_path / name)}

    pipe = subprocess.PIPE
    cut = subprocess.Popen(full, cwd=ROOT, env=env("cut"), stdout=pipe, stderr=pipe, text=True)
    until(lambda: list((tmp_path / "cut").glob("single/*/checkpoints/*.checkpoint")), cut)
    cut.send_signal(signal.SIGINT)
    _, said = cut.communicate(timeout=60)
    assert cut.returncode == 3, said
    assert f"resume with: replicate {' '.join(words)}" in said
    records = []
    for name in ("cut", "whole"):
        done = subprocess.run(full, cwd=ROOT, env=env(name), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        records.append(json.loads(done.stdout))
    assert records[0]["weights_sha256"] == records[1]["weights_sha256"]
    assert [len(r["provenance"]["sittings"]) for r in records] == [2, 1]


# -- disks


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[Callable[[str], None]]:
    """A file system of its own at a folder; yields a function that mounts it again with other options."""
    folder.mkdir(parents=True, exist_ok=True)

    def mount(*words: str) -> None:
        subprocess.run(["mount", *words, "-t", "tmpfs", "tmpfs", str(folder)], check=True, capture_output=True)

    try:
        mount("-o", options)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no file system can be mounted here: {error}")
    try:
        yield lambda changed: mount("-o", f"remount,{changed}")
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("words", [pytest.param(("--jobs", "2"), marks=pytest.mark.slow), ()])
def test_full_disk_under_the_runs_is_reported_and_the_next_call_resumes(
    tmp_path: Path, undisturbed: str, words: tuple[str, ...]
) -> None:
    with mounted(tmp_path / "runs", "size=24k") as again:
        full = call(tmp_path, QUICK, GOOD, *words) if words else here(tmp_path, QUICK, GOOD)
        assert full.returncode == 1, full.stdout
        assert "No space left on device" in full.stdout
        assert "Traceback" not in full.stdout + full.stderr
        again("size=50m")
        done = here(tmp_path, QUICK, GOOD)
        assert done.returncode == 0, done.stdout
        assert untimed(tmp_path) == undisturbed


@pytest.mark.slow
def test_full_disk_under_the_report_loses_neither_runs_nor_earlier_results(tmp_path: Path, undisturbed: str) -> None:
    with mounted(tmp_path / "results", "size=50m") as again:
        assert here(tmp_path, GOOD).returncode == 0
        before = untimed(tmp_path)
        used = sum(p.stat().st_blocks * 512 for p in (tmp_path / "results").rglob("*") if p.is_file())
        again(f"size={used + 200_000}")
        full = here(tmp_path, QUICK, GOOD)
        assert full.returncode == 1
        assert "No space left on device. What is finished is kept" in full.stdout
        assert "Traceback" not in full.stdout + full.stderr
        assert untimed(tmp_path) == before
        again("size=50m")
        done = here(tmp_path, QUICK, GOOD)
        assert done.returncode == 0
        assert "2 done before" in done.stdout
        assert untimed(tmp_path) == undisturbed


def test_read_only_results_folder_is_reported_before_anything_is_computed(tmp_path: Path) -> None:
    with mounted(tmp_path / "results", "ro,size=1m"):
        refused = here(tmp_path, GOOD)
    assert refused.returncode == 2
    assert f"cannot write to {tmp_path / 'results' / 'smoke'}: Read-only file system" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    assert not (tmp_path / "runs").exists()


# -- the clock


@pytest.mark.slow
def test_jumping_clock_changes_no_number_and_no_limit(tmp_path: Path, undisturbed: str) -> None:
    """Every look at the clock says another day, forwards and backwards; the monotonic clock goes on."""
    (tmp_path / "sitecustomize.py").write_text(
        "import itertools, time\nreal, jumps = time.time, itertools.cycle([0, 864e3, -864e3, 3e8])\n"
        "time.time = lambda: real() + next(jumps)\n"
    )
    done = call(tmp_path, QUICK, GOOD, "--in-process", "--time-budget", "200", plug_ins=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert untimed(tmp_path) == undisturbed


@pytest.mark.slow
def test_damaged_record_is_computed_again(tmp_path: Path, undisturbed: str) -> None:
    """A bit of one number flips on disk between two calls: the record is not believed."""
    first = start(tmp_path, GOOD, QUICK, "--every", "60")
    until(lambda: list((tmp_path / "runs").glob("smoke/current/*/record.json")), first)
    first.send_signal(signal.SIGINT)
    assert first.wait(60) == 3
    (path,) = (tmp_path / "runs").glob("smoke/current/*/record.json")
    record = path.read_text()
    at = record.index('"value": ') + len('"value": ') + 3
    path.write_text(record[:at] + ("3" if record[at] != "3" else "4") + record[at + 1 :])
    json.loads(path.read_text())  # still a record by its form
    assert here(tmp_path, GOOD, QUICK).returncode == 0
    assert untimed(tmp_path) == undisturbed


DRAW_FOR_EVER = """
import sys, time
from pathlib import Path
from replicate.report import build
from replicate.runs.store import held

def draw(drawing, folder):
    (folder / drawing).touch()
    time.sleep(600)

build.save = draw
build.os.sched_getaffinity = lambda process: {0, 1}
folder = Path(sys.argv[1])
with held(folder):
    build._saved(["first", "second"], folder)
"""


def test_drawing_processes_end_with_their_parent_and_release_its_folder(tmp_path: Path) -> None:
    parent = subprocess.Popen([sys.executable, "-c", DRAW_FOR_EVER, str(tmp_path)], text=True)
    try:
        until(lambda: (tmp_path / "first").exists() and (tmp_path / "second").exists(), parent)
        drawing = psutil.Process(parent.pid).children()
        assert len(drawing) == 2
        with pytest.raises(UsageError, match="in use"), held(tmp_path):
            pass
    finally:
        parent.kill()
        parent.wait()
    assert psutil.wait_procs(drawing, timeout=60)[1] == []
    with held(tmp_path):
        pass
