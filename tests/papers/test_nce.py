"""Noise-contrastive estimates against scipy and quadrature; each experiment once, tiny."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from scipy.optimize import minimize

from replicate.experiments import Experiment, Run
from replicate.ledger.claims import claims_of
from replicate.papers.nce import PAPER, laplace
from replicate.papers.nce import gaussian as nce
from replicate.runs.experiment import Outcome
from replicate.runs.seeds import Streams
from replicate.score_based.contrastive import GaussianNoise, noise_contrastive

TINY = {
    "nce-gaussian": {"smallest": 100, "doublings": 1, "repetitions": 5},
    "nce-noise-ratio": {"examples": 100, "repetitions": 3, "chunk": 2},
    "nce-identity": {},
    "nce-ica": {"smallest": 200, "doublings": 1, "repetitions": 2},
}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def some_gaussian() -> nce.Gaussian:
    return nce.Gaussian(nce.draw_precision(3, 5.0, generator(1)))


def test_the_exponential_family_is_scipy_s_gaussian() -> None:
    truth = some_gaussian()
    x = truth.sample((20_000,), generator())
    expected = stats.multivariate_normal(np.zeros(3), np.linalg.inv(truth.precision.numpy())).logpdf(x.numpy())
    np.testing.assert_allclose((nce.features(x) @ truth.eta).numpy(), expected, rtol=1e-10)
    np.testing.assert_allclose(np.cov(x.numpy().T), np.linalg.inv(truth.precision.numpy()), atol=0.03)
    assert np.linalg.cond(truth.precision.numpy()) == pytest.approx(5.0)


@pytest.mark.parametrize("noises", [150, 600])
def test_newton_finds_the_minimum_that_a_general_optimiser_finds(noises: int) -> None:
    truth = some_gaussian()
    x = truth.sample((2, 300), generator())
    y = torch.randn(2, noises, 3, generator=generator(1), dtype=torch.float64)
    eta = nce.fit_gaussians(x, y, truth.eta)

    def value_and_grad(v: np.ndarray) -> tuple[float, np.ndarray]:
        theta = torch.tensor(v, requires_grad=True)
        at_data, at_noise = (nce.features(z) @ theta - nce.log_standard_normal(z) for z in (x[1], y[1]))
        loss = noise_contrastive(at_data, at_noise)
        (grad,) = torch.autograd.grad(loss, theta)
        return float(loss.detach()), grad.numpy()

    start = np.append(np.array([1.0, 0, 0, 1, 0, 1]), -2.0)
    found = minimize(value_and_grad, start, jac=True, method="BFGS", options={"gtol": 1e-9}).x
    np.testing.assert_allclose(eta[1].numpy(), found, atol=1e-6)


def test_maximum_likelihood_is_the_gaussian_of_the_sample_s_moments() -> None:
    x = some_gaussian().sample((4, 50), generator())
    eta = nce.likelihood_estimates(x)[2]
    cov = (x[2].T @ x[2] / 50).numpy()
    points = x[0]
    expected = stats.multivariate_normal(np.zeros(3), cov).logpdf(points.numpy())
    np.testing.assert_allclose((nce.features(points) @ eta).numpy(), expected, rtol=1e-10)


@pytest.mark.parametrize("nu", [0.5, 4.0])
def test_the_asymptotic_covariance_is_that_of_quadrature(nu: float) -> None:
    truth = nce.Gaussian(torch.tensor([[2.0]], dtype=torch.float64))
    p, q = stats.norm(0, math.sqrt(0.5)).pdf, stats.norm(0, 1).pdf

    def expected(power: int) -> float:
        """Integral of p w (-x^2 / 2)^power."""
        return integrate.quad(lambda x: p(x) * nu * q(x) / (p(x) + nu * q(x)) * (-x * x / 2) ** power, -12, 12)[0]

    information = np.array([[expected(2), expected(1)], [expected(1), expected(0)]])
    m = np.array([expected(1), expected(0)])
    inverse = np.linalg.inv(information)
    covariance = inverse - (1 + 1 / nu) * np.outer(inverse @ m, inverse @ m)
    found = nce.asymptotic_covariance(truth, nu, generator()).numpy()
    np.testing.assert_allclose(found, covariance, rtol=0.03, atol=0.01)


def test_with_endless_noise_the_theory_is_fisher_s_information() -> None:
    truth = nce.Gaussian(torch.tensor([[2.0]], dtype=torch.float64))
    found = nce.asymptotic_covariance(truth, 1e6, generator()).numpy()
    # the variance of a precision's estimate is 2 P^2; c = log(P / 2 pi) / 2 follows with slope 1 / (2 P)
    np.testing.assert_allclose(found, np.array([[8.0, 2.0], [2.0, 0.5]]), rtol=0.02)


def test_the_population_gradient_is_that_of_adaptive_quadrature() -> None:
    location, scale, std, nu, off = 0.7, 0.5, 2.0, 10.0, 0.1
    p, q = stats.logistic(location, scale).pdf, stats.norm(0, std).pdf

    def in_log_z(x: float) -> float:
        """d/d log Z of -p log h - nu q log(1 - h) is p (1 - h) - nu q h."""
        model = p(x) * math.exp(-off)
        h = model / (model + nu * q(x))
        return p(x) * (1 - h) - nu * q(x) * h

    expected = integrate.quad(in_log_z, -15, 15, points=[location], limit=200)[0]
    found = nce.population_gradient(location, scale, off, std, nu)
    assert float(found[2]) == pytest.approx(expected, abs=1e-8)
    assert float(found[2]) > 1e-3


def test_laplacian_ica_has_the_log_z_of_quadrature_and_its_own_samples() -> None:
    w = torch.tensor([[1.3, 0.4], [-0.5, 0.9]], dtype=torch.float64)
    s = torch.linspace(-12, 12, 1601, dtype=torch.float64)
    grid = torch.cartesian_prod(s, s)
    z = laplace.laplace_log_density(grid, w).exp().sum() * float(s[1] - s[0]) ** 2
    assert float(z.log()) == pytest.approx(float(laplace.laplace_log_z(w)), abs=1e-3)
    sources = laplace.sample_laplace(w, 20_000, generator()) @ w.T
    for column in sources.T:
        assert stats.kstest(column.numpy(), stats.laplace(0, 1 / math.sqrt(2)).cdf).pvalue > 1e-3
    assert np.linalg.cond(laplace.draw_unmixing(4, generator(), 10.0).numpy()) < 10


def test_laplacian_ica_is_found() -> None:
    w = torch.tensor([[1.3, 0.4], [-0.5, 0.9]], dtype=torch.float64)
    x = laplace.sample_laplace(w, 20_000, generator())
    noise = GaussianNoise.fit(x)
    found, log_z = laplace.fit_laplace(x, noise.sample(20_000, generator(1)), noise, w + 0.2)
    torch.testing.assert_close(found, w, rtol=0, atol=0.06)
    assert log_z == pytest.approx(float(laplace.laplace_log_z(w)), abs=0.05)


def run(experiment: Experiment) -> Outcome:
    settings = {**experiment.settings("standard"), **TINY[experiment.name]}
    return experiment.measure(Run(settings, Streams(experiment.name, "nce", 0), torch.device("cpu")))


@pytest.mark.parametrize("experiment", PAPER.experiments, ids=lambda e: e.name)
def test_experiments_run_and_serve_their_claims(experiment: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nce, "THEORY_DRAWS", 5000)
    first, second = run(experiment), run(experiment)
    assert {k: v.value for k, v in first.estimates.items()} == {k: v.value for k, v in second.estimates.items()}
    for name, estimate in first.estimates.items():
        assert math.isfinite(estimate.value), name
    claims = [c for c in claims_of(PAPER).claims if c.experiment == experiment.name]
    assert claims
    for claim in claims:
        assert {claim.measure, claim.minus or claim.measure, claim.over or claim.measure} <= set(first.estimates)
        if not claim.over:
            assert first.estimates[claim.measure].unit == claim.unit, claim.id
        assert set(claim.plots) <= {p.name for p in first.plots}
