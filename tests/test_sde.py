"""SDEs: the perturbation kernels against the moments of their equations."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from replicate.score_based.diffusion import LevelProposal
from replicate.sde import SDE, VE, VP, SubVP

SDES = {"ve": VE(0.01, 10.0), "vp": VP(), "subvp": SubVP()}


def times(sde: SDE, n: int = 9) -> Tensor:
    return torch.linspace(max(sde.t_min, 0.01), sde.t_max, n, dtype=torch.float64)


@pytest.mark.parametrize("name", SDES)
def test_marginals_solve_the_moment_equations(name: str) -> None:
    """ds/dt = f s and d(sigma^2)/dt = 2 f sigma^2 + g^2, integrated by Runge-Kutta from the first time on."""
    sde = SDES[name]
    grid = torch.linspace(max(sde.t_min, 0.01), 1.0, 2001, dtype=torch.float64)
    scale, std = sde.marginal(grid)
    state = torch.stack([scale[0], std[0] ** 2])

    def slope(t: Tensor, state: Tensor) -> Tensor:
        f, g = sde.drift_rate(t), sde.diffusion(t)
        return torch.stack([f * state[0], 2 * f * state[1] + g**2])

    h = grid[1] - grid[0]
    for t in grid[:-1]:
        k1 = slope(t, state)
        k2 = slope(t + h / 2, state + h / 2 * k1)
        k3 = slope(t + h / 2, state + h / 2 * k2)
        k4 = slope(t + h, state + h * k3)
        state = state + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    torch.testing.assert_close(state, torch.stack([scale[-1], std[-1] ** 2]), rtol=1e-8, atol=0)


@pytest.mark.parametrize("name", SDES)
def test_simulated_paths_have_the_marginal_moments(name: str) -> None:
    sde, steps, n = SDES[name], 400, 4000
    g = torch.Generator().manual_seed(0)
    start = torch.tensor([max(sde.t_min, 0.01)], dtype=torch.float64)
    x0 = torch.full((n, 1), 1.5, dtype=torch.float64)
    first_scale, first_std = sde.marginal(start)
    x = first_scale * x0 + first_std * torch.randn(n, 1, generator=g, dtype=torch.float64)
    grid = torch.linspace(float(start), 0.6, steps + 1, dtype=torch.float64)
    h = float(grid[1] - grid[0])
    for t in grid[:-1] + h / 2:  # coefficients at the midpoint: the drift's bias is of second order
        t_all = t.expand(n)
        noise = torch.randn(n, 1, generator=g, dtype=torch.float64)
        x = x + h * sde.drift(x, t_all) + math.sqrt(h) * sde.diffusion(t_all)[:, None] * noise
    scale, std = sde.marginal(grid[-1:])
    assert float(x.mean()) == pytest.approx(1.5 * float(scale), abs=4 * float(std) / n**0.5 + 5e-3)
    assert float(x.std()) == pytest.approx(float(std), rel=4 / (2 * n) ** 0.5 + 5e-3)


def test_sub_vp_has_the_square_of_the_variance_of_vp_and_the_same_mean() -> None:
    vp, sub = VP(), SubVP()
    t = times(sub)
    (scale, std), (sub_scale, sub_std) = vp.marginal(t), sub.marginal(t)
    torch.testing.assert_close(sub_scale, scale)
    torch.testing.assert_close(sub_std, std**2)
    assert (sub_std <= std).all()
    assert (sub.diffusion(t) <= vp.diffusion(t)).all()


def test_vp_keeps_unit_variance() -> None:
    scale, std = VP().marginal(times(VP()))
    torch.testing.assert_close(scale**2 + std**2, torch.ones(9, dtype=torch.float64))


@pytest.mark.parametrize("name", SDES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_time_of_inverts_log_ratio(name: str, dtype: torch.dtype) -> None:
    sde = SDES[name]
    t = torch.linspace(sde.t_min, sde.t_max, 50, dtype=dtype)
    levels = sde.log_ratio(t)
    assert (levels.diff() > 0).all()
    torch.testing.assert_close(sde.time_of(levels), t, rtol=1e-4 if dtype == torch.float32 else 1e-10, atol=1e-7)
    scale, std = sde.marginal(t)
    torch.testing.assert_close(levels, (std / scale).log(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SDES)
def test_at_the_horizon_nothing_is_left_of_data_of_unit_scale(name: str) -> None:
    sde = SDES[name]
    scale, std = sde.marginal(torch.tensor([sde.t_max], dtype=torch.float64))
    assert float(std) == pytest.approx(sde.prior_std, rel=1e-4)
    assert float(scale / std) < 0.11


@pytest.mark.parametrize("name", SDES)
def test_the_density_of_the_prior_is_that_of_its_sampler(name: str) -> None:
    sde = SDES[name]
    x = sde.prior_sample(5, 3, torch.Generator().manual_seed(0))
    expected = torch.distributions.Normal(0.0, sde.prior_std).log_prob(x).sum(-1)
    torch.testing.assert_close(sde.prior_log_prob(x), expected)
    many = sde.prior_sample(20_000, 2, torch.Generator().manual_seed(1))
    torch.testing.assert_close(many.std(0), torch.full((2,), float(sde.prior_std)), rtol=0.02, atol=0)


def test_the_density_of_the_proposal_integrates_to_one_and_is_that_of_its_sampler() -> None:
    proposal = LevelProposal(-4.0, 5.0, -1.5, 0.6, 0.2)
    grid = torch.linspace(-4, 5, 20_001, dtype=torch.float64)
    density = proposal.density(grid)
    assert float(torch.trapezoid(density, grid)) == pytest.approx(1.0, abs=1e-6)
    draws = proposal.sample(50_000, torch.Generator().manual_seed(0))
    assert draws.min() >= -4
    assert draws.max() <= 5
    for level in (-3.0, -1.5, -1.0, 2.0):
        below = grid <= level
        exact = float(torch.trapezoid(density[below], grid[below]))
        assert float((draws <= level).double().mean()) == pytest.approx(exact, abs=0.01)
