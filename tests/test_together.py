"""Seeds that are trained together: each ends where it would alone but for rounding, and goes on alone from anywhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from image_data import bits, small_images  # noqa: F401
from torch import Tensor

from replicate.papers import burda
from replicate.registry import experiment
from replicate.resume import Journal, State, Stopped, Together, resumable, resumable_together, stop_current
from replicate.runs.child import attempt
from replicate.runs.execute import execute
from replicate.runs.experiment import Context
from replicate.runs.limits import Limits
from replicate.runs.pool import groups
from replicate.runs.seeds import Streams
from replicate.runs.spec import ExperimentSpec, experiment_spec, make_spec
from replicate.runs.store import read_record

CPU = torch.device("cpu")
#: stated tolerance of weights after forty steps in float32: products of a stack sum in another order
RELATIVE, ABSOLUTE = 1e-3, 1e-5
STEPS = 12


# -- the model


def begun(seed: int, layers: int, draws: int, doubly: bool) -> tuple[burda.ImportanceWeightedAutoencoder, Context]:
    """A small autoencoder of a seed."""
    context = Context({"batch_size": 5, "stages": 2, "shortened": 1}, Streams("together", "t", seed), CPU)
    with context.streams.initialisation():
        sizes = ((3, 2)[:layers], (6, 5)[:layers])
        return burda.ImportanceWeightedAutoencoder(9, *sizes, draws, weighted=draws > 1, doubly=doubly), context


@pytest.mark.parametrize(
    ("layers", "draws", "doubly", "dynamic"),
    [(1, 1, False, True), (1, 4, False, False), (1, 4, True, True), (2, 4, False, True)],
)
def test_autoencoders_trained_together_are_those_trained_alone(
    layers: int, draws: int, doubly: bool, dynamic: bool
) -> None:
    rows = 0.25 + 0.5 * bits(48, 9) if dynamic else bits(48, 9)
    group = [begun(seed, layers, draws, doubly) for seed in range(3)]
    losses = burda.fit([model for model, _ in group], rows, dynamic, [context for _, context in group])
    assert len({tuple(each) for each in losses}) == 3
    for seed, (model, _) in enumerate(group):
        single, context = begun(seed, layers, draws, doubly)
        before = {name: value.clone() for name, value in single.state_dict().items()}
        (alone,) = burda.fit([single], rows, dynamic, [context])
        assert losses[seed] == pytest.approx(alone, rel=1e-5)
        for name, value in single.state_dict().items():
            assert not torch.equal(value, before[name])
            torch.testing.assert_close(model.state_dict()[name], value, rtol=RELATIVE, atol=ABSOLUTE)


# -- the loop


def wandering(states: Sequence[State], taken: list[int], stop_at: int = -1) -> None:
    """A loop of STEPS steps that add a random number to each state; a signal comes in the step `stop_at`."""
    for step in resumable_together("wander", STEPS, states):
        taken.append(step)
        for state in states:
            state["x"] = state["x"] + torch.rand((), generator=state["draws"])
        if step == stop_at:
            stop_current()


def start(seed: int) -> State:
    return {"x": torch.zeros(()), "draws": torch.Generator().manual_seed(seed)}


def alone(seed: int) -> Tensor:
    state = start(seed)
    wandering([state], [])
    return state["x"]


@given(stop_at=st.integers(0, STEPS - 1), every=st.sampled_from([0.0, 1e9]), seeds=st.integers(1, 3))
def test_a_group_that_is_stopped_leaves_every_run_at_one_step_to_go_on_alone_or_together(
    stop_at: int, every: float, seeds: int
) -> None:
    kept: list[State] = [{} for _ in range(seeds)]
    journals = [Journal(k.update, shortest=0.0) for k in kept]
    taken: list[int] = []
    with Together(journals, every).active(), pytest.raises(Stopped):
        wandering([start(seed) for seed in range(seeds)], taken, stop_at)
    assert taken == list(range(stop_at + 1))
    assert len({Journal(k.update, k).position for k in kept}) == 1

    for seed, saved in enumerate(kept):
        state, rest = start(seed), list[int]()
        with Journal(lambda _: None, saved).active():
            wandering([state], rest)
        assert rest == list(range(stop_at + 1, STEPS))
        assert torch.equal(state["x"], alone(seed))

    states, rest = [start(seed) for seed in range(seeds)], []
    with Together([Journal(lambda _: None, saved) for saved in kept], every).active():
        wandering(states, rest)
    assert rest == list(range(stop_at + 1, STEPS))
    assert [float(s["x"]) for s in states] == [float(alone(seed)) for seed in range(seeds)]


class Killed(BaseException):
    """Stands for kill -9."""


def killed(states: Sequence[State], at: int) -> None:
    for step in resumable_together("wander", STEPS, states):
        if step == at:
            raise Killed


def test_a_group_that_is_killed_loses_the_steps_since_the_last_save_of_all() -> None:
    kept: list[list[State]] = [[], []]
    with Together([Journal(k.append, shortest=0.0) for k in kept], every=0.0).active(), pytest.raises(Killed):
        killed([start(0), start(1)], at=5)
    assert [[s["cut"]["step"] for s in k] for k in kept] == [[1, 2, 3, 4, 5]] * 2


def test_a_finished_group_is_remembered_and_a_loop_within_a_step_is_not() -> None:
    kept: list[State] = [{}, {}]
    with Together([Journal(k.update, shortest=0.0) for k in kept], every=1e9).active():
        for _ in resumable_together("outer", 2, [start(0), start(1)]):
            assert list(resumable("inner", 3, {})) == [0, 1, 2]
    assert [Journal(k.update, k).position for k in kept] == [(1, -1, 0)] * 2


def test_several_states_in_a_run_alone_are_an_error() -> None:
    with Journal(lambda _: None).active(), pytest.raises(RuntimeError, match="trains 2 runs together"):
        next(iter(resumable_together("wander", STEPS, [start(0), start(1)])))


# -- runs


def specs(count: int = 3, **changed: Any) -> list[ExperimentSpec]:
    """Seeds of a short cell on a few images."""
    what = experiment("burda", "burda-iwae-1-k5-dynamic-short")
    settings = {"rows": 40, "samples": 20, "stages": 2, "batch_size": 10, **changed}
    found = [experiment_spec("burda", what, seed, "full", "cpu") for seed in range(count)]
    return [replace(spec, params={**spec.params, **settings}) for spec in found]


def value(record: dict[str, Any], metric: str = "nll") -> float:
    return next(m["value"] for m in record["measurements"] if m["metric"] == metric)


def test_groups_are_the_seeds_of_what_can_be_trained_together() -> None:
    model = [make_spec("marginals", "two-moons", seed, "smoke") for seed in range(2)]
    other = replace(model[0], seed=7)
    seeds = [ExperimentSpec(**fields) for fields in fields_of_specs()]
    assert groups([*model, *seeds, other], together=True) == [[model[0]], [model[1]], seeds[:2], [seeds[2]], [other]]
    assert all(len(group) == 1 for group in groups([*model, *seeds], together=False))


def fields_of_specs() -> list[dict[str, Any]]:
    """Two seeds of a cell and one of another that differs in a setting."""
    common = {
        "model": "burda",
        "family": "vae",
        "task": "burda-iwae-1-k5-dynamic-short",
        "profile": "full",
        "precision": "float32",
        "device": "cpu",
        "data_sha256": "0" * 64,
    }
    return [{**common, "seed": seed, "params": {"draws": k}} for seed, k in ((0, 5), (1, 5), (0, 1))]


def test_runs_trained_together_end_as_those_alone_and_their_records_say_so(
    small_images: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    runs = [(spec, tmp_path / "runs" / spec.run_id()) for spec in specs()]
    limits = Limits(checkpoint_every=0.01)
    assert attempt(runs, limits) == 0
    assert all(read_record(folder) is None for _, folder in runs)
    for spec, folder in runs:
        record, undisturbed = execute(spec, folder, CPU, limits), execute(spec, None, CPU)
        assert value(record) == pytest.approx(value(undisturbed), rel=1e-5)
        assert [s.get("together") for s in record["provenance"]["sittings"]] == [3, None]
        assert not (folder / "checkpoints").exists()


def test_runs_at_different_steps_are_left_alone(
    small_images: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runs = [(spec, tmp_path / "runs" / spec.run_id()) for spec in specs(2)]
    assert attempt(runs, Limits(checkpoint_every=0.01)) == 0
    called: list[int] = []
    monkeypatch.setattr(burda, "fit", lambda models, *_: called.append(len(models)))
    assert attempt(runs, Limits()) == 0
    for path in (runs[0][1] / "checkpoints").iterdir():
        path.unlink()
    assert attempt(runs, Limits()) == 0
    assert called == []


SWEEP = """
import json, sys
from pathlib import Path
from replicate.data import files
from replicate.runs.executor import Runs
from replicate.runs.limits import Limits
from replicate.runs.pool import Pool, slots
from replicate.runs.spec import spec_from_dict

files.expected = lambda path: None  # made-up content under real names, in every child too

if __name__ == "__main__":
    specs = [spec_from_dict(s) for s in json.loads(sys.argv[1])]
    told = []
    pool = Pool(slots("cpu", 2), Limits(checkpoint_every=0.01), together=True)
    pool.run_all(specs, Runs(Path(sys.argv[2])), lambda outcome, spec, error: told.append((outcome, spec.seed, error)))
    print(json.dumps(told))
"""


@pytest.fixture
def sweep(small_images: Path, tmp_path: Path) -> Callable[[Sequence[ExperimentSpec], Path], list[list[Any]]]:  # noqa: F811
    """Runs specs by a pool that trains together, in a program of its own whose data are the small ones."""
    program = tmp_path / "sweep.py"
    program.write_text(SWEEP)

    def run(asked: Sequence[ExperimentSpec], folder: Path) -> list[list[Any]]:
        words = [sys.executable, str(program), json.dumps([s.as_dict() for s in asked]), str(folder)]
        found = subprocess.run(
            words, capture_output=True, text=True, env={**os.environ, "MPLBACKEND": "Agg"}, check=True
        )
        told: list[list[Any]] = json.loads(found.stdout.splitlines()[-1])
        return told

    return run


def test_a_pool_trains_together_and_then_runs_each(
    sweep: Callable[[Sequence[ExperimentSpec], Path], list[list[Any]]], tmp_path: Path
) -> None:
    asked = specs()
    told = sweep(asked, tmp_path / "runs")
    assert sorted(seed for outcome, seed, _ in told if outcome == "done") == [0, 1, 2], told
    assert {outcome for outcome, _, _ in told} == {"started", "done"}
    for spec in asked:
        record = read_record(tmp_path / "runs" / spec.run_id())
        assert record is not None
        assert record["provenance"]["sittings"][0]["together"] == 3
        assert value(record, "evaluate_seconds") < sum(s["seconds"] for s in record["provenance"]["sittings"])


def test_what_cannot_be_trained_together_goes_on_alone(
    sweep: Callable[[Sequence[ExperimentSpec], Path], list[list[Any]]], tmp_path: Path
) -> None:
    told = sweep(specs(2, batch_size=-1), tmp_path / "runs")
    lost = [error for outcome, _, error in told if outcome == "lost"]
    assert len(lost) == 1
    assert lost[0].startswith("its seeds are not trained together, each goes on alone: RuntimeError: split expects")
    assert sorted(seed for outcome, seed, _ in told if outcome == "failed") == [0, 1]


@pytest.mark.parametrize("other", [["--in-process"], ["--scheduler", "tcp://127.0.0.1:1"]])
def test_only_a_pool_trains_together(replicate: Callable[..., tuple[int, str, str]], other: list[str]) -> None:
    code, _, err = replicate("reproduce", "--profile", "smoke", "--together", *other)
    assert (code, err.count("\n")) == (2, 1)
    assert "--together trains seeds in one child of this machine" in err
