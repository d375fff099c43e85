"""A few random kills; `make chaos` makes two hundred."""

from __future__ import annotations

from pathlib import Path

import pytest
from chaos import WORDS, Undisturbed, chaos, disturbed, summary
from helpers.small_sweep import FAMILIES, here, untimed


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
