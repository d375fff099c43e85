"""A sweep's measurements do not depend on the number of workers, nor on being killed and called again."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from replicate.papers.plan import whole_plan
from replicate.report.build import TIMING_METRICS

ROOT = Path(__file__).resolve().parents[1]

#: nbconvert's exporter of `make notebooks`
PAGES = "replicate.report.notebooks.OfflineHTML"


def command(folder: Path, jobs: int) -> list[str]:
    replicate = [sys.executable, "-m", "replicate", "reproduce", "--profile", "smoke", "--device", "cpu"]
    return [*replicate, "--jobs", str(jobs), "--results", str(folder / "results")]


def environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "REPLICATE_RUNS": str(folder / "runs"), "MPLBACKEND": "Agg", "COLUMNS": "160"}


def sweep(folder: Path, jobs: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(folder, jobs), cwd=ROOT, env=environment(folder), capture_output=True, text=True)


def untimed(folder: Path) -> str:
    """measurements.csv without what a clock or the memory gives."""
    frame = pd.read_csv(folder / "results" / "smoke" / "measurements.csv", dtype=str, keep_default_na=False)
    timing = frame.metric.str.split(":").str[0].isin(TIMING_METRICS)
    return frame[~timing].to_csv(index=False)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    done = sweep(folder, 2)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """One worker; the parent is killed by SIGKILL in the middle, a finished record torn, and it is called again."""
    folder = tmp_path_factory.mktemp("killed")
    parent = subprocess.Popen(command(folder, 1), cwd=ROOT, env=environment(folder), stdout=subprocess.DEVNULL)
    current = folder / "runs" / "smoke" / "current"
    wanted, waited = len(whole_plan("smoke")[0]) // 2, 0.0
    while len(list(current.glob("*/record.json"))) < wanted and waited < 300 and parent.poll() is None:
        time.sleep(0.05)
        waited += 0.05
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    records = sorted(current.glob("*/record.json"))
    assert wanted <= len(records) < len(whole_plan("smoke")[0])
    records[0].write_text(records[0].read_text()[:200])  # as after a crash of the machine
    again = sweep(folder, 1)
    assert again.returncode == 0, again.stdout + again.stderr
    return folder, again.stdout


def test_two_workers_and_one_killed_and_resumed_give_the_same_bytes(
    undisturbed: Path, killed: tuple[Path, str]
) -> None:
    assert untimed(killed[0]) == untimed(undisturbed)


def test_the_second_call_goes_on_from_the_first(killed: tuple[Path, str]) -> None:
    assert "going on with the unfinished sweep" in killed[1]
    before = re.search(r"(\d+) done before, 0 failed", killed[1])
    assert before
    assert int(before[1]) >= len(whole_plan("smoke")[0]) // 2 - 1


def test_every_planned_run_is_measured_and_none_failed(undisturbed: Path) -> None:
    frame = pd.read_csv(undisturbed / "results" / "smoke" / "measurements.csv", keep_default_na=False)
    assert set(frame.run_id) == {s.run_id() for s in whole_plan("smoke")[0]}
    assert set(frame.status.str.split(":").str[0]) == {"ok", "n/a"}
    for metric in ("nll", "kl", "w2", "c2st", "frechet", "train_seconds", "nfe", "ais_ess"):
        assert (frame[(frame.metric == metric)].status == "ok").any(), metric


def test_a_finished_sweep_is_computed_afresh_and_compared(undisturbed: Path) -> None:
    assert not (undisturbed / "runs" / "smoke" / "current").exists()
    assert (undisturbed / "runs" / "smoke" / "finished").exists()


def test_verify_accepts_what_reproduce_wrote_and_refuses_an_edit(undisturbed: Path) -> None:
    base = [sys.executable, "-m", "replicate", "verify", "--profile", "smoke"]
    verify = [*base, "--results", str(undisturbed / "results")]
    assert subprocess.run(verify, cwd=ROOT, capture_output=True).returncode == 0
    summary = undisturbed / "results" / "smoke" / "summary.csv"
    text = summary.read_text()
    summary.write_text(text.replace("nats", "natz", 1))
    refused = subprocess.run(verify, cwd=ROOT, capture_output=True, text=True)
    summary.write_text(text)
    assert refused.returncode == 1
    assert "summary.csv" in refused.stderr


@pytest.mark.parametrize("notebook", ["5-five-families-side-by-side.ipynb", "6-your-own-model.ipynb"])
def test_the_notebooks_that_read_results_run_on_the_smoke_results(
    undisturbed: Path, tmp_path: Path, notebook: str
) -> None:
    convert = [sys.executable, "-m", "nbconvert", "--to", PAGES, "--execute", "--output-dir", str(tmp_path)]
    where = {**environment(undisturbed), "PROFILE": "smoke", "RESULTS": str(undisturbed / "results")}
    done = subprocess.run([*convert, str(ROOT / "notebooks" / notebook)], env=where, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / notebook).with_suffix(".html").stat().st_size > 100_000


def test_the_time_budget_stops_with_exit_code_3_and_says_how_to_go_on(tmp_path: Path) -> None:
    stopped = subprocess.run(
        [*command(tmp_path, 1), "--time-budget", "6"],
        cwd=ROOT,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
    )
    assert stopped.returncode == 3, stopped.stdout + stopped.stderr
    assert "go on with: replicate reproduce" in stopped.stdout


def test_two_sweeps_on_one_folder_are_refused(tmp_path: Path) -> None:
    first = subprocess.Popen(command(tmp_path, 1), cwd=ROOT, env=environment(tmp_path), stdout=subprocess.DEVNULL)
    try:
        waited = 0.0
        while not (tmp_path / "runs" / "smoke" / "current").exists() and waited < 60:
            time.sleep(0.05)
            waited += 0.05
        second = sweep(tmp_path, 1)
    finally:
        first.send_signal(signal.SIGINT)
        code = first.wait(60)
    assert second.returncode == 2
    assert f"in use by process {first.pid}" in second.stderr
    assert code == 3  # an interrupt stops cleanly, with work left
