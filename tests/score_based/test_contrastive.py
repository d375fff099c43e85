"""Noise-contrastive estimation against quadrature, scipy and scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.stats import multivariate_normal
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from replicate.score_based.contrastive import GaussianNoise, data_term, noise_contrastive, noise_term

GRID = torch.linspace(-14, 14, 4001, dtype=torch.float64)[:, None]
STEP = float(GRID[1] - GRID[0])


def log_logistic(x: Tensor, location: Tensor, scale: Tensor, log_z: Tensor) -> Tensor:
    """A logistic density, normalised at log_z = log scale."""
    u = (x[:, 0] - location) / scale
    return -u - 2 * torch.nn.functional.softplus(-u) - log_z


def truth() -> Tensor:
    return torch.tensor([0.4, 0.7, math.log(0.7)], dtype=torch.float64)


def log_normal(x: Tensor, mean: float, std: float) -> Tensor:
    return -0.5 * ((x[:, 0] - mean) / std).square() - math.log(std * math.sqrt(2 * math.pi))


def expected_loss(theta: Tensor, noise_std: float, nu: float) -> Tensor:
    """The population objective by the trapezoidal rule, which converges geometrically here."""
    log_ratio = log_logistic(GRID, *theta) - log_normal(GRID, 0.0, noise_std)
    data = log_logistic(GRID, *truth()).exp() * data_term(log_ratio, nu)
    noise = log_normal(GRID, 0.0, noise_std).exp() * noise_term(log_ratio, nu)
    return STEP * (data + nu * noise).sum()


@pytest.mark.parametrize("noise_std", [1.0, 2.5])
@pytest.mark.parametrize("nu", [0.2, 1.0, 30.0])
def test_the_truth_is_the_minimum(noise_std: float, nu: float) -> None:
    theta = truth().requires_grad_(True)
    loss = expected_loss(theta, noise_std, nu)
    (grad,) = torch.autograd.grad(loss, theta)
    torch.testing.assert_close(grad, torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-8 * max(1, nu))
    for bump in 0.05 * torch.eye(3, dtype=torch.float64):
        assert expected_loss(truth() + bump, noise_std, nu) > loss
        assert expected_loss(truth() - bump, noise_std, nu) > loss


def test_the_minimum_found_from_elsewhere_is_the_truth() -> None:
    def value_and_grad(v: np.ndarray) -> tuple[float, np.ndarray]:
        theta = torch.tensor(v, requires_grad=True)
        loss = expected_loss(theta, 2.0, 1.0)
        (grad,) = torch.autograd.grad(loss, theta)
        return float(loss.detach()), grad.numpy()

    found = minimize(value_and_grad, np.array([0.0, 1.5, 2.0]), jac=True, method="BFGS", options={"gtol": 1e-9}).x
    np.testing.assert_allclose(found, truth().numpy(), atol=1e-6)


def test_much_noise_gives_the_gradient_of_the_likelihood() -> None:
    theta = torch.tensor([0.1, 0.9, math.log(0.9)], dtype=torch.float64, requires_grad=True)
    (contrastive,) = torch.autograd.grad(expected_loss(theta, 2.0, 1e7), theta)
    # of the unnormalised likelihood -E log p + integral p (2012, sec 2.4), where log Z is free
    log_p = log_logistic(GRID, *theta)
    generalised = STEP * (log_p.exp() - log_logistic(GRID, *truth()).exp() * log_p).sum()
    (likelihood,) = torch.autograd.grad(generalised, theta)
    torch.testing.assert_close(contrastive, likelihood, rtol=1e-3, atol=1e-4)


def test_the_loss_is_logistic_regression() -> None:
    g = torch.Generator().manual_seed(0)
    x = 0.5 + torch.randn(400, 2, generator=g, dtype=torch.float64)
    noise = GaussianNoise(torch.zeros(2, dtype=torch.float64), torch.eye(2, dtype=torch.float64))
    y = noise.sample(400, g)
    # log p / q = a + b'x is the logistic regression of data against noise: same minimum, same value
    features, label = torch.cat([x, y]).numpy(), np.repeat([1, 0], 400)
    fit = LogisticRegression(C=np.inf, tol=1e-10, max_iter=1000).fit(features, label)
    coef = torch.tensor(fit.coef_[0], requires_grad=True)
    intercept = torch.tensor(fit.intercept_[0], requires_grad=True)
    loss = noise_contrastive(x @ coef + intercept, y @ coef + intercept)
    log_h = fit.predict_log_proba(features)[np.arange(800), label]
    assert float(loss.detach()) == pytest.approx(-2 * log_h.mean(), rel=1e-12)
    for grad in torch.autograd.grad(loss, [coef, intercept]):
        assert grad.abs().max() < 1e-5


def test_three_times_the_noise_counts_three_times() -> None:
    g = torch.Generator().manual_seed(1)
    p_over_q = torch.rand(40, generator=g, dtype=torch.float64)
    loss = noise_contrastive(p_over_q[:10].log(), p_over_q[10:].log())
    h = p_over_q / (p_over_q + 3)
    torch.testing.assert_close(loss, -h[:10].log().mean() - 3 * (1 - h[10:]).log().mean())


def test_gaussian_noise_equals_scipy() -> None:
    g = torch.Generator().manual_seed(2)
    x = torch.randn(500, 3, generator=g, dtype=torch.float64) @ torch.randn(3, 3, generator=g, dtype=torch.float64)
    for diagonal in (False, True):
        noise = GaussianNoise.fit(x, diagonal)
        cov = np.cov(x.numpy().T)
        cov = np.diag(np.diag(cov)) if diagonal else cov
        expected = multivariate_normal(x.mean(0).numpy(), cov).logpdf(x.numpy())
        np.testing.assert_allclose(noise.log_prob(x).numpy(), expected, rtol=1e-10)
        draws = noise.sample(40_000, g)
        np.testing.assert_allclose(np.cov(draws.numpy().T), cov, atol=0.05 * np.diag(cov).max())
