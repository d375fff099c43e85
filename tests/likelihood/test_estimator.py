"""From capabilities to log p(x): which estimator is used, what kind of number comes out, and that it is right."""

from __future__ import annotations

import math
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from replicate.likelihood.dequantisation import Preprocessed
from replicate.likelihood.estimator import Effort, log_likelihood
from replicate.model import DataInfo, Estimate, Family, Model

EFFORT = Effort(
    importance_samples=4000, dequantisation_draws=8, ais_chains=400, ais_steps=60, quadrature_points=200, ode_steps=20
)


def gen() -> torch.Generator:
    return torch.Generator().manual_seed(0)


class Bell(Model):
    """N(0, 2^2 I) in two dimensions, offered by the capabilities that a test asks for."""

    family: ClassVar[Family] = "reference"

    def __init__(self, *capabilities: str) -> None:
        super().__init__()
        self.capabilities = frozenset(capabilities)
        self.anchor = torch.nn.Parameter(torch.zeros(1))

    def log_prob(self, x: Tensor) -> Tensor:
        return -x.square().sum(1) / 8 - math.log(8 * math.pi)

    def energy(self, x: Tensor) -> Tensor:
        return x.square().sum(1) / 8 + 3.0  # a constant that log Z has to undo

    def log_weights(self, x: Tensor, k: int, generator: torch.Generator) -> Tensor:
        """x = z + noise, z ~ N(0, 3 I) and x | z ~ N(z, I), with z drawn from the prior."""
        z = math.sqrt(3) * torch.randn(len(x), k, 2, generator=generator)
        return -0.5 * (x[:, None] - z).square().sum(2) - math.log(2 * math.pi)

    def base_log_z(self) -> float:
        return math.log(2 * math.pi)

    def base_sample(self, n: int, generator: torch.Generator) -> Tensor:
        return torch.randn(n, 2, generator=generator)

    def anneal(self, x: Tensor, beta: float, beta_next: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """f_beta interpolates between the energy |x|^2 / 2 and the model's; the kernel draws afresh, exactly."""
        change = (beta_next - beta) * (x.square().sum(1).double() / 2 - self.energy(x).double())
        precision = 1 - beta_next + beta_next / 4
        return change, torch.randn(x.shape, generator=generator) / math.sqrt(precision)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        return 2 * torch.randn(n, 2, generator=generator)


X = torch.tensor([[0.0, 0.0], [1.0, -2.0], [3.0, 0.5]])


@pytest.mark.parametrize(
    ("capabilities", "half_width", "kind", "tolerance"),
    [
        (("log_prob", "energy", "score"), 16.0, "exact", 1e-6),
        (("importance_weights",), 16.0, "lower_bound", 0.2),
        (("energy", "annealing", "sample"), None, "estimate", 0.1),
        (("energy", "score"), 16.0, "estimate", 1e-4),
    ],
)
def test_each_capability_gives_the_closed_form_with_its_own_kind(
    capabilities: tuple[str, ...], half_width: float | None, kind: str, tolerance: float
) -> None:
    out = log_likelihood(Bell(*capabilities), X, EFFORT, gen(), half_width)
    assert out.kind == kind
    torch.testing.assert_close(out.values.float(), Bell().log_prob(X), atol=tolerance, rtol=0)


def test_the_same_behind_an_affine_preprocessing() -> None:
    data = torch.randn(500, 2, generator=gen()) * 3 + 1
    for capabilities in (("log_prob",), ("energy", "annealing", "sample"), ("importance_weights",)):
        model = Preprocessed(Bell(*capabilities), DataInfo(2, "continuous"))
        model.initialise(data, gen())
        z = (X - data.mean(0)) / data.std(0)
        exact = Bell().log_prob(z) - data.std(0).log().sum()
        out = log_likelihood(model, X, EFFORT, gen())
        torch.testing.assert_close(out.values.float(), exact, atol=0.2, rtol=0)
        if "elbo" in out.details:  # in the same coordinates as the bound that it must not exceed
            assert exact.mean() - 3 < out.details["elbo"].value < float(out.values.mean())


def test_in_the_plane_quadrature_gives_log_z_and_annealing_is_reported_too() -> None:
    """log Z of exp(-|x|^2 / 8 - 3) is log 8 pi - 3; the bracket agrees within its own errors."""
    out = log_likelihood(Bell("energy", "annealing", "sample"), X, EFFORT, gen(), half_width=16.0)
    log_z = math.log(8 * math.pi) - 3
    assert out.details["log_z"].value == pytest.approx(log_z, abs=1e-4)
    torch.testing.assert_close(out.values.float(), Bell().log_prob(X), atol=1e-4, rtol=0)
    for side in ("forward", "reverse"):
        e = out.details[f"ais_log_z_{side}"]
        assert abs(e.value - log_z) < 4 * e.stderr


def test_a_score_alone_has_no_log_p() -> None:
    with pytest.raises(NotImplementedError, match="no normalised density"):
        log_likelihood(Bell("score", "sample"), X, EFFORT, gen())


def test_the_log_z_error_is_shared_by_all_examples_and_does_not_average_out() -> None:
    out = log_likelihood(Bell("energy", "annealing", "sample"), X.repeat(1000, 1), EFFORT, gen())
    assert out.shared_stderr > 0
    assert out.mean().stderr >= out.shared_stderr


def test_negating_an_estimate_flips_its_bound() -> None:
    bound = Estimate(-3.0, 0.1, "lower_bound", "nats", 5)
    assert (-bound).kind == "upper_bound"
    assert (-bound).symbol == "<="
    assert bound.times(-2, "bits").value == 6.0
    assert bound.times(2, "bits").kind == "lower_bound"
    with pytest.raises(ValueError, match="kind"):
        Estimate(0.0, 0.0, "guess", "nats", 1)  # type: ignore[arg-type]
