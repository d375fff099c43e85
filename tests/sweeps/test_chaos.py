"""A few random kills; `make chaos` makes two hundred."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from chaos import WORDS, Undisturbed, chaos, disturbed, summary
from helpers.plug_in import FAILING, edit_loss, plugged, write_plug_in
from helpers.small_sweep import FAMILIES, call, here, untimed


def test_a_sweep_whose_children_are_killed_completes_on_the_next_call_with_the_same_bytes(tmp_path: Path) -> None:
    # a parent is killed in test_reproduce.py, a worker in test_cluster.py
    begun, runs = tmp_path / "undisturbed", FAMILIES[:4]
    assert here(begun, *runs).returncode == 0
    whole = Undisturbed((*runs, *WORDS), len(runs), untimed(begun), seconds=10.0)
    sweep = disturbed(0, 1, tmp_path / "killed", whole, {"children": 1})
    assert sweep.problem == "", summary([sweep])
    assert sweep.kills


@pytest.mark.slow
def test_every_killed_sweep_completes_on_the_next_call_with_the_same_bytes(tmp_path: Path) -> None:
    # a seed whose first sweeps lose a worker, a parent and children
    sweeps = chaos(kills=20, seed=297, side_by_side=2, folder=tmp_path)
    kills = [kill for sweep in sweeps for kill in sweep.kills]
    assert len(kills) >= 20
    assert [s for s in sweeps if s.problem] == [], summary(sweeps)
    assert {k.target for k in kills} == {"parent", "child", "worker"}
    assert any(s.resumed for s in sweeps)


@pytest.mark.parametrize("processes", [pytest.param(True, marks=pytest.mark.slow), False])
def test_code_edited_between_two_calls_leaves_nothing_of_the_other_code(
    processes: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One run of a plug-in is finished and one interrupted when its loss is edited; a run of the suite's own stays."""
    home, runs = tmp_path / "plug-ins", ("plugged:two-moons:5", "plugged:two-gaussians:20", "marginals:two-moons")
    write_plug_in(home)

    def called() -> tuple[int, str, dict[str, dict[str, object]]]:
        if processes:
            done = call(tmp_path, *runs, "--every", "0", plug_ins=home)
        else:
            with plugged(home):
                done = here(tmp_path, *runs, "--every", "0")
        records = (json.loads(path.read_text()) for path in (tmp_path / "runs/smoke").glob("*/*/record.json"))
        made_with = {f"{r['spec']['model']}:{r['spec']['task']}": r["provenance"] for r in records}
        return done.returncode, done.stdout + done.stderr, made_with

    monkeypatch.setattr("replicate.sweeps.reproduce.build", lambda *_: None)  # in this process, the runs are the point
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.setenv(FAILING, "1")
    code, said, before = called()
    assert (code, len(before)) == (1, 2), said
    monkeypatch.delenv(FAILING)
    edit_loss(home)
    code, said, after = called()
    assert (code, len(after)) == (0, 3), said
    assert said.count("1 finished runs are of another version of a plug-in and start again: model:plugged") == 1
    finished, interrupted, own = (name.removesuffix(":5").removesuffix(":20") for name in runs)
    assert [len(after[name]["sittings"]) for name in (finished, interrupted)] == [1, 1]  # type: ignore[arg-type]
    assert after[finished]["plugins"] == after[interrupted]["plugins"] != before[finished]["plugins"]
    assert after[own] == before[own]
    assert "plugins" not in after[own]
