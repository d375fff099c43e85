"""Score matching's identities: closed forms, scipy, and planted errors."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from replicate.experiments import Experiment, Run
from replicate.ledger.claims import claims_of
from replicate.papers.hyvarinen import PAPER, identities
from replicate.papers.hyvarinen.identities import (
    Rescaled,
    Settings,
    check_gaussian,
    check_normaliser,
    check_objective,
    minimise_score_matching,
    observe,
    overlapping_mixture,
    skewed_sample,
)
from replicate.runs.seeds import Streams
from replicate.score_based.matching import implicit_score_matching
from replicate.score_based.networks import score_of

TINY = {
    "hyvarinen-gaussian": {"examples": 60, "dim": 3},
    "hyvarinen-objective": {"cells": 120, "hidden": 8},
    "hyvarinen-normaliser": {"steps": 2, "points": 20, "langevin_steps": 5},
}


def run(experiment: Experiment, seed: int = 0) -> Run:
    settings = {**experiment.settings("standard"), **TINY[experiment.name]}
    return Run(settings, Streams(experiment.name, "hyvarinen", seed), torch.device("cpu"))


def test_the_minimiser_is_scipys_maximum_likelihood_fit() -> None:
    x = skewed_sample(80, 3, run(check_gaussian).stream("data"))
    mean, precision = minimise_score_matching(x, 500)
    fit_mean, fit_covariance = stats.multivariate_normal.fit(x.numpy())
    np.testing.assert_allclose(mean, fit_mean, atol=1e-7)
    np.testing.assert_allclose(precision.inverse(), fit_covariance, atol=1e-6)


def test_the_sample_is_skewed_and_correlated() -> None:
    x = skewed_sample(2000, 3, run(check_gaussian).stream("data")).numpy()
    assert np.abs(stats.skew(x)).max() > 0.5
    assert np.abs(np.corrcoef(x.T) - np.eye(3)).max() > 0.05


def test_without_the_trace_the_gaussian_is_lost(monkeypatch) -> None:
    def wrong(score, x):
        return 2 * implicit_score_matching(score, x) - 0.5 * score(x).square().sum(-1)

    monkeypatch.setattr(identities, "implicit_score_matching", wrong)
    assert check_gaussian.measure(run(check_gaussian)).estimates["covariance_error"].value > 0.1


def test_mixture_is_scipys() -> None:
    density = overlapping_mixture()
    x = torch.tensor([[0.2, -0.4], [2.0, 1.0]], dtype=torch.float64)
    parts = [
        float(w) * stats.multivariate_normal(m.numpy(), density.covariance.numpy()).pdf(x.numpy())
        for w, m in zip(density.weights, density.means, strict=True)
    ]
    np.testing.assert_allclose(density.log_prob(x), np.log(sum(parts)), atol=1e-12)


def test_an_objective_without_one_derivative_is_caught(monkeypatch) -> None:
    def wrong(score, x):
        s = score(x.requires_grad_(True))
        (row,) = torch.autograd.grad(s[:, 0].sum(), x, create_graph=True)
        return 0.5 * s.square().sum(-1) + row[:, 0]

    monkeypatch.setattr(identities, "implicit_score_matching", wrong)
    assert check_objective.measure(run(check_objective)).estimates["gap_spread"].value > 1e-3


class Bowl(Rescaled):
    """f(x) = |x|^2 / 2 + constant."""

    def __init__(self, constant: float) -> None:
        super().__init__(self, lambda f: f)
        self.constant = constant

    def energy(self, x: torch.Tensor) -> torch.Tensor:
        return 0.5 * x.square().sum(1) + self.constant


def test_score_of_a_bowl_and_its_normaliser() -> None:
    x = torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    torch.testing.assert_close(score_of(Bowl(3.0).energy)(x).detach(), -x.detach())
    seen = observe(Bowl(3.0), x.detach(), lambda y: -y, Settings(langevin_steps=5), torch.Generator())
    assert float(seen["log_z"]) == pytest.approx(math.log(2 * math.pi) - 3.0, abs=1e-12)
    torch.testing.assert_close(seen["objective"], 0.5 * x.detach().square().sum(1) - 2)


def test_a_score_that_sees_the_constant_is_caught(monkeypatch) -> None:
    monkeypatch.setattr(Rescaled, "score", lambda self, x: self.inner.score(x) * self.energy(x).mean())
    found = check_normaliser.measure(run(check_normaliser)).estimates
    assert found["change:score"].value > 1e-2
    assert found["change:samples"].value > 1e-6


@pytest.mark.parametrize("experiment", PAPER.experiments, ids=lambda e: e.name)
def test_experiments_hold_repeat_and_measure_their_claims(experiment: Experiment) -> None:
    found = experiment.measure(run(experiment)).estimates
    assert found == experiment.measure(run(experiment)).estimates
    claims = [c for c in claims_of(PAPER).claims if c.experiment == experiment.name]
    assert claims
    for claim in claims:
        assert found[claim.measure].unit == claim.unit
        assert found[claim.measure].value <= claim.target + claim.tolerance
