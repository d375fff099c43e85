"""Committed runs come back: to the bit on the machine that made them, and one bit that does not is found."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from replicate.errors import Stopped, UsageError
from replicate.report.build import PROVENANCE, build, remarks, verify, write_manifest
from replicate.report.records import (
    MEASUREMENT_COLUMNS,
    commit_of,
    read_measurements,
    read_records,
    rows_digest,
    write_measurements,
)
from replicate.runs import provenance as provenance_module
from replicate.runs.execute import failure
from replicate.runs.executor import Executor, Listener, RunFolders
from replicate.runs.pool import Pool
from replicate.runs.record import seal
from replicate.runs.spec import AnySpec, make_spec, spec_hash
from replicate.runs.store import write_json
from replicate.sweeps import rerun as rerun_module
from replicate.sweeps import reuse as reuse_module
from replicate.sweeps import sweep as sweep_module
from replicate.sweeps.rerun import Report, draw, obstacle, other_source, rerun
from replicate.sweeps.reuse import adopt
from replicate.sweeps.sweep import Sweep

SPECS = [
    make_spec("marginals", "two-moons", profile="smoke"),
    make_spec("realnvp", "two-gaussians", profile="smoke"),
    make_spec("realnvp", "two-gaussians", seed=1, profile="smoke"),
]
FLOW = SPECS[1]


def pool(device: str) -> Pool:
    return Pool([None])


@pytest.fixture(scope="module")
def committed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """results/smoke of three runs."""
    folder = tmp_path_factory.mktemp("committed")
    assert pool("cpu").run_all(SPECS, RunFolders(folder / "runs"), lambda *_: None)
    build(folder / "runs", folder / "smoke", "smoke")
    return folder / "smoke"


@pytest.fixture
def results(committed: Path, tmp_path: Path) -> Path:
    """A copy of the results that a test may change."""
    return Path(shutil.copytree(committed, tmp_path / "smoke"))


def change(
    folder: Path,
    records: Callable[[dict[str, Any]], None] = lambda record: None,
    frame: Callable[[pd.DataFrame], None] = lambda frame: None,
) -> None:
    """Change results as somebody would who then makes digests and manifest agree again."""
    rows, lines = read_measurements(folder / "measurements.csv"), read_records(folder / "records.jsonl")
    frame(rows)
    for record in lines:
        records(record)
        mine = rows[rows["run_id"] == record["run_id"]][list(MEASUREMENT_COLUMNS)]
        record["measurements_sha256"] = rows_digest(mine.itertuples(index=False, name=None))
    write_measurements(rows, folder / "measurements.csv")
    (folder / "records.jsonl").write_text("".join(json.dumps(r, sort_keys=True) + "\n" for r in lines))
    write_manifest(folder)


def one_ulp(column: str = "value", metric: str = "nll") -> Callable[[pd.DataFrame], None]:
    """Moves one number of the flow's first run by its last bit."""

    def move(frame: pd.DataFrame) -> None:
        (at,) = frame.index[(frame["run_id"] == FLOW.run_id()) & (frame["metric"] == metric)]
        frame.loc[at, column] = math.nextafter(frame.loc[at, column], math.inf)

    return move


def on_another_device(frame: pd.DataFrame) -> None:
    frame["device"] = "Abacus"


def made_on_another_device(record: dict[str, Any]) -> None:
    record["provenance"]["device"] = "Abacus"


@dataclass(frozen=True)
class Replay:
    """An executor that gives runs which were computed before: for what only the comparison decides."""

    finished: Path
    jobs: int = 1

    def run_all(
        self, specs: Sequence[AnySpec], runs: RunFolders, listen: Listener, deadline: float | None = None
    ) -> bool:
        """See `Executor`."""
        for spec in specs:
            shutil.copytree(self.finished / spec.run_id(), runs.folder(spec))
        return True


@pytest.fixture(scope="module")
def replay(tmp_path_factory: pytest.TempPathFactory) -> Replay:
    """The same runs, made a second time."""
    folder = tmp_path_factory.mktemp("afresh")
    assert pool("cpu").run_all(SPECS, RunFolders(folder), lambda *_: None)
    return Replay(folder)


def again(folder: Path, executor: Executor, n: int = 3) -> tuple[Report, str]:
    said: list[str] = []
    report = rerun(folder, n, 0, lambda device: executor, said.append)
    return report, "\n".join(said)


# -- what comes back


def test_unchanged_results_come_back_bit_for_bit_and_stay_as_they_were(results: Path) -> None:
    report, said = again(results, pool("cpu"))
    assert report.code == 0, said
    for spec in SPECS:
        line = rf"run {spec.run_id()[:8]} {spec.model} on {spec.task}, seed {spec.seed}: "
        line += r"(\d+) of \1 numbers bit for bit \(same machine\)$"
        found = re.search(line, said, re.MULTILINE)
        assert found
        assert int(found[1]) > 5
    assert "3 of 3 runs match: 3 compared bit for bit, 0 within the tolerance for another machine" in said
    assert re.search(r"rerunning 3 runs \(--rerun-seed 0\), which took about \d+:\d\d", said)
    assert verify(results) == []


@pytest.mark.parametrize(("column", "words"), [("value", "nll: rounding: "), ("stderr", "nll: stderr: ")])
def test_rerun_finds_one_changed_bit_that_no_check_of_files_sees(
    results: Path, replay: Replay, column: str, words: str
) -> None:
    change(results, frame=one_ulp(column))
    assert verify(results) == []
    report, said = again(results, pool("cpu") if column == "value" else replay)
    assert report.code == 1
    assert [r.held for r in report.runs].count(False) == 1
    assert f"run {FLOW.run_id()[:8]} realnvp on two-gaussians, seed 0: NOT AS COMMITTED" in said
    (detail,) = (line for line in said.splitlines() if line.startswith("  "))
    assert detail.startswith(f"  {words}")
    then, now = re.findall(r"-?\d+\.\d+(?:e-?\d+)?", detail)
    assert math.nextafter(float(now), math.inf) == float(then)


def test_a_loss_and_a_weight_that_do_not_come_back_are_found(results: Path, replay: Replay) -> None:
    def spoil(record: dict[str, Any]) -> None:
        if record["run_id"] == FLOW.run_id():
            record["weights_sha256"] = "0" * 64
            step, loss = record["history"]["train"][-1]
            record["history"]["train"][-1] = [step, math.nextafter(loss, 0)]

    change(results, records=spoil)
    report, said = again(results, replay)
    assert report.code == 1
    assert "  the training losses differ\n  the trained weights differ" in said


def test_what_another_device_made_is_compared_by_tolerance_and_that_is_said(results: Path, replay: Replay) -> None:
    def both(frame: pd.DataFrame) -> None:
        on_another_device(frame)
        one_ulp()(frame)
        one_ulp("stderr")(frame)

    change(results, made_on_another_device, both)
    assert verify(results) == []
    report, said = again(results, replay)
    assert report.code == 0, said
    assert "numbers bit for bit, 1 rounding (by tolerance: device: Abacus as committed, " in said
    assert "0 compared bit for bit, 3 within the tolerance for another machine" in said


def test_no_machine_excuses_a_number_far_off(results: Path, replay: Replay) -> None:
    def both(frame: pd.DataFrame) -> None:
        on_another_device(frame)
        frame.loc[frame["metric"] == "parameters", "value"] += 1000  # of every seed: their spread is a tolerance

    change(results, made_on_another_device, both)
    report, said = again(results, replay)
    assert report.code == 1
    assert "  parameters: differs: " in said


def test_other_code_is_named_and_excuses_nothing(results: Path, replay: Replay) -> None:
    def older(record: dict[str, Any]) -> None:
        record["provenance"] |= {"source_sha256": "0" * 64, "commit": "a" * 40, "dirty": ""}

    def both(frame: pd.DataFrame) -> None:
        frame["commit"] = "a" * 40
        one_ulp()(frame)

    change(results, older, both)
    assert verify(results) == []
    report, said = again(results, replay)
    assert report.code == 1
    assert said.count("(same machine); other code: commit aaaaaaaa as committed, ") == 3


def test_the_same_sources_under_another_commit_are_the_same_code(results: Path, replay: Replay) -> None:
    change(results, lambda record: record["provenance"].update(commit="a" * 40, dirty=""))
    assert "other code" not in again(results, replay, 1)[1]


@pytest.mark.parametrize(
    ("there", "here", "hashed", "said"),
    [
        (("a" * 40, ""), ("a" * 40, ""), False, ""),
        (("a" * 40, ""), ("b" * 40, ""), False, "other code: commit aaaaaaaa as committed, bbbbbbbb here"),
        (
            ("a" * 40, ""),
            ("unknown", "unknown"),
            False,
            "perhaps other code: commit aaaaaaaa as committed, unknown here",
        ),
        (("unknown", "unknown"), ("unknown", "unknown"), False, "perhaps other code: commit unknown as committed, "),
        (("a" * 40, ""), ("unknown", "unknown"), True, ""),
        (("unknown", "unknown"), ("b" * 40, "c"), True, ""),
    ],
)
def test_an_unknown_commit_is_never_compared_as_a_version(
    there: tuple[str, str], here: tuple[str, str], hashed: bool, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rerun_module, "source_version", lambda: here)
    then = {"commit": there[0], "dirty": there[1]}
    found = other_source(FLOW, {**then, "source_sha256": provenance_module.source_here()} if hashed else then)
    assert (found.startswith(said), bool(found)) == (True, bool(said))


# -- what is drawn


def drawn(folder: Path, n: int, seed: int) -> list[str]:
    return [spec.run_id() for spec, _ in draw(read_records(folder / "records.jsonl"), n, seed, lambda line: None)]


def test_a_seed_draws_the_same_runs_and_a_larger_draw_holds_the_smaller(committed: Path) -> None:
    draws = {seed: drawn(committed, 3, seed) for seed in range(20)}
    assert {tuple(sorted(ids)) for ids in draws.values()} == {tuple(sorted(s.run_id() for s in SPECS))}
    assert len({tuple(ids) for ids in draws.values()}) > 3
    for seed, ids in draws.items():
        assert drawn(committed, 3, seed) == ids
        assert drawn(committed, 1, seed) == ids[:1]


def test_a_draw_without_a_seed_says_the_one_that_repeats_it(committed: Path) -> None:
    said: list[str] = []
    rerun(committed, 1, None, lambda device: Stub("nothing"), said.append)
    found = re.search(r"--rerun-seed (\d+)", said[0])
    assert found
    (line,) = (line for line in said if line.startswith("run "))
    assert line.startswith(f"run {drawn(committed, 1, int(found[1]))[0][:8]} ")


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("device", "cuda", "it needs a CUDA device"),
        ("results_version", 7, "it was computed with results version 7, this code has 1"),
        ("data_sha256", "0" * 64, "the data of two-gaussians on this machine have sha256 "),
        ("model", "perpetuum", "unknown model 'perpetuum'"),
        ("seed", -1, "seed"),
    ],
)
def test_a_run_that_cannot_be_made_here_is_named_and_another_is_drawn(
    committed: Path, key: str, value: Any, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    records = read_records(committed / "records.jsonl")
    spoilt = next(r for r in records if r["run_id"] == FLOW.run_id())
    spoilt["spec"][key] = value
    spoilt["run_id"] = spec_hash(spoilt["spec"])
    said: list[str] = []
    found = draw(records, 3, 0, said.append)
    assert {spec.run_id() for spec, _ in found} == {SPECS[0].run_id(), SPECS[2].run_id()}
    (line,) = said
    assert line.startswith(f"run {spoilt['run_id'][:8]}")
    assert f"is not rerun: {reason}" in line


def test_a_run_under_anothers_id_and_a_failed_one_are_not_drawn(committed: Path) -> None:
    records = read_records(committed / "records.jsonl")
    records[0]["run_id"], records[1]["error"] = "0" * 64, "it failed then, too"
    said: list[str] = []
    assert [spec.run_id() for spec, _ in draw(records, 3, 0, said.append)] == [records[2]["run_id"]]
    assert len(said) == 1
    assert "is not rerun: its id is committed as 00000000" in said[0]


def test_nothing_stands_in_the_way_of_a_run_that_was_just_made() -> None:
    assert [obstacle(spec) for spec in SPECS] == ["", "", ""]


def test_where_nothing_can_be_made_again_the_check_does_not_hold(results: Path, replay: Replay) -> None:
    def for_later(record: dict[str, Any]) -> None:
        record["spec"]["results_version"] = 7
        record["run_id"] = spec_hash(record["spec"])

    change(results, for_later)
    report, said = again(results, replay)
    assert report.code == 1
    assert f"none of the runs in {results} can be rerun here" in said


# -- what goes wrong on the way


class Stub:
    """An executor whose runs fail, are lost without a trace, or are stopped."""

    jobs = 1

    def __init__(self, what: str) -> None:
        self.what = what

    def run_all(
        self, specs: Sequence[AnySpec], runs: RunFolders, listen: Listener, deadline: float | None = None
    ) -> bool:
        """See `Executor`."""
        if self.what == "stop":
            raise Stopped
        for spec in specs:
            runs.folder(spec).mkdir()
            if self.what == "fail":
                write_json(runs.folder(spec) / "failure.json", failure(spec, "TrainingError: the loss is nan"))
        return True


@pytest.mark.parametrize(
    ("what", "code", "words"),
    [
        ("fail", 1, "FAILED: TrainingError: the loss is nan"),
        ("nothing", 1, "FAILED: it left no record"),
        ("stop", 3, "stopped before every run was rerun"),
    ],
)
def test_runs_that_fail_vanish_or_are_stopped_are_no_success(committed: Path, what: str, code: int, words: str) -> None:
    said: list[str] = []
    report = rerun(committed, 2, 0, lambda device: Stub(what), said.append)
    assert report.code == code
    assert words in "\n".join(said)


# -- what verify asks of provenance


def test_every_record_of_a_sweep_says_all_that_is_asked(committed: Path) -> None:
    for record in read_records(committed / "records.jsonl"):
        assert set(record["provenance"]) == PROVENANCE
        assert record["provenance"]["threads"] == record["provenance"]["blas_threads"] == 1
        assert record["provenance"]["deterministic"] is True
    assert verify(committed) == []


@pytest.mark.parametrize("key", sorted(PROVENANCE - {"device", "commit"}))
def test_a_key_that_is_gone_from_one_record_is_named(results: Path, key: str) -> None:
    def drop(record: dict[str, Any]) -> None:
        if record["run_id"] == FLOW.run_id():
            del record["provenance"][key]

    change(results, drop)
    problems = [p for p in verify(results) if "does not say" in p]
    assert problems == [f"records.jsonl: run {FLOW.run_id()[:8]} does not say its {key}"]


def test_a_record_that_names_another_device_than_its_measurements_is_found(results: Path) -> None:
    change(results, made_on_another_device)
    problems = verify(results)
    assert len(problems) == 3
    assert all("was made on 'Abacus' at " in p for p in problems)


def test_a_record_without_its_peak_memory_is_found(results: Path) -> None:
    def drop(frame: pd.DataFrame) -> None:
        mine = (frame["run_id"] == FLOW.run_id()) & (frame["metric"] == "peak_memory_mb")
        frame.loc[mine, "metric"] = "peak"

    change(results, frame=drop)
    assert f"records.jsonl: run {FLOW.run_id()[:8]} has no peak memory among its measurements" in verify(results)


def test_results_of_an_earlier_format_hold_and_are_remarked_on(results: Path) -> None:
    def age(record: dict[str, Any]) -> None:
        for key in ("format", "libraries", "source_sha256"):
            del record["provenance"][key]

    change(results, age)
    assert verify(results) == []
    assert "3 of 3 runs were made before records named their libraries and kernels in full" in remarks(results)


@pytest.mark.parametrize(
    ("commit", "dirty", "remark"),
    [
        ("a" * 40, "", None),
        ("a" * 40, "b" * 64, "3 of 3 runs were made with uncommitted changes: "),
        ("unknown", "unknown", "3 of 3 runs were made outside a repository and name no commit"),
    ],
)
def test_a_dirty_tree_and_no_commit_are_remarked_on(results: Path, commit: str, dirty: str, remark: str | None) -> None:
    def rename(frame: pd.DataFrame) -> None:
        frame["commit"] = commit_of({"commit": commit, "dirty": dirty})

    change(results, lambda record: record["provenance"].update(commit=commit, dirty=dirty), rename)
    assert verify(results) == []
    found = remarks(results)
    assert len(found) == (remark is not None)
    assert all(line.startswith(str(remark)) for line in found)


def test_children_of_the_pool_find_what_this_process_finds(committed: Path) -> None:
    here = provenance_module.provenance(torch.device("cpu"))
    for record in read_records(committed / "records.jsonl"):
        for key in ("source_sha256", "libraries", "cpu_model", "libc", "lock_sha256"):
            assert record["provenance"][key] == here[key]


# -- an unfinished sweep under another commit

OLD, NEW = "a" * 40, "b" * 40


@pytest.fixture
def sweep(committed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sweep:
    """The three runs finished at one commit, a fourth in progress; the code that is here is of another commit."""
    found = Sweep(tmp_path / "smoke")
    shutil.copytree(committed.parent / "runs", found.current)
    (found.current / "in-progress").mkdir()
    write_json(found.current / "version.json", {"commit": OLD, "dirty": ""})
    for module in (rerun_module, reuse_module, sweep_module):
        monkeypatch.setattr(module, "source_version", lambda: (NEW, ""))
    return found


def adopted(
    sweep: Sweep, executor: Executor, commit: str = OLD[:8], planned: Sequence[AnySpec] = SPECS
) -> tuple[int, str]:
    said: list[str] = []
    code = adopt(sweep, commit, {s.run_id() for s in planned}, 3, executor, said.append)
    return code, "\n".join(said)


def folders(sweep: Sweep) -> set[str]:
    return {p.name for p in sweep.current.iterdir() if p.is_dir()}


def test_finished_runs_are_reused_where_they_match_bit_for_bit(sweep: Sweep, replay: Replay) -> None:
    before = {s.run_id(): (sweep.current / s.run_id() / "record.json").read_bytes() for s in SPECS}
    code, said = adopted(sweep, replay)
    assert code == 0, said
    assert "rerunning 3 runs of commit aaaaaaaa by commit bbbbbbbb" in said
    assert "3 finished runs of commit aaaaaaaa are reused" in said
    assert sweep.version() == {"source_sha256": provenance_module.source_here(), "commit": NEW, "dirty": ""}
    assert folders(sweep) == set(before)  # runs in progress start again
    assert {i: (sweep.current / i / "record.json").read_bytes() for i in before} == before
    assert sweep.open() == "resuming the unfinished sweep"
    assert adopted(sweep, replay) == (0, "")  # the same command again has nothing to do


def test_runs_of_a_finished_sweep_are_reused_and_the_sweep_is_in_progress_again(sweep: Sweep, replay: Replay) -> None:
    shutil.rmtree(sweep.current / "in-progress")
    sweep.close()
    code, said = adopted(sweep, replay)
    assert code == 0, said
    assert sweep.version() == {"source_sha256": provenance_module.source_here(), "commit": NEW, "dirty": ""}
    assert folders(sweep) == {s.run_id() for s in SPECS}
    assert not sweep.finished.exists()


def test_uncommitted_changes_reuse_nothing_and_lose_nothing(
    sweep: Sweep, replay: Replay, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the sweep is of the commit that was changed: resuming would start it afresh."""
    before = folders(sweep)
    for module in (rerun_module, reuse_module, sweep_module):
        monkeypatch.setattr(module, "source_version", lambda: (OLD, "something"))
    with pytest.raises(UsageError, match="commit your changes"):
        adopted(sweep, replay)
    assert folders(sweep) == before


def test_a_git_that_says_nothing_reuses_nothing_and_loses_nothing(
    sweep: Sweep, replay: Replay, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = folders(sweep)
    monkeypatch.setattr(reuse_module, "source_version", lambda: ("unknown", "unknown"))
    with pytest.raises(UsageError, match="needs the commit that is here"):
        adopted(sweep, replay)
    assert folders(sweep) == before


def test_a_finished_sweep_of_another_commit_with_the_same_sources_is_reused(sweep: Sweep, replay: Replay) -> None:
    same = {"source_sha256": provenance_module.source_here(), "commit": OLD, "dirty": ""}
    write_json(sweep.current / "version.json", same)
    sweep.close()
    code, said = adopted(sweep, replay)
    assert (code, "3 finished runs of commit aaaaaaaa are reused" in said) == (0, True), said
    assert sweep.current.exists()


def test_runs_that_cannot_be_checked_are_not_reused(
    sweep: Sweep, replay: Replay, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rerun_module, "obstacle", lambda spec: "it needs a CUDA device")
    before = folders(sweep)
    code, said = adopted(sweep, replay)
    assert code == 1
    assert "no run of that sweep can be rerun here" in said
    assert sweep.version() == {"commit": OLD, "dirty": ""}
    assert folders(sweep) == before


def test_runs_that_are_no_longer_planned_are_removed(sweep: Sweep, replay: Replay) -> None:
    code, said = adopted(sweep, replay, planned=SPECS[:2])
    assert code == 0
    assert "2 finished runs" in said
    assert folders(sweep) == {s.run_id() for s in SPECS[:2]}


def test_one_bit_that_differs_reuses_nothing_and_changes_nothing(sweep: Sweep, replay: Replay, tmp_path: Path) -> None:
    other = Replay(Path(shutil.copytree(replay.finished, tmp_path / "other")))
    path = other.finished / FLOW.run_id() / "record.json"
    record = json.loads(path.read_text())
    (nll,) = [m for m in record["measurements"] if m["metric"] == "nll"]
    nll["value"] = math.nextafter(nll["value"], math.inf)
    write_json(path, seal(record))
    before = folders(sweep)
    code, said = adopted(sweep, other)
    assert code == 1
    assert "none is reused" in said
    assert sweep.version() == {"commit": OLD, "dirty": ""}
    assert folders(sweep) == before


def test_only_a_sweep_of_the_named_commit_is_adopted(sweep: Sweep, replay: Replay) -> None:
    with pytest.raises(UsageError, match="is of commit aaaaaaaaaaaa, not 'cccc'"):
        adopted(sweep, replay, "cccc")
    write_json(sweep.current / "version.json", {"commit": OLD, "dirty": "something"})
    with pytest.raises(UsageError, match="commit your changes"):
        adopted(sweep, replay)
    shutil.rmtree(sweep.current)
    with pytest.raises(UsageError, match="is of commit none"):
        adopted(sweep, replay)
