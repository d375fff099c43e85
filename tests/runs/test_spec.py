"""A run's hash holds all that may change its numbers, and nothing else."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replicate.errors import UsageError
from replicate.ledger.claims import all_claims, resolved
from replicate.model import Training, later
from replicate.registry import model_entry, models
from replicate.runs.paper import papers
from replicate.runs.spec import (
    MAX_SEED,
    RunSpec,
    experiment_spec,
    make_spec,
    spec_from_dict,
    spec_hash,
)
from replicate.sweeps.comparison import COMPARISON, compared_runs
from replicate.tasks.loading import load_task, tasks, unsupported
from replicate.validation import PROFILES

ROOT = Path(__file__).resolve().parents[2]
BASE = make_spec("realnvp", "two-moons")


def test_spec_survives_json_with_the_same_id() -> None:
    again = spec_from_dict(json.loads(json.dumps(BASE.as_dict())))
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
        ({"device": "tpu"}, "one of cpu, cuda"),
        ({"seed": True}, "a whole number"),
        ({"settings": {"learning_rate": 1}}, "unknown setting 'learning_rate'"),
        ({"settings": {"lr": "fast"}}, "a number (its default is 0.003)"),
        ({"settings": {"lr": -1.0}}, "above 0"),
        ({"settings": {"lr": float("nan")}}, "above 0 and finite"),
        ({"settings": {"steps": 2.5}}, "a whole number"),
        ({"settings": {"steps": True}}, "a whole number"),
        ({"settings": {"steps": -1}}, "from 0 to 1000000000"),
        ({"settings": {"steps": 10**12}}, "from 0 to 1000000000"),
        ({"settings": {"ema": 1.0}}, "0 or more and below 1"),
        ({"settings": {"betas": [0.9]}}, "a list of 2 numbers"),
        ({"settings": {"betas": [0.9, 1.5]}}, "each 0 or more and below 1"),
        ({"settings": {"optimizer": "lion"}}, "adam, sgd"),
        ({"settings": {"hidden": 10**30}}, "below 2^63"),
        ({"settings": {"preprocessing": "logit"}}, "unknown setting 'preprocessing'"),
        ({"task_name": "digits", "settings": {"preprocessing": "log"}}, "one of logit, gaussianise"),
        ({"model": "rbm-cd"}, "cannot run on two-moons"),
    ],
)
def test_bad_input_is_one_line_that_says_what_to_do(arguments: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        make_spec(**{"model": "realnvp", "task_name": "two-moons", **arguments})  # type: ignore[arg-type]
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_all_problems_of_a_command_come_in_one_message() -> None:
    with pytest.raises(UsageError) as caught:
        make_spec("realnvp", "two-moons", settings={"lr": "fast", "stpes": 3})
    lines = str(caught.value).splitlines()
    assert lines[0] == "lr is 'fast'; it must be a number (its default is 0.003)."
    assert lines[1].startswith("unknown setting 'stpes'. Did you mean steps? realnvp takes couplings, ")
    assert len(lines) == 2
    with pytest.raises(UsageError) as caught:
        make_spec("realnvpp", "two-moon", -1, "fast", "tpu", "float16", {"steps": "many", "couplings": "any"})
    told = str(caught.value)
    for name in ("realnvpp", "two-moon", "seed", "fast", "tpu", "float16", "steps"):
        assert name in told
    assert "couplings" not in told  # nobody knows what a model takes that is not known


def test_a_plug_ins_own_defaults_are_checked_like_a_users_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = replace(model_entry("realnvp"), params={"hidden": object()}, training=Training(ema=2.0))
    monkeypatch.setattr("replicate.runs.spec.model_entry", lambda name: entry)
    with pytest.raises(UsageError) as caught:
        make_spec("realnvp", "pinwheel", settings={"lr": 0})
    assert [line.partition(" is ")[0] for line in str(caught.value).splitlines()] == ["hidden", "ema", "lr"]


# -- a knob costs nothing


@dataclass(frozen=True)
class LaterTraining(Training):
    """Training as a later version may have it."""

    new_knob: float = later(0.5)


def test_later_field_changes_no_id_at_its_default_and_every_id_elsewhere() -> None:
    spec = make_spec("vae", "two-moons")
    grown = replace(spec, training=LaterTraining(**vars(spec.training)))
    assert "new_knob" not in grown.as_dict()["training"]
    assert grown.run_id() == spec.run_id()
    turned = replace(grown, training=replace(grown.training, new_knob=0.7))
    assert turned.as_dict()["training"]["new_knob"] == 0.7
    assert turned.run_id() != spec.run_id()


def test_later_parameter_of_a_model_changes_no_id_at_its_first_value(monkeypatch: pytest.MonkeyPatch) -> None:
    before, entry = make_spec("realnvp", "two-moons"), model_entry("realnvp")
    grown = replace(entry, params={**entry.params, "new_knob": 1.0}, later={"new_knob": 1.0})
    monkeypatch.setattr("replicate.runs.spec.model_entry", lambda name: grown)
    assert make_spec("realnvp", "two-moons") == before
    turned = make_spec("realnvp", "two-moons", settings={"new_knob": 2})
    assert (turned.params["new_knob"], turned.run_id() == before.run_id()) == (2.0, False)


@pytest.mark.parametrize("profile", ["standard", "full"])
def test_every_committed_record_has_the_id_that_its_spec_gives_now(profile: str) -> None:
    lines = (ROOT / "results" / profile / "records.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    assert len(records) > 400
    for record in records:
        spec = spec_from_dict(record["spec"])
        assert (spec.as_dict(), spec.run_id()) == (record["spec"], record["run_id"])


# -- specs from disk and network

SUPPORTED = [
    (model, task)
    for model in sorted(models())
    for task, entry in sorted(tasks().items())
    if not entry.files and not unsupported(model_entry(model), load_task(task))
]


@pytest.mark.parametrize("profile", PROFILES)
def test_reading_is_the_exact_inverse_of_writing_for_every_model_on_every_task(profile: str) -> None:
    for model, task in SUPPORTED:
        spec = make_spec(model, task, 3, profile, "cuda", "float64")
        again = spec_from_dict(json.loads(json.dumps(spec.as_dict())))
        assert again == spec, (model, task)
        assert again.run_id() == spec.run_id()


def test_reading_is_the_exact_inverse_of_writing_for_every_experiment() -> None:
    experiments = [(key, e) for key, paper in papers().items() for e in paper.experiments]
    assert len(experiments) > 20
    for key, experiment in experiments:
        for profile in experiment.profiles:
            spec = experiment_spec(key, experiment, 1, profile)
            again = spec_from_dict(json.loads(json.dumps(spec.as_dict())))
            assert again == spec
            assert again.run_id() == spec.run_id()


numbers = st.floats(0, 1e300, exclude_min=True)
fractions = st.floats(0, 1, exclude_max=True)
SETTINGS = st.fixed_dictionaries(
    {},
    optional={
        "steps": st.integers(0, 10**9),
        "batch_size": st.integers(1, 10**9),
        "lr": numbers | st.integers(1, 10**9),
        "optimizer": st.sampled_from(["adam", "sgd"]),
        "betas": st.lists(fractions, min_size=2, max_size=2),
        "schedule": st.sampled_from(["constant", "cosine"]),
        "weight_decay": numbers,
        "ema": fractions,
        "check": st.lists(st.integers(1, 1000), min_size=2, max_size=2),
        "preprocessing": st.sampled_from(["logit", "gaussianise"]),
    },
)


@given(SETTINGS, st.integers(0, MAX_SEED), st.sampled_from(PROFILES))
def test_settings_survive_the_disk_with_the_same_id(settings: dict[str, Any], seed: int, profile: str) -> None:
    spec = make_spec("neural-ebm", "digits", seed, profile, settings=settings)
    again = spec_from_dict(json.loads(json.dumps(spec.as_dict())))
    assert again == spec
    assert again.run_id() == spec.run_id()
    assert {k: v for k, v in spec.as_dict()["training"].items() if k in settings} == {
        k: v for k, v in settings.items() if k in spec.as_dict()["training"]
    }


def test_no_committed_run_id_has_changed() -> None:
    lines = (ROOT / "results" / "standard" / "records.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert len(records) > 100
    for record in records:
        spec = spec_from_dict(record["spec"])
        assert spec.as_dict() == record["spec"]
        assert spec.run_id() == record["run_id"]


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("seed",), 2**31, "seed of the spec is 2147483648; it must be from 0 to 2147483647"),
        (("profile",), "fast", "one of smoke, standard, full"),
        (("precision",), "float16", "one of float32, float64"),
        (("device",), "cuda:0", "one of cpu, cuda"),
        (("family",), "gan", "one of autoregressive, flow"),
        (("preprocessing",), "log", "one of none, affine, logit, gaussianise"),
        (("data_sha256",), "", "data_sha256 of the spec is empty"),
        (("data_sha256",), "g" * 64, "a sha256 of 64 hexadecimal digits"),
        (("results_version",), 0, "from 1"),
        (("training",), [], "training of the spec is []; it must be a table"),
        (("training", "stpes"), 1, "training of the spec has an unknown key 'stpes'; did you mean steps?"),
        (("training", "lr"), "1", "lr of training of the spec is '1'; it must be a number"),
        (("evaluation", "samples"), -1, "samples of evaluation of the spec is -1"),
        (("params", "hidden"), {}, "'hidden' of params of the spec is {}"),
        (("params", "hidden"), [[1]], "a list of"),
        (("params", "hidden"), float("inf"), "finite"),
        (("kind",), "run", "unknown key 'kind'"),
    ],
)
def test_tampered_spec_is_refused_by_key(path: tuple[str, ...], value: Any, words: str) -> None:
    data = BASE.as_dict()
    box: Any = data
    for key in path[:-1]:
        box = box[key]
    box[path[-1]] = value
    with pytest.raises(UsageError) as caught:
        spec_from_dict(data)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data", [None, [], "spec", 1, {}, {"kind": "experiment"}, {"kind": []}])
def test_what_is_no_spec_is_refused_in_one_message(data: Any) -> None:
    with pytest.raises(UsageError, match="the spec"):
        spec_from_dict(data)


@pytest.mark.parametrize("profile", sorted(COMPARISON))
def test_every_profile_plans_distinct_runs(profile: str) -> None:
    specs = compared_runs(profile)
    assert len({s.run_id() for s in specs}) == len(specs)
    assert {s.family for s in specs} == {"autoregressive", "flow", "vae", "ebm", "score", "reference"}


def test_all_models_of_a_task_see_the_same_preprocessing() -> None:
    found = {s.preprocessing for s in compared_runs("standard") if s.task == "digits"}
    assert found == {"none", "gaussianise"}


def test_every_side_of_a_claim_is_run_at_the_profile_that_judges_it() -> None:
    profiles = {f"{e.name}/{key}": e.profiles for key, paper in papers().items() for e in paper.experiments}
    unjudgeable = [
        (claim.id, owner)
        for paper in all_claims()
        for claim in paper.claims
        for measure in (claim.measure, claim.minus, claim.over)
        if (owner := resolved(measure, claim, paper.key).rpartition("/")[0]) in profiles
        and claim.profile not in profiles[owner]
    ]
    assert not unjudgeable
