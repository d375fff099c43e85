"""The integrated autocorrelation time against processes whose time has a closed form."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.signal import lfilter
from torch import Tensor

from replicate.metrics.autocorrelation import autocorrelation, autocorrelation_time


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ar1(rho: float, steps: int, chains: int, generator: torch.Generator) -> Tensor:
    """x_t = rho x_{t-1} + sqrt(1 - rho^2) z from its stationary law, shape (steps, chains)."""
    z = torch.randn(steps, chains, generator=generator, dtype=torch.float64)
    z[0] /= math.sqrt(1 - rho**2)
    return torch.from_numpy(lfilter([math.sqrt(1 - rho**2)], [1, -rho], z.numpy(), axis=0))


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9, 0.98])
def test_an_autoregressive_process_has_its_closed_form(rho: float) -> None:
    found = autocorrelation_time(ar1(rho, 4000, 20, rng(1)), 0.0)
    expected = (1 + rho) / (1 - rho)
    assert found.kind == "estimate"
    # the cut adds a positive bias where there is nothing to sum: a few standard errors of the white process
    assert abs(found.value - expected) < 4 * found.stderr + 0.02
    assert found.stderr < 0.15 * expected


def test_the_standard_error_is_the_spread_over_repetitions() -> None:
    found = [autocorrelation_time(ar1(0.8, 3000, 4, rng(s)), 0.0) for s in range(40)]
    spread = float(np.std([f.value for f in found], ddof=1))
    assert 0.6 < spread / float(np.mean([f.stderr for f in found])) < 1.5


def test_a_two_state_chain_has_its_closed_form() -> None:
    """Leaving 0 with probability a and 1 with b: rho(k) = (1 - a - b)^k, so tau = (2 - a - b) / (a + b)."""
    a, b, steps, chains = 0.02, 0.08, 5000, 40
    u = torch.rand(steps, chains, generator=rng(2))
    x = torch.zeros(steps, chains)
    x[0] = (u[0] < a / (a + b)).float()
    for t in range(1, steps):
        x[t] = torch.where(x[t - 1] == 0, u[t] < a, u[t] >= b).float()
    found = autocorrelation_time(x, a / (a + b))
    assert abs(found.value - (2 - a - b) / (a + b)) < 4 * found.stderr
    both = torch.stack([x, 1 - x], -1)
    together = autocorrelation_time(both, torch.tensor([a, b], dtype=torch.float64) / (a + b))
    assert together.value == pytest.approx(found.value)  # a mode's indicator and that of the rest are one function


def test_the_time_predicts_the_variance_of_a_mean() -> None:
    x = ar1(0.9, 500, 4000, rng(3))
    tau = autocorrelation_time(x, 0.0)
    assert 500 * float(x.mean(0).var()) == pytest.approx(tau.value, rel=0.15)


def test_correlations_are_those_of_the_definition() -> None:
    x = torch.randn(50, 3, generator=rng(4), dtype=torch.float64)
    d = (x - 0.3).numpy()
    direct = np.array([(d[: 50 - k] * d[k:]).sum() for k in range(50)])
    np.testing.assert_allclose(autocorrelation(x, 0.3).numpy(), direct / direct[0], atol=1e-12)


def test_a_chain_that_never_leaves_a_mode_has_its_own_length_as_a_lower_bound() -> None:
    found = autocorrelation_time(torch.ones(400, 7), 0.2)
    assert found.kind == "lower_bound"
    assert found.value == pytest.approx(400)


def test_an_alternating_chain_is_better_than_independent_draws() -> None:
    x = torch.tensor([1.0, -1.0]).repeat(500)
    assert autocorrelation_time(x, 0.0).value < 0.01


@settings(max_examples=30, deadline=None)
@given(st.floats(0.1, 10), st.floats(-5, 5), st.integers(0, 1000))
def test_scale_and_offset_do_not_matter(scale: float, offset: float, seed: int) -> None:
    x = torch.randn(64, 2, generator=rng(seed), dtype=torch.float64).cumsum(0)
    plain = autocorrelation_time(x, 0.0)
    changed = autocorrelation_time(scale * x + offset, offset)
    assert changed.value == pytest.approx(plain.value, rel=1e-6)
    assert changed.kind == plain.kind


@pytest.mark.parametrize(
    ("series", "message"),
    [
        (torch.ones(1), "at least 2 states"),
        (torch.tensor([1.0, math.nan]), "all finite"),
        (torch.ones(5), "stays at its mean"),
    ],
)
def test_series_without_an_autocorrelation_are_refused(series: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        autocorrelation_time(series, 1.0)
