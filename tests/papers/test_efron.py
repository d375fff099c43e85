"""Tweedie's formula, its priors and its quadrature against scipy."""

import math

import numpy as np
import pytest
import torch
from scipy import integrate

from replicate.experiments import Run
from replicate.ledger.claims import claims_of
from replicate.papers.efron import (
    COMPONENTS,
    HALF_WIDTH,
    PAPER,
    PRIORS,
    RATE,
    check_tweedie,
    derivatives,
    posterior_moments,
)
from replicate.runs.seeds import Streams


def normal(x: float, mean: float, sd: float) -> float:
    return math.exp(-0.5 * ((x - mean) / sd) ** 2) / (sd * math.sqrt(2 * math.pi))


DENSITIES = {
    "exponential": lambda mu: RATE * math.exp(-RATE * mu),
    "uniform": lambda mu: 0.5 / HALF_WIDTH,
    "bimodal": lambda mu: sum(w * normal(mu, m, sd) for w, m, sd in COMPONENTS),
}
Z = torch.tensor([-2.7, 0.4, 3.1], dtype=torch.float64)


def moments_by_scipy(name: str, z: float, sigma: float) -> tuple[float, float, float]:
    """Marginal density, posterior mean and variance by adaptive quadrature."""
    low, high = next(p.support for p in PRIORS if p.name == name)
    points = sorted({min(max(p, low), high) for p in (-2.0, 0.0, 1.0, z)})

    def integral(power: int) -> float:
        def f(mu: float) -> float:
            return mu**power * DENSITIES[name](mu) * normal(z, mu, sigma)

        value: float = integrate.quad(f, low, min(high, 12.0), points=points, epsabs=1e-11, limit=100)[0]
        return value

    mass, first, second = (integral(k) for k in range(3))
    mean = first / mass
    return mass, mean, second / mass - mean**2


@pytest.mark.parametrize("prior", PRIORS, ids=lambda p: p.name)
def test_marginal_and_posterior_agree_with_scipy(prior) -> None:
    sigma = 0.7
    mass, mean, variance = np.array([moments_by_scipy(prior.name, float(z), sigma) for z in Z]).T
    np.testing.assert_allclose(prior.log_marginal(Z, sigma), np.log(mass), rtol=0, atol=1e-7)
    ours = posterior_moments(prior, Z, sigma, panels=100)
    np.testing.assert_allclose(ours[0], mean, rtol=0, atol=1e-7)
    np.testing.assert_allclose(ours[1], variance, rtol=0, atol=1e-6)


def test_derivatives_of_a_gaussian() -> None:
    first, second = derivatives(lambda z, sd: -0.5 * ((z - 1) / sd).square(), Z, 2.0)
    torch.testing.assert_close(first, -(Z - 1) / 4)
    torch.testing.assert_close(second, torch.full_like(Z, -0.25))


def new_run(**changes: float) -> Run:
    settings = {**check_tweedie.settings("standard"), **changes}
    return Run(settings, Streams(check_tweedie.name, "efron", 0), torch.device("cpu"))


def test_the_experiment_holds_and_repeats() -> None:
    small = {"observations": 20, "panels": 100}
    outcome = check_tweedie.measure(new_run(**small))
    assert outcome.estimates["mean_error"].value < 1e-9
    assert outcome.estimates["variance_error"].value < 1e-8
    assert outcome.estimates == check_tweedie.measure(new_run(**small)).estimates
    assert outcome.plots[0].as_dict()["lines"]


def test_a_wrong_power_of_sigma_is_caught(monkeypatch) -> None:
    monkeypatch.setattr("replicate.papers.efron.tweedie", lambda y, score, sigma: y + sigma * score)
    assert check_tweedie.measure(new_run(observations=20)).estimates["mean_error"].value > 0.1


def test_claims_read() -> None:
    claims = claims_of(PAPER).claims
    measured = check_tweedie.measure(new_run(observations=20)).estimates
    assert {c.measure for c in claims} <= set(measured)
    assert all(measured[c.measure].unit == c.unit for c in claims)
