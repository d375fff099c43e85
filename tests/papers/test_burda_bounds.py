"""The linear Gaussian model behind Theorem 1 against quadrature, and its bounds."""

import math

import pytest
import torch
from scipy import integrate, stats

from replicate.experiments import Run
from replicate.papers.burda.bounds import LinearGaussian, measure_gaps
from replicate.runs.seeds import Streams


def test_exact_log_p_is_the_integral_over_the_latent() -> None:
    w = torch.tensor([[0.7], [-1.2]], dtype=torch.float64)
    model = LinearGaussian(w, 0.5, shift=0.0, widening=1.0)
    x = torch.tensor([[0.3, 0.9]], dtype=torch.float64)

    def joint(z: float) -> float:
        return stats.norm.pdf(z) * stats.norm.pdf(0.3, 0.7 * z, 0.5) * stats.norm.pdf(0.9, -1.2 * z, 0.5)

    assert float(model.exact_log_prob(x)) == pytest.approx(math.log(integrate.quad(joint, -8, 8)[0]), abs=1e-9)


def test_with_the_true_posterior_every_weight_is_p_of_x() -> None:
    g = torch.Generator().manual_seed(0)
    w = torch.randn(4, 2, generator=g, dtype=torch.float64)
    model = LinearGaussian(w, 0.6, shift=0.0, widening=1.0)
    x = torch.randn(5, 4, generator=g, dtype=torch.float64)
    weights = model.log_weights(x, 7, g)
    torch.testing.assert_close(weights, model.exact_log_prob(x)[:, None].expand(5, 7))


def test_the_bound_tightens_with_k() -> None:
    run = Run({**measure_gaps.params, "points": 300}, Streams("t", "burda", 0), torch.device("cpu"))
    gaps = [e.value for e in measure_gaps.measure(run).estimates.values()]
    assert gaps[0] > gaps[1] > gaps[2] > -0.02
