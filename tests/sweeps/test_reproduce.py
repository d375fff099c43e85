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
from helpers import small_sweep

from replicate.report.build import TIMING_METRICS
from replicate.sweeps.plan import whole_plan

ROOT = Path(__file__).resolve().parents[2]

#: nbconvert's exporter of `make notebooks`
PAGES = "replicate.report.notebooks.OfflineHTML"
READ_RESULTS = ("5-five-families-side-by-side.ipynb", "6-your-own-model.ipynb")


def environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "REPLICATE_RUNS": str(folder / "runs"), "MPLBACKEND": "Agg", "COLUMNS": "160"}


def sweep(folder: Path, jobs: int) -> subprocess.CompletedProcess[str]:
    """The whole smoke profile."""
    command = [sys.executable, "-m", "replicate", "reproduce", "--profile", "smoke", "--device", "cpu"]
    command += ["--jobs", str(jobs), "--results", str(folder / "results")]
    return subprocess.run(command, cwd=ROOT, env=environment(folder), capture_output=True, text=True)


def measured(folder: Path) -> pd.DataFrame:
    """measurements.csv without what a clock or the memory gives."""
    frame = pd.read_csv(folder / "results" / "smoke" / "measurements.csv", dtype=str, keep_default_na=False)
    return frame[~frame.metric.str.split(":").str[0].isin(TIMING_METRICS)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    done = sweep(folder, 2)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Every model and experiment once, one worker; killed by SIGKILL in the middle, a record torn, and called again."""
    folder = tmp_path_factory.mktemp("killed")
    command = small_sweep.command(folder, small_sweep.EACH)
    parent = subprocess.Popen(command, cwd=ROOT, env=small_sweep.environment(), stdout=subprocess.DEVNULL)
    current = folder / "runs" / "smoke" / "current"
    wanted, waited = len(small_sweep.each()) // 2, 0.0
    while len(list(current.glob("*/record.json"))) < wanted and waited < 300 and parent.poll() is None:
        time.sleep(0.05)
        waited += 0.05
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    records = sorted(current.glob("*/record.json"))
    assert wanted <= len(records) < len(small_sweep.each())
    records[0].write_text(records[0].read_text()[:200])  # as after a crash of the machine
    again = small_sweep.here(folder, small_sweep.EACH)
    assert again.returncode == 0, again.stdout + again.stderr
    return folder, again.stdout


def test_two_workers_and_one_killed_and_resumed_give_the_same_bytes(
    undisturbed: Path, killed: tuple[Path, str]
) -> None:
    whole, part = measured(undisturbed), measured(killed[0])
    assert set(part.run_id) == {spec.run_id() for spec in small_sweep.each()}
    assert part.to_csv(index=False) == whole[whole.run_id.isin(part.run_id)].to_csv(index=False)


@pytest.mark.slow
def test_two_workers_and_one_give_the_same_bytes_for_every_run(undisturbed: Path, tmp_path: Path) -> None:
    assert sweep(tmp_path, 1).returncode == 0
    assert measured(tmp_path).to_csv(index=False) == measured(undisturbed).to_csv(index=False)


def test_the_second_call_goes_on_from_the_first(killed: tuple[Path, str]) -> None:
    assert "resuming the unfinished sweep" in killed[1]
    before = re.search(r"(\d+) done before, 0 failed", killed[1])
    assert before
    assert int(before[1]) >= len(small_sweep.each()) // 2 - 1


def test_every_planned_run_is_measured_and_none_failed(undisturbed: Path) -> None:
    frame = pd.read_csv(undisturbed / "results" / "smoke" / "measurements.csv", keep_default_na=False)
    assert set(frame.run_id) == {s.run_id() for s in whole_plan("smoke")[0]}
    assert set(frame.status.str.split(":").str[0]) == {"ok", "n/a"}
    for metric in ("nll", "kl", "w2", "c2st", "frechet", "train_seconds", "nfe", "ais_ess"):
        assert (frame[(frame.metric == metric)].status == "ok").any(), metric


def test_a_finished_sweep_is_computed_afresh_and_compared(undisturbed: Path) -> None:
    assert not (undisturbed / "runs" / "smoke" / "current").exists()
    assert (undisturbed / "runs" / "smoke" / "finished").exists()


def test_verify_accepts_results_of_reproduce_and_refuses_an_edit(undisturbed: Path, replicate) -> None:  # type: ignore[no-untyped-def]
    verify = ("verify", "--profile", "smoke", "--results", str(undisturbed / "results"))
    assert replicate(*verify)[0] == 0
    summary = undisturbed / "results" / "smoke" / "summary.csv"
    text = summary.read_text()
    summary.write_text(text.replace("nats", "natz", 1))
    code, _, err = replicate(*verify)
    summary.write_text(text)
    assert code == 1
    assert "summary.csv" in err


def test_the_notebooks_that_read_results_run_on_the_smoke_results(undisturbed: Path, tmp_path: Path) -> None:
    convert = [sys.executable, "-m", "nbconvert", "--to", PAGES, "--execute", "--output-dir", str(tmp_path)]
    where = {**environment(undisturbed), "PROFILE": "smoke", "RESULTS": str(undisturbed / "results")}
    notebooks = [str(ROOT / "notebooks" / name) for name in READ_RESULTS]
    done = subprocess.run([*convert, *notebooks], env=where, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in READ_RESULTS:
        assert (tmp_path / name).with_suffix(".html").stat().st_size > 100_000


def test_time_budget_stops_with_exit_code_3_and_prints_the_next_command(replicate, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    words = ("reproduce", "--profile", "smoke", "--device", "cpu", "--in-process", "--time-budget", "1")
    code, out, err = replicate(*words, "--results", str(tmp_path / "results"))
    assert code == 3, out + err
    assert f"resume with: replicate {' '.join(words)}" in out


def test_second_sweep_on_a_folder_is_refused(replicate, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    command = small_sweep.command(tmp_path, "realnvp:two-gaussians:1000000", "--in-process")
    first = subprocess.Popen(command, cwd=ROOT, env=small_sweep.environment(), stdout=subprocess.DEVNULL)
    try:
        waited = 0.0
        while not (tmp_path / "runs" / "smoke" / "current").exists() and waited < 120 and first.poll() is None:
            time.sleep(0.05)
            waited += 0.05
        second = replicate("reproduce", "--profile", "smoke", "--in-process", "--results", str(tmp_path / "other"))
    finally:
        first.send_signal(signal.SIGINT)
        code = first.wait(60)
    assert second[0] == 2
    assert f"in use by process {first.pid}" in second[2]
    assert code == 3  # an interrupt stops cleanly, with work left
