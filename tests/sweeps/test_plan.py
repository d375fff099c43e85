"""The plan of a sweep is a value: what is computed, what is only reported, and what this machine cannot run."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest

from replicate.errors import UsageError
from replicate.sweeps.plan import SweepPlan, make_plan


def ids(plan: SweepPlan) -> list[str]:
    return [spec.run_id() for spec in plan.specs]


def test_plan_of_a_profile_computes_every_run_once_in_a_fixed_order() -> None:
    plan = make_plan("smoke")
    assert len(ids(plan)) == len(set(ids(plan))) > 30
    assert make_plan("smoke") == plan
    assert (plan.adds, plan.reused) == (False, 0)
    with pytest.raises(FrozenInstanceError):
        plan.profile = "full"  # type: ignore[misc]


def test_runs_that_the_results_have_are_reported_and_not_computed() -> None:
    whole = make_plan("smoke")
    have = set(ids(whole)[::2])
    plan = make_plan("smoke", have=have)
    assert ids(plan) == ids(whole)[1::2]
    assert set(plan.run_ids) == set(whole.run_ids)
    assert (plan.adds, plan.reused) == (True, len(have))


def test_cuda_rows_are_the_only_runs_computed_and_the_others_are_reported() -> None:
    plan = make_plan("standard", "cuda", cuda_rows=True)
    assert plan.specs == ()
    assert {s.run_id() for s in plan.others} == set(ids(make_plan("standard")))


def test_seeds_are_overridden_where_there_is_more_than_one() -> None:
    assert {spec.seed for spec in make_plan("standard", seeds=2).specs} == {0, 1}


def test_unknown_profile_is_refused() -> None:
    with pytest.raises(UsageError, match=r"unknown profile 'smok'; did you mean smoke\?"):
        make_plan("smok")
