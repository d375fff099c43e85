"""Rows that need a CUDA device join the sweep of those that do not, in progress or finished, and lose nothing of it."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from helpers.image_data import small_images
from rich.console import Console

from replicate.ledger.tables import Claims
from replicate.report.build import verify
from replicate.report.records import read_measurements
from replicate.runs.inline import Inline
from replicate.runs.paper import papers
from replicate.runs.progress import Progress
from replicate.runs.spec import AnySpec, ExperimentSpec, make_spec
from replicate.sweeps import reproduce as module
from replicate.sweeps.archive import Moved, pack_runs, unpack_runs
from replicate.sweeps.plan import SweepPlan, cuda_plan, whole_plan
from replicate.sweeps.reproduce import DONE, SweepOptions, reproduce
from replicate.sweeps.sweep import Sweep

__all__ = ["small_images"]
#: stand for what a CPU does, and for what needs another device
REST = [make_spec("truth", "two-gaussians", seed, "smoke") for seed in range(2)]
ROWS = [make_spec("truth", "rings", 0, "smoke")]


def swept(folder: Path, specs: Sequence[AnySpec], rest: Sequence[AnySpec], add: bool) -> tuple[int, str]:
    said = Console(file=io.StringIO(), width=200)
    options = SweepOptions(Inline(), Claims(), folder / "runs", folder / "results", Progress(said))
    code = reproduce(SweepPlan("smoke", tuple(specs), tuple(rest), adds=add), options)
    return code, said.file.getvalue()  # type: ignore[attr-defined]


def reported(folder: Path) -> set[str]:
    return set(read_measurements(folder / "results/smoke/measurements.csv")["run_id"])


def ids(*specs: AnySpec) -> set[str]:
    return {spec.run_id() for spec in specs}


def test_rows_join_a_finished_sweep_and_the_report_has_both(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path / "runs/smoke")
    assert swept(tmp_path, REST, ROWS, add=False)[0] == DONE
    assert reported(tmp_path) == ids(*REST)
    before = {s.run_id(): (sweep.finished / s.run_id() / "record.json").read_bytes() for s in REST}
    code, said = swept(tmp_path, ROWS, REST, add=True)
    assert (code, "resuming the unfinished sweep" in said, "is not finished" in said) == (DONE, True, False)
    assert reported(tmp_path) == ids(*REST, *ROWS)
    assert {i: (sweep.finished / i / "record.json").read_bytes() for i in before} == before
    assert not sweep.current.exists()


def test_rows_that_come_first_wait_for_the_rest(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path / "runs/smoke")
    code, said = swept(tmp_path, ROWS, REST, add=True)
    assert code == DONE
    assert "the sweep is not finished: 2 runs that this command does not compute have no record" in said
    assert reported(tmp_path) == ids(*ROWS)
    assert swept(tmp_path, REST, ROWS, add=False)[0] == DONE
    assert reported(tmp_path) == ids(*REST, *ROWS)
    assert not sweep.current.exists()


def test_rows_of_a_slice_are_added_to_a_finished_sweep(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    swept(here, REST, ROWS, add=False)
    swept(there, ROWS, REST, add=True)
    pack_runs(there / "runs", "smoke", tmp_path / "slice.zip")
    assert unpack_runs(tmp_path / "slice.zip", here / "runs") == Moved(records=1)
    assert swept(here, REST, ROWS, add=False)[0] == DONE
    assert reported(here) == ids(*REST, *ROWS)


def test_rows_never_join_a_finished_sweep_of_other_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = Sweep(tmp_path / "runs/smoke")
    swept(tmp_path, REST, ROWS, add=False)
    monkeypatch.setattr("replicate.sweeps.sweep.source_here", lambda: "b" * 64)
    swept(tmp_path, ROWS, REST, add=True)
    assert {p.name for p in sweep.current.iterdir() if p.is_dir()} == ids(*ROWS)
    assert reported(tmp_path) == ids(*REST, *ROWS)  # the results of the rest stay
    assert {p.name for p in sweep.finished.iterdir() if p.is_dir()} == ids(*REST)  # it stays for `--reuse COMMIT`
    assert json.loads((sweep.finished / "version.json").read_text())["source_sha256"] != "b" * 64


def test_rows_join_results_whose_runs_are_gone(tmp_path: Path) -> None:
    """A fresh clone has results and no runs."""
    swept(tmp_path, REST, ROWS, add=False)
    shutil.rmtree(tmp_path / "runs")
    code, said = swept(tmp_path, ROWS, REST, add=True)
    assert (code, "is not finished" in said) == (DONE, False)
    assert reported(tmp_path) == ids(*REST, *ROWS)
    assert verify(tmp_path / "results/smoke") == []


def test_what_is_computed_afresh_without_the_device_leaves_its_rows_in_the_results(tmp_path: Path) -> None:
    swept(tmp_path, REST, ROWS, add=False)
    swept(tmp_path, ROWS, REST, add=True)
    shutil.rmtree(tmp_path / "runs")
    assert swept(tmp_path, REST[:1], ROWS, add=False)[0] == DONE
    assert reported(tmp_path) == ids(REST[0], *ROWS)  # the rest is what was asked for now
    swept(tmp_path, REST, [], add=False)
    assert reported(tmp_path) == ids(*REST)  # and rows that are planned no more are gone


def test_only_rows_that_are_not_in_the_results_are_run(
    replicate: Callable[..., tuple[int, str, str]], small_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    rows = cuda_plan("full")[0]
    words = ("reproduce", "--profile", "full", "--cuda-rows", "--results", str(tmp_path), "--jobs", "1")
    listed = replicate(*words, "--dry-run")[1].splitlines()
    assert [line[:12] for line in listed[:-1]] == [spec.run_id()[:12] for spec in rows]
    lines = [{"run_id": spec.run_id(), "spec": {}} for spec in rows]
    lines[0]["error"] = "it failed, and is tried again"
    (tmp_path / "full").mkdir()
    (tmp_path / "full/records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    said = replicate(*words, "--dry-run")[1]
    assert f"{len(rows) - 1} of {len(rows)} runs are in {tmp_path / 'full'} already" in said
    assert rows[0].run_id()[:12] in said
    assert rows[1].run_id()[:12] not in said
    del lines[0]["error"]
    (tmp_path / "full/records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, said, _ = replicate(*words)
    assert (code, said.splitlines()[-1]) == (0, "nothing is left to run")


def test_what_is_missing_from_the_results_is_run_and_joins_them(
    replicate: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("replicate.sweeps.plan.whole_plan", lambda profile, device, seeds: ([*REST, *ROWS], []))
    monkeypatch.setenv("REPLICATE_RUNS", str(tmp_path / "runs"))
    swept(tmp_path, REST, [], add=False)
    words = (
        "reproduce",
        "--profile",
        "smoke",
        "--reuse",
        "results",
        "--in-process",
        "--results",
        str(tmp_path / "results"),
    )
    code, said, _ = replicate(*words, "--device", "cpu")
    assert code == DONE
    assert f"2 of 3 runs are in {tmp_path / 'results/smoke'} already" in said
    assert reported(tmp_path) == ids(*REST, *ROWS)
    assert verify(tmp_path / "results/smoke") == []
    assert {p.name for p in (tmp_path / "runs/smoke/finished").iterdir() if p.is_dir()} == ids(*REST, *ROWS)
    assert replicate(*words, "--device", "cpu")[1].splitlines()[-1] == "nothing is left to run"


def test_the_plan_of_the_rows_is_what_a_cpu_leaves_out(small_images: Path) -> None:
    rows, absent = cuda_plan("full")
    planned, skipped = whole_plan("full", "cpu")
    needy = {e.name for p in papers().values() for e in p.experiments if "full" in e.profiles and e.cuda_minutes}
    assert ({spec.task for spec in rows}, absent) == (needy, [])
    assert needy <= {what.name for what in skipped}
    assert all(isinstance(spec, ExperimentSpec) and spec.device == "cuda" for spec in rows)
    assert not ids(*rows) & ids(*planned)
    assert ids(*rows) <= ids(*whole_plan("full", "cuda")[0])
    assert cuda_plan("standard") == ([], [])
    minutes = {e.name: e.cuda_minutes for p in papers().values() for e in p.experiments}
    expected = module.expected_seconds(rows, None)
    assert all(expected[spec.run_id()] == 60 * minutes[spec.task] for spec in rows)


@pytest.mark.parametrize(("budget", "order"), [(None, [9.0, 5.0, 1.0]), (1e9, [1.0, 5.0, 9.0])])
def test_the_longest_start_first_and_under_a_time_budget_the_shortest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget: float | None, order: list[float]
) -> None:
    seconds = dict(zip([s.run_id() for s in (*REST, *ROWS)], (5.0, 9.0, 1.0), strict=True))
    monkeypatch.setattr(module, "expected_seconds", lambda specs, reference: seconds)
    asked: list[float] = []

    class Asked(Inline):
        def run_all(self, specs: Sequence[AnySpec], *others: Any) -> bool:
            asked.extend(seconds[s.run_id()] for s in specs)
            return False

    progress = Progress(Console(file=io.StringIO()))
    options = SweepOptions(Asked(), Claims(), tmp_path / "runs", tmp_path / "results", progress, budget)
    reproduce(SweepPlan("smoke", (*REST, *ROWS)), options)
    assert asked == order


def test_without_a_cuda_device_there_is_nothing_to_run_them_on(
    replicate: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for words, reason in ((["--device", "cpu"], "remove one of them"), ([], "no CUDA device was found")):
        code, _, err = replicate("reproduce", "--profile", "full", "--cuda-rows", *words)
        assert (code, err.count("\n")) == (2, 1)
        assert reason in err
