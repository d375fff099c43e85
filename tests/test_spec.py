"""A run's hash holds all that may change its numbers, and nothing else."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replicate.registry import UsageError
from replicate.runs.profiles import COMPARISON, plan
from replicate.runs.spec import RunSpec, make_spec, spec_hash

BASE = make_spec("realnvp", "two-moons")


def test_spec_survives_json_with_the_same_id() -> None:
    again = RunSpec.from_dict(json.loads(json.dumps(BASE.as_dict())))
    assert again == BASE
    assert again.run_id() == BASE.run_id()


@pytest.mark.parametrize(
    "other",
    [
        make_spec("realnvp", "two-moons", seed=1),
        make_spec("realnvp", "rings"),
        make_spec("spline-flow", "two-moons"),
        make_spec("realnvp", "two-moons", profile="full"),
        make_spec("realnvp", "two-moons", device="cuda"),
        make_spec("realnvp", "two-moons", precision="float64"),
        make_spec("realnvp", "two-moons", settings={"lr": 0.5}),
    ],
)
def test_whatever_changes_a_number_changes_the_id(other: RunSpec) -> None:
    assert other.run_id() != BASE.run_id()


@given(st.permutations(sorted(BASE.as_dict())))
def test_id_does_not_depend_on_the_order_of_keys(keys: list[str]) -> None:
    data = BASE.as_dict()
    assert spec_hash({k: data[k] for k in keys}) == BASE.run_id()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"model": "realnvpp"}, "Did you mean realnvp"),
        ({"task_name": "two-moon"}, "Did you mean two-moons"),
        ({"profile": "fast"}, "smoke, standard, full"),
        ({"seed": -1}, "from 0 to 2147483647"),
        ({"seed": 2**31}, "from 0 to 2147483647"),
        ({"precision": "float16"}, "float32, float64"),
        ({"settings": {"learning_rate": 1}}, "unknown setting 'learning_rate'"),
        ({"settings": {"lr": "fast"}}, "type float"),
        ({"settings": {"lr": -1.0}}, "above 0"),
        ({"settings": {"lr": float("nan")}}, "type float"),
        ({"settings": {"steps": 2.5}}, "type int"),
        ({"settings": {"steps": True}}, "type int"),
        ({"settings": {"steps": -1}}, "at least 0"),
        ({"settings": {"ema": 1.0}}, "[0, 1)"),
        ({"settings": {"optimizer": "lion"}}, "adam, sgd"),
        ({"model": "rbm-cd"}, "cannot run on two-moons"),
    ],
)
def test_bad_input_is_one_line_that_says_what_to_do(arguments: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        make_spec(**{"model": "realnvp", "task_name": "two-moons", **arguments})  # type: ignore[arg-type]
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("profile", sorted(COMPARISON))
def test_every_profile_plans_distinct_runs(profile: str) -> None:
    specs = plan(profile)
    assert len({s.run_id() for s in specs}) == len(specs)
    assert {s.family for s in specs} == {"autoregressive", "flow", "vae", "ebm", "score", "reference"}


def test_all_models_of_a_task_see_the_same_preprocessing() -> None:
    found = {s.preprocessing for s in plan("standard") if s.task == "digits"}
    assert found == {"none", "gaussianise"}
