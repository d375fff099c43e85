"""VAE and IWAE: decoders are normalised, bounds and scores are what they say, samples agree with the density."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from baselines.vae import IWAE, VAE, MixturePrior, VaeSettings, VariationalAutoencoder, make_decoder
from replicate.likelihood.importance import iw_bound
from replicate.model import DataInfo, ModelEntry

BITS = DataInfo(3, "bits", 2)
LEVELS = DataInfo(3, "levels", 4)
PLANE = DataInfo(2, "continuous")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small(info: DataInfo, **params: object) -> VariationalAutoencoder:
    """A tiny model with weights far from their start, so that nothing holds by symmetry."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = VariationalAutoencoder(
            info, VaeSettings(**{"latent": 2, "width": 8, "blocks": 1, "components": 3, **params})
        )  # type: ignore[arg-type]
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def covering(model: VariationalAutoencoder) -> VariationalAutoencoder:
    """The same p(x, z) with an encoder wide enough to cover the prior, so that weights have light tails."""
    with torch.no_grad():
        for parameter in model.encode.parameters():
            parameter.mul_(0.1)
        model.encode.leave.bias[model.latent :] += 0.7
    return model


def all_states(info: DataInfo) -> Tensor:
    assert info.levels is not None
    return torch.tensor(list(itertools.product(range(info.levels), repeat=info.dim))).float()


@pytest.mark.parametrize("info", [BITS, LEVELS], ids=["bits", "levels"])
def test_discrete_decoders_sum_to_one(info: DataInfo) -> None:
    decoder = make_decoder(info, rank=3).double()
    x = all_states(info).double()
    decoder.initialise(x[: len(x) // 2 + 1])
    out = 3 * torch.randn(1, 5, decoder.outputs, generator=generator(), dtype=torch.float64)
    log_p = decoder.log_prob(out.expand(len(x), -1, -1), x)
    torch.testing.assert_close(log_p.logsumexp(0), torch.zeros(5, dtype=torch.float64), atol=1e-10, rtol=0)


def test_the_gaussian_decoder_integrates_to_one() -> None:
    decoder = make_decoder(DataInfo(1, "continuous"), rank=1)
    out = torch.randn(1, 4, 2, generator=generator()).double()
    x = torch.linspace(-30, 30, 60_001, dtype=torch.float64)[:, None]
    p = decoder.log_prob(out.expand(len(x), -1, -1), x).exp()
    torch.testing.assert_close(torch.trapezoid(p, x[:, 0], dim=0), torch.ones(4, dtype=torch.float64))


@pytest.mark.parametrize("components", [1, 3])
def test_the_prior_integrates_to_one_and_its_samples_follow_it(components: int) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        prior = MixturePrior(2, components).double()
    axis = torch.linspace(-9, 9, 361, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    p = prior.log_prob(grid).detach().exp() * (axis[1] - axis[0]) ** 2
    assert float(p.sum()) == pytest.approx(1.0, abs=1e-6)
    z = prior.sample(20_000, torch.zeros((), dtype=torch.float64), generator())
    torch.testing.assert_close(z.mean(0), p @ grid, atol=0.05, rtol=0)
    torch.testing.assert_close(z.square().mean(0), p @ grid.square(), atol=0.15, rtol=0)


@pytest.mark.parametrize("info", [BITS, LEVELS], ids=["bits", "levels"])
def test_importance_weights_average_to_a_distribution(info: DataInfo) -> None:
    """The weights' means over all states sum to 1: no term is missing from or counted twice in a weight."""
    model = covering(small(info))
    x = all_states(info)
    result = iw_bound(model, x, 20_000, generator())
    assert float(result.values.logsumexp(0).exp()) == pytest.approx(1.0, abs=0.02)
    samples = model.sample(40_000, generator(1))
    index = (samples @ torch.tensor([float(info.levels or 0) ** i for i in (2, 1, 0)])).long()
    frequency = torch.bincount(index, minlength=len(x)) / len(samples)
    assert float((frequency - result.values.exp()).abs().sum()) < 0.06


def test_importance_weights_average_to_a_density_that_samples_follow() -> None:
    model = covering(small(PLANE))
    samples = model.sample(20_000, generator(1))
    low, high = samples.min(0).values - 2, samples.max(0).values + 2
    xs, ys = (torch.linspace(float(a), float(b), 100) for a, b in zip(low, high, strict=True))
    grid = torch.cartesian_prod(xs, ys)
    p = iw_bound(model, grid, 300, generator()).values.exp() * float((xs[1] - xs[0]) * (ys[1] - ys[0]))
    assert float(p.sum()) == pytest.approx(1.0, abs=0.02)
    torch.testing.assert_close((p[:, None] * grid).sum(0).float(), samples.mean(0), atol=0.1, rtol=0)


@pytest.mark.parametrize("info", [BITS, LEVELS, PLANE], ids=["bits", "levels", "continuous"])
def test_shapes_and_ranges_of_samples(info: DataInfo) -> None:
    x = small(info).sample(50, generator())
    assert x.shape == (50, info.dim)
    assert x.dtype == torch.float32
    assert torch.isfinite(x).all()
    if info.levels is not None:
        assert torch.equal(x, x.round())
        assert float(x.min()) >= 0
        assert float(x.max()) <= info.levels - 1
    assert torch.equal(x, small(info).sample(50, generator()))


@pytest.mark.parametrize("info", [BITS, LEVELS, PLANE], ids=["bits", "levels", "continuous"])
def test_the_loss_is_minus_the_bound_of_its_draws(info: DataInfo) -> None:
    """Loss with k draws = -(log mean exp) of `log_weights` under the same noise; k = 1 is the one-draw ELBO."""
    x = all_states(LEVELS)[:20, : info.dim] % 2
    for k in (1, 5):
        model = small(info, draws=k)
        log_w = model.log_weights(x, k, generator(7))
        expected = -(log_w.logsumexp(1) - math.log(k)).mean()
        torch.testing.assert_close(model.loss(x, generator(7)), expected)
        if k == 1:
            torch.testing.assert_close(expected, -log_w.mean())


def test_iwae_with_one_draw_trains_exactly_as_the_vae() -> None:
    """Same loss and same gradients, bit for bit, with dropout on."""
    gradients = []
    for entry in (VAE, IWAE):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = entry.build(BITS, **{**VAE.params, "draws": 1, "latent": 2, "width": 8, "dropout": 0.2})
        model.train()
        model.loss(all_states(BITS), generator()).backward()
        gradients.append([p.grad for p in model.parameters()])
    assert IWAE.params["draws"] > 1
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_warm_up_weighs_the_latent_terms_from_nothing_to_one() -> None:
    model = small(BITS, beta_warmup=4)
    x = all_states(BITS)
    noise = torch.randn((len(x), 1, 2), generator=generator())
    log_lik, log_ratio = model.bound_terms(x, noise)
    for step in range(7):
        expected = -(log_lik + min(1.0, (step + 1) / 5) * log_ratio).mean()
        torch.testing.assert_close(model.loss(x, generator()), expected)
        model.after_step(generator())
    torch.testing.assert_close(model.validation_loss(x, generator(3)), small(BITS).validation_loss(x, generator(3)))


def test_dropout_acts_in_training_only() -> None:
    model = small(BITS, dropout=0.5, input_dropout=0.5)
    plain = small(BITS)
    x = all_states(BITS)
    torch.testing.assert_close(model.loss(x, generator()), plain.loss(x, generator()))
    model.train()
    assert not torch.allclose(model.loss(x, generator()), plain.loss(x, generator()))


def test_the_score_is_the_gradient_of_the_fixed_bound() -> None:
    model = small(PLANE).double()
    x = torch.randn(6, 2, generator=generator(), dtype=torch.float64)
    got = model.score(x)
    step = 1e-5
    for d in range(2):
        shift = step * torch.eye(2, dtype=torch.float64)[d]
        slope = (model.fixed_bound(x + shift) - model.fixed_bound(x - shift)) / (2 * step)
        torch.testing.assert_close(got[:, d], slope.detach(), atol=1e-6, rtol=1e-6)
    # an example's score depends on neither its batch mates nor the call
    torch.testing.assert_close(model.score(x[2:3]), got[2:3])
    assert torch.equal(model.score(x), got)


def test_the_score_approaches_that_of_a_linear_model() -> None:
    """z ~ N(0, I), x = A z + s e: the score is -(A A^T + s^2 I)^-1 x."""
    model = VariationalAutoencoder(PLANE, VaeSettings(latent=2, width=1, blocks=0, score_draws=4096)).double()
    a = torch.tensor([[0.8, 0.3], [-0.2, 0.6]], dtype=torch.float64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.decode.linear.weight[:2] = a
        model.decode.leave.bias[2:] = -0.5
        model.encode.leave.bias[2:] = 0.0
        _, log_std = model.decoder.mean_and_log_std(model.decode(torch.zeros(1, 2, dtype=torch.float64)))  # type: ignore
    x = torch.tensor([[0.5, -0.4], [-0.3, 0.2], [1.0, 0.3]], dtype=torch.float64)
    covariance = a @ a.T + torch.diag((2 * log_std[0]).exp().detach())
    torch.testing.assert_close(model.score(x), -torch.linalg.solve(covariance, x.T).T, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("latent", [2, 3])
def test_on_continuous_data_training_starts_from_a_mixture_of_gaussians(latent: int) -> None:
    """Before any step, two slanted clusters are described better than by one full-covariance Gaussian."""
    side = (torch.rand(2000, 1, generator=generator(1)) < 0.3).float()
    x = torch.randn(2000, 2, generator=generator(2)) * torch.tensor([0.3, 0.1])
    x = (x + 2 * side - 0.6) @ torch.tensor([[0.8, -0.6], [0.6, 0.8]])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = VariationalAutoencoder(PLANE, VaeSettings(latent=latent, width=8, components=8)).eval()
    model.initialise(x, generator())
    gaussian = torch.distributions.MultivariateNormal(x.mean(0), x.T.cov()).log_prob(x).mean()
    assert float(iw_bound(model, x, 50, generator()).mean().value - gaussian) > 0.3


@pytest.mark.parametrize(
    ("info", "expected"),
    [
        (BITS, {"importance_weights", "sample"}),
        (LEVELS, {"importance_weights", "sample"}),
        (PLANE, {"importance_weights", "sample", "score"}),
    ],
)
def test_capabilities(info: DataInfo, expected: set[str]) -> None:
    assert small(info).capabilities == expected


@pytest.mark.parametrize("entry", [VAE, IWAE], ids=["vae", "iwae"])
@pytest.mark.parametrize("info", [BITS, LEVELS, PLANE], ids=["bits", "levels", "continuous"])
def test_a_step_lowers_the_loss_and_leaves_the_global_generator_alone(entry: ModelEntry, info: DataInfo) -> None:
    overrides = {k: v for k, v in entry.overrides.get(info.domain, {}).items() if k in entry.params}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = entry.build(info, **{**entry.params, **overrides, "beta_warmup": 0, "dropout": 0.1})
    state = torch.get_rng_state()
    x = (all_states(LEVELS)[::2, : info.dim] % 2).contiguous()
    if info.domain == "continuous":
        u = torch.randn(100, 1, generator=generator())
        x = torch.cat([u, u.square()], 1)
    model.initialise(x, generator())
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    first = float(model.validation_loss(x, generator()))
    for i in range(30):
        loss = model.loss(x, generator(i))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.after_step(generator())
    model.eval()
    assert float(model.validation_loss(x, generator())) < first - 0.1
    model.sample(3, generator())
    if "score" in model.capabilities:
        assert model.score(x).shape == x.shape
    assert torch.equal(state, torch.get_rng_state())
