"""The mixing experiment's parts against what they are made of; both densities once, tiny."""

from __future__ import annotations

import math

import pytest
import torch

from replicate.experiments import Experiment, Run, planar
from replicate.ledger.claims import claims_of
from replicate.model import Estimate
from replicate.papers.geyer import EIGHT, PAPER, TWO, mixing
from replicate.runs.experiment import Outcome
from replicate.runs.seeds import Streams
from replicate.tasks.densities import eight_gaussians, mixture, two_gaussians


def measured(experiment: Experiment, **changes: object) -> Outcome:
    settings = {**experiment.settings("smoke"), **changes}
    return experiment.measure(Run(settings, Streams(experiment.name, "geyer", 0), torch.device("cpu")))


def test_all_chains_start_in_the_first_mode_with_its_own_law() -> None:
    density = mixture(2)
    x = mixing.start(density, 20_000, torch.Generator().manual_seed(0))
    torch.testing.assert_close(x.mean(0), density.means[0], rtol=0, atol=0.04)
    torch.testing.assert_close(torch.cov(x.T), density.covariance, rtol=0, atol=0.05)
    assert bool(
        (two_gaussians().mode_of(mixing.start(two_gaussians(), 500, torch.Generator().manual_seed(0))) == 0).all()
    )


def test_a_noised_density_is_the_convolution() -> None:
    density = eight_gaussians()
    x = torch.tensor([[1.0, 2.0], [-3.0, 0.5]], dtype=torch.float64)
    axis = torch.linspace(-8, 8, 161, dtype=torch.float64)
    z = torch.cartesian_prod(axis, axis)
    kernel = (-0.5 * (z / 0.7).square().sum(1)).exp() / (2 * math.pi * 0.49)
    for at in x:
        expected = float((density.log_prob(at - z).exp() * kernel).sum() * 0.01)
        assert float(planar.noised(density, 0.7).log_prob(at[None]).exp()) == pytest.approx(expected, rel=1e-9)


def test_the_evaluations_to_mix_are_the_first_below_and_a_bound_where_there_is_none() -> None:
    errors = [Estimate(v, 0.0, "estimate", "probability", 9) for v in (0.8, 0.09, 0.2)]
    assert mixing.evaluations_to_mix([10, 20, 30], errors) == Estimate(
        20.0, pytest.approx(math.nan, nan_ok=True), "estimate", "score evaluations", 9
    )
    never = mixing.evaluations_to_mix([10, 30], [errors[0], errors[2]])
    assert (never.value, never.kind) == (30.0, "lower_bound")


def test_langevin_keeps_two_modes_apart_and_tempering_does_not() -> None:
    found = measured(TWO, chains=100, nfe=1500)
    e = found.estimates
    assert e["mode_weight_error:ula"].value == e["mode_weight_error:mala"].value == pytest.approx(0.8)
    assert e["nfe_to_mix:mala"].kind == e["autocorrelation_time:mala"].kind == "lower_bound"
    assert e["mode_weight_error:tempering"].value < 0.2
    assert e["mode_weight_error:annealed"].value < 0.2
    assert e["autocorrelation_time:tempering"].value < e["autocorrelation_time:mala"].value
    assert {p.name for p in found.plots} == {"weight-error", "autocorrelation"}


def test_every_sampler_has_the_same_budget_and_every_claim_its_number() -> None:
    e = measured(EIGHT, nfe=300).estimates
    for name in ("ula", "mala", "tempering", "annealed"):
        assert 0.9 * 300 <= e[f"nfe:{name}"].value <= 300
    claims = [c for c in claims_of(PAPER).claims if c.experiment]
    assert {c.experiment for c in claims} == {TWO.name, EIGHT.name}
    assert all(c.measure in e and (not c.over or c.over in e) for c in claims)
