"""The sampler's temperature against closed forms and simulation in numpy; the experiment once at tiny settings."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from replicate.experiments import Run
from replicate.ledger.claims import claims_of
from replicate.papers import igebm
from replicate.papers.igebm import PAPER, compare
from replicate.runs.seeds import Streams


def test_one_lambda_is_temperature_one_and_the_released_constants_are_not() -> None:
    assert igebm.temperature(10.0, igebm.noise_of(10.0)) == pytest.approx(1.0)
    assert igebm.temperature(0.5, 1.0) == pytest.approx(1.0)
    assert igebm.temperature(10.0, 0.005) == pytest.approx(1.25e-6)
    assert igebm.temperature(500.0, 0.005) == pytest.approx(2.5e-8)


def test_the_conversion_to_the_suite_is_the_update_as_released() -> None:
    x = torch.tensor([[1.0, -2.0], [3.0, 0.5]], dtype=torch.float64)
    score = lambda x: -x.pow(3)  # noqa: E731
    moved = igebm.implicit_generation(score, x, 0.1, 0.3, 1, torch.Generator().manual_seed(5))
    z = torch.randn(x.shape, generator=torch.Generator().manual_seed(5), dtype=x.dtype)
    torch.testing.assert_close(moved, x - 0.1 * x.pow(3) + 0.3 * z)


@pytest.mark.parametrize(("step", "noise", "variance"), [(0.5, 1.0, 2.0), (1.5, 0.2, 1.0)])
def test_the_closed_form_is_the_variance_of_a_chain_in_numpy(step: float, noise: float, variance: float) -> None:
    rng = np.random.default_rng(0)
    x = np.zeros(200_000)
    for _ in range(60):
        x = x - step * x / variance + noise * rng.standard_normal(len(x))
    assert igebm.sampled_variance(step, noise, variance) == pytest.approx(x.var(), rel=0.02)


def test_the_closed_form_tends_to_the_temperature_for_small_steps_and_refuses_unstable_ones() -> None:
    assert igebm.sampled_variance(1e-6, igebm.noise_of(1e-6), 3.0) == pytest.approx(3.0, rel=1e-5)
    assert igebm.sampled_variance(1e-3, 0.02, 3.0) == pytest.approx(3.0 * 0.2, rel=1e-3)
    with pytest.raises(ValueError, match="diverges"):
        igebm.sampled_variance(10.0, 0.005, 4.9)


def test_the_experiment_at_tiny_settings() -> None:
    settings = {**compare.settings("smoke"), "chains": 100, "steps": 500}
    outcome = compare.measure(Run(settings, Streams(compare.name, "igebm", 0), torch.device("cpu")))
    values = {name: estimate.value for name, estimate in outcome.estimates.items()}
    assert values["variance_ratio:one_lambda"] == pytest.approx(1.01, abs=0.15)
    assert values["variance_ratio:released"] == pytest.approx(1.263e-6, rel=0.15)
    assert values["variance_ratio:released_closed_form"] == pytest.approx(1.25e-6 / (1 - 0.01), rel=1e-9)
    assert values["mode_spread:one_lambda"] == pytest.approx(1.0, abs=0.4)
    assert values["mode_spread:released"] < 1e-5
    assert all(math.isfinite(v) for v in values.values())
    measured = {m.split("/")[-1] for c in claims_of(PAPER).claims for m in (c.measure, c.over, c.minus) if m}
    assert measured <= set(values)
    drawn = {plot.name for plot in outcome.plots}
    assert all(set(c.plots) <= drawn for c in claims_of(PAPER).claims)
