"""Importance-weighted bounds against a linear-Gaussian VAE, whose log p(x) is a closed form."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from baselines.vae import VaeSettings, VariationalAutoencoder
from replicate.likelihood.importance import elbo, iw_bound
from replicate.model import DataInfo, Model

DIM, LATENT, NOISE = 3, 2, 0.7


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def linear_vae(optimal: bool) -> tuple[VariationalAutoencoder, torch.distributions.MultivariateNormal]:
    """x = W z + b + NOISE e with z ~ N(0, I), and its exact p(x).

    The columns of W are orthogonal, so that the exact posterior factorises and a linear encoder can reach it.
    A suboptimal encoder has its mean scaled and its standard deviation widened.
    """
    model = VariationalAutoencoder(DataInfo(DIM, "continuous"), VaeSettings(latent=LATENT, width=1, blocks=0)).double()
    w = torch.tensor([[1.0, 0.5], [1.0, -0.5], [0.5, 0.0]], dtype=torch.float64)
    b = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64)
    posterior_var = 1 / (1 + w.square().sum(0) / NOISE**2)
    gain = (posterior_var / NOISE**2)[:, None] * w.T
    scale, widen = (1.0, 0.0) if optimal else (0.7, 0.3)

    def decoder_log_std(raw: Tensor) -> Tensor:
        return model.decoder.mean_and_log_std(torch.cat([raw, raw]))[1]

    with torch.no_grad():
        for net in (model.encode, model.decode):
            for parameter in net.parameters():
                parameter.zero_()
        model.decode.linear.weight[:DIM] = w
        model.decode.leave.bias[:DIM] = b
        model.decode.leave.bias[DIM:] = solve_raw(decoder_log_std, math.log(NOISE))
        model.encode.linear.weight[:LATENT] = scale * gain
        model.encode.leave.bias[:LATENT] = -scale * gain @ b
        for j in range(LATENT):
            target = 0.5 * math.log(posterior_var[j]) + widen

            def log_std(raw: Tensor, j: int = j) -> Tensor:
                model.encode.leave.bias[LATENT + j] = raw[0]
                return model.posterior(torch.zeros(1, DIM, dtype=torch.float64))[1][0, j]

            model.encode.leave.bias[LATENT + j] = solve_raw(log_std, target)
    covariance = w @ w.T + NOISE**2 * torch.eye(DIM, dtype=torch.float64)
    return model.eval(), torch.distributions.MultivariateNormal(b, covariance)


def solve_raw(function: Callable[[Tensor], Tensor], target: float) -> float:
    """The network output at which an increasing function of it reaches the target, by bisection."""
    low, high = -30.0, 30.0
    for _ in range(80):
        middle = 0.5 * (low + high)
        reached = float(function(torch.tensor([middle], dtype=torch.float64)))
        low, high = (middle, high) if reached < target else (low, middle)
    return 0.5 * (low + high)


@pytest.fixture(scope="module")
def points() -> Tensor:
    return torch.randn(16, DIM, generator=generator(5), dtype=torch.float64)


def test_bounds_are_ordered_and_approach_the_exact_value(points: Tensor) -> None:
    """ELBO <= IW-5 <= IW-50 <= exact, each gap beyond four standard errors; IW-5000 within 0.01 nats."""
    model, exact = linear_vae(optimal=False)
    truth = exact.log_prob(points)
    means, errors = [], []
    for k in (1, 5, 50):
        draws = torch.stack([iw_bound(model, points, k, generator(i)).values.mean() for i in range(200)])
        means.append(float(draws.mean()))
        errors.append(float(draws.std() / math.sqrt(len(draws))))
    for i in range(2):
        assert means[i + 1] - means[i] > 4 * math.hypot(errors[i], errors[i + 1])
    assert means[2] < float(truth.mean()) + 4 * errors[2]
    assert means[2] > float(truth.mean()) - 0.05
    close = iw_bound(model, points, 5000, generator(1)).values
    assert abs(float((close - truth).mean())) < 0.01


def test_the_elbo_is_below_log_p_by_the_kl_to_the_posterior(points: Tensor) -> None:
    model, exact = linear_vae(optimal=False)
    best, _ = linear_vae(optimal=True)
    (q_mean, q_log_std), (p_mean, p_log_std) = model.posterior(points), best.posterior(points)
    q = torch.distributions.Normal(q_mean, q_log_std.exp())
    p = torch.distributions.Normal(p_mean, p_log_std.exp())
    expected = exact.log_prob(points) - torch.distributions.kl_divergence(q, p).sum(1)
    got = elbo(model, points, 20_000, generator())
    torch.testing.assert_close(got.values, expected, atol=0.05, rtol=0)
    assert got.kind == "lower_bound"
    assert got.draws == 20_000


def test_the_optimal_encoder_makes_every_weight_exact(points: Tensor) -> None:
    model, exact = linear_vae(optimal=True)
    log_w = model.log_weights(points, 7, generator())
    torch.testing.assert_close(log_w, exact.log_prob(points)[:, None].expand(-1, 7), atol=1e-8, rtol=0)


class Table(Model):
    """Row i of the data is the number i; its j-th draw is the j-th entry of row i of a table of log weights."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table, self.used = table, [0] * len(table)
        self.largest = 0

    def log_weights(self, x: Tensor, k: int, generator: torch.Generator) -> Tensor:
        self.largest = max(self.largest, len(x) * k)
        rows = []
        for i in x[:, 0].long().tolist():
            rows.append(self.table[i, self.used[i] : self.used[i] + k])
            self.used[i] += k
        return torch.stack(rows)


@pytest.mark.parametrize("chunk", [1, 3, 7, 13, 14, 1000])
def test_every_chunk_uses_each_of_exactly_k_draws_once(chunk: int) -> None:
    """Also where k is larger or smaller than the number of examples, and weights span hundreds of nats."""
    n, k = 5, 7
    table = 200 * torch.randn(n, k + 3, generator=generator(), dtype=torch.float64) - 400
    x = torch.arange(n).float()[:, None]
    model = Table(table)
    result = iw_bound(model, x, k, generator(), chunk=chunk)
    assert model.used == [k] * n
    assert model.largest <= chunk
    assert result.draws == k
    assert result.kind == "lower_bound"
    torch.testing.assert_close(result.values, table[:, :k].logsumexp(1) - math.log(k), rtol=1e-12, atol=0)
    assert result.details["elbo"].value == pytest.approx(float(table[:, :k].mean()), rel=1e-12)
    p = table[:, :k].softmax(1)
    assert result.details["ess"].value == pytest.approx(float((1 / p.square().sum(1)).mean()), rel=1e-9)
    again = elbo(Table(table), x, k, generator(), chunk=chunk)
    torch.testing.assert_close(again.values, table[:, :k].mean(1), rtol=1e-12, atol=0)


def test_small_weights_survive_single_precision() -> None:
    """2000 equal weights of exp(-1e4): the sum is done in double precision and in logs."""
    result = iw_bound(Table(torch.full((1, 2000), -1e4)), torch.zeros(1, 1), 2000, generator(), chunk=3)
    assert float(result.values) == pytest.approx(-1e4, abs=1e-6)


class Flipped(VariationalAutoencoder):
    """A planted error: q / p instead of p / q for the latent part of the weight."""

    def log_weights(self, x: Tensor, k: int, generator: torch.Generator) -> Tensor:
        noise = torch.randn((len(x), k, self.latent), generator=generator, dtype=x.dtype)
        log_lik, log_ratio = self.bound_terms(x, noise)
        return log_lik - log_ratio


def test_a_flipped_sign_in_the_weight_breaks_the_bound(points: Tensor) -> None:
    """The check above is able to fail: with the sign turned round the value is above exact log p."""
    model, exact = linear_vae(optimal=True)
    model.__class__ = Flipped
    wrong = iw_bound(model, points, 500, generator()).values
    assert float((wrong - exact.log_prob(points)).mean()) > 0.5


@pytest.mark.parametrize(("k", "chunk"), [(0, 10), (5, 0)])
def test_no_draws_is_an_error(k: int, chunk: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        iw_bound(Table(torch.zeros(1, 1)), torch.zeros(1, 1), k, generator(), chunk=chunk)


def test_the_same_generator_state_gives_the_same_bits(points: Tensor) -> None:
    model, _ = linear_vae(optimal=False)
    state = torch.get_rng_state()
    a = iw_bound(model, points, 9, generator(3)).values
    b = iw_bound(model, points, 9, generator(3)).values
    assert torch.equal(a, b)
    assert not torch.equal(a, iw_bound(model, points, 9, generator(4)).values)
    assert torch.equal(state, torch.get_rng_state())
