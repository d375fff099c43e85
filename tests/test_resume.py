"""A run that is cut anywhere and called again gives the bits of the undisturbed run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from replicate.errors import Stopped
from replicate.registry import models
from replicate.report.labels import is_timing
from replicate.resume import Journal, State, resumable, snapshot, stop_current
from replicate.runs import execute as execution
from replicate.runs.checkpoint import Checkpoints, pack, unpack
from replicate.runs.effort import EVALUATION
from replicate.runs.limits import Limits
from replicate.runs.spec import RunSpec, make_spec
from replicate.runs.store import read_record

STEPS = 7


class Cut(Stopped):
    """Stands for a kill, which no code contains."""


def walk(cut_at: int | None = None) -> tuple[torch.Tensor, list[int]]:
    """Two random walks after each other, the second starting where the first ended; `cut_at` counts all their steps."""
    generator = torch.Generator().manual_seed(3)
    taken, at = [], 0
    start = torch.zeros(2)
    for _ in range(2):
        state: State = {"x": start, "generator": generator, "trace": []}
        for step in resumable("walk", STEPS, state):
            if at == cut_at:
                raise Cut
            state["x"] = state["x"] + torch.randn(2, generator=generator)
            state["trace"].append(step)
            at += 1
            taken.append(step)
        assert state["trace"] == list(range(STEPS))
        start = state["x"]
    return start, taken


class Kept:
    """What a journal wrote, through the file format."""

    def __init__(self) -> None:
        self.data: list[bytes] = []

    def write(self, state: State) -> None:
        self.data.append(pack(state))

    @property
    def last(self) -> Any:
        return unpack(self.data[-1]) if self.data else None


@given(st.integers(0, 2 * STEPS - 1), st.integers(0, 2 * STEPS - 1))
def test_program_interrupted_twice_at_any_step_gives_the_same_bits(first: int, second: int) -> None:
    want, _ = walk()
    kept = Kept()
    for cut in (first, second):
        with suppress(Cut), Journal(kept.write, kept.last, every=0).active():
            walk(cut)
    with Journal(kept.write, kept.last, every=0).active():
        got, taken = walk()
    assert torch.equal(got, want)
    assert len(taken) <= 2 * STEPS - min(first, 2 * STEPS - 1)  # what was saved is not done again


def test_without_a_journal_it_is_range() -> None:
    assert list(resumable("any", 4, {})) == [0, 1, 2, 3]


def test_a_loop_inside_a_step_belongs_to_that_step() -> None:
    journal = Journal(lambda state: None, every=1e9, shortest=0)
    with journal.active():
        for _ in resumable("outer", 3, {}):
            assert list(resumable("inner", 2, {})) == [0, 1]
    assert [e["name"] for e in journal.ended.values()] == ["outer"]


def test_another_program_does_not_go_on_from_this_checkpoint() -> None:
    kept = Kept()
    with Journal(kept.write, every=0).active():
        list(resumable("a", 3, {}))
    with Journal(kept.write, kept.last).active(), pytest.raises(RuntimeError, match="not the one that was interrupted"):
        list(resumable("b", 3, {}))


def test_short_loops_are_not_remembered() -> None:
    journal = Journal(lambda state: None, every=1e9, shortest=60.0)
    with journal.active():
        list(resumable("quick", 3, {}))
    assert journal.ended == {}


def test_a_stop_waits_for_the_end_of_the_step_and_saves() -> None:
    kept, done = Kept(), []

    def work() -> None:
        for step in resumable("work", 5, {}):
            if step == 2:
                assert stop_current()
            done.append(step)

    with pytest.raises(Stopped), Journal(kept.write, every=1e9).active():
        work()
    assert done == [0, 1, 2]
    assert kept.last["cut"]["step"] == 3


def test_a_stop_between_two_loops_is_at_once_and_at_the_end_too_late() -> None:
    kept = Kept()
    journal = Journal(kept.write, every=1e9, shortest=0)
    with journal.active():
        list(resumable("work", 5, {}))
        with pytest.raises(Stopped):
            stop_current()
        assert kept.last["ended"][0]["name"] == "work"
        journal.finishing, journal.stopping = True, False
        assert stop_current()  # the record is about to be written
    assert not stop_current()


def test_a_snapshot_does_not_change_with_what_it_was_taken_of() -> None:
    x, inner = torch.zeros(2), [torch.ones(1)]
    taken = snapshot({"x": x, "inner": inner, "pair": (1, "a")})
    x += 1
    inner[0] += 1
    assert taken["x"].tolist() == [0, 0]
    assert taken["inner"][0].tolist() == [1]
    assert taken["pair"] == (1, "a")


def test_what_cannot_be_saved_is_named() -> None:
    with pytest.raises(TypeError, match="a set cannot be saved"):
        snapshot({"x": {1, 2}})


# -- whole runs


SMALL = replace(
    EVALUATION["smoke"],
    test_points=60,
    samples=60,
    data_samples=60,
    transport_points=30,
    langevin_steps=4,
    langevin_chains=20,
    importance_samples=6,
    density_importance_samples=6,
    density_ais_steps=6,
    ais_chains=8,
    ais_steps=6,
    map_points=4,
    field_points=3,
    quadrature_points=20,
    ode_steps=2,
    dequantisation_draws=1,
)
#: on data: one model for each kind of estimator, and those whose chains go on from step to step
ON_DATA = (
    ("spline-flow", "digits"),
    ("sde-vp", "digits"),
    ("rbm-pcd", "digits-binary"),
    pytest.param("gated-pixelcnn", "digits", marks=pytest.mark.slow),
    pytest.param("neural-ebm", "digits", marks=pytest.mark.slow),
    pytest.param("iwae", "digits-binary", marks=pytest.mark.slow),
)


def small(model: str, task: str) -> RunSpec:
    spec = make_spec(model, task, 1, "smoke")
    steps = min(spec.training.steps, 8)
    training = replace(spec.training, steps=steps, batch_size=32, validate_every=3 if steps else 0, ema=0.9)
    return replace(spec, training=training, evaluation=SMALL)


@contextmanager
def killed_at(save: int | None) -> Iterator[list[int]]:
    """Inside, the process "dies" after so many checkpoints; yields the numbers of those that were written."""
    seen: list[int] = []
    write = Checkpoints.write

    def counted(self: Any, state: Any) -> None:
        if save is None:  # nobody goes on from these: what loops that have ended left is not written again each time
            state = {**state, "journal": {**state["journal"], "ended": {}}}
        write(self, state)
        seen.append(len(seen) + 1)
        if len(seen) == save:
            raise Cut

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoints, "write", counted)
        patch.setattr("replicate.runs.store.os.fsync", lambda descriptor: None)  # no machine crashes here
        yield seen


EVERY_STEP = Limits(checkpoint_every=0)


def numbers(record: dict[str, Any]) -> Any:
    rows = [m for m in record["measurements"] if not is_timing(m["metric"])]
    history = {k: v for k, v in record["history"].items() if k != "seconds"}
    return json.dumps([rows, record["weights_sha256"], history], sort_keys=True)


@cache
def undisturbed(model: str, task: str) -> Any:
    record = execution.execute(small(model, task), None, torch.device("cpu"))
    return numbers(record)


#: on the plane, or on digits if it needs images: one a family in every run of the tests, the others in `make chaos`
FIRST = ("causal-conv", "realnvp", "vae", "energy", "sde-vp", "ssm")
TRAINED = {n: e for n, e in sorted(models().items()) if "continuous" in e.domains and e.training.steps}
EVERY = [
    pytest.param(
        name,
        "digits" if entry.needs_image else "two-gaussians",
        marks=() if name in FIRST else pytest.mark.slow,
    )
    for name, entry in TRAINED.items()
]


@pytest.mark.parametrize(("model", "task"), [*EVERY, *ON_DATA])
def test_every_model_interrupted_in_training_and_evaluation_gives_the_same_bits(
    model: str, task: str, tmp_path: Path
) -> None:
    spec, device = small(model, task), torch.device("cpu")
    folder = tmp_path / spec.run_id()
    with killed_at(3), pytest.raises(Cut):
        execution.execute(spec, folder, device, EVERY_STEP)
    # past the five steps of training that are left: in the evaluation, where it has a loop that can be cut
    with killed_at(9), suppress(Cut):
        execution.execute(spec, folder, device, EVERY_STEP)
    with killed_at(None):
        record = read_record(folder) or execution.execute(spec, folder, device, EVERY_STEP)
    assert numbers(record) == undisturbed(model, task)
    assert len(record["provenance"]["sittings"]) >= 2
    assert not (folder / "checkpoints").exists()


def test_run_on_other_data_than_its_spec_names_is_refused() -> None:
    spec = replace(small("realnvp", "two-gaussians"), data_sha256="0" * 64)
    with pytest.raises(ValueError, match="the data of two-gaussians on this machine have sha256"):
        execution.execute(spec, None, torch.device("cpu"))
