"""Twenty random kills; `make chaos` makes two hundred."""

from __future__ import annotations

from pathlib import Path

from chaos import chaos, summary


def test_every_killed_sweep_completes_on_the_next_call_with_the_same_bytes(tmp_path: Path) -> None:
    # a seed whose first sweeps lose a worker, a parent and children
    sweeps = chaos(kills=20, seed=297, side_by_side=2, folder=tmp_path)
    kills = [kill for sweep in sweeps for kill in sweep.kills]
    assert len(kills) >= 20
    assert [s for s in sweeps if s.problem] == [], summary(sweeps)
    assert {k.target for k in kills} == {"parent", "child", "worker"}
    assert any(s.resumed for s in sweeps)
