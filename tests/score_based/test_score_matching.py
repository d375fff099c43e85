"""Score matching objectives against closed forms, and the score models' own promises."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from replicate.model import DataInfo, ModelEntry
from replicate.score_based import entries, matching
from replicate.score_based.networks import EnergyScore, FreeScore, GaussianFit, NoiseNet
from replicate.score_based.single import DenoisingModel

ENTRIES = {
    "sm-implicit": entries.SM_IMPLICIT,
    "dsm": entries.DSM,
    "ssm": entries.SSM,
    "ssm-vr": entries.SSM_VR,
    "dsm-energy": entries.DSM_ENERGY,
    "ncsn": entries.NCSN,
    "sde-vp": entries.SDE_VP,
    "sde-ve": entries.SDE_VE,
    "sde-subvp": entries.SDE_SUBVP,
}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gauss_hermite(mean: Tensor, chol: Tensor, order: int = 24) -> tuple[Tensor, Tensor]:
    """Nodes (m, 2) and weights (m,) that integrate polynomials against N(mean, chol chol') exactly."""
    nodes, weights = (torch.from_numpy(v) for v in np.polynomial.hermite_e.hermegauss(order))
    weights = weights / weights.sum()
    grid = torch.cartesian_prod(nodes, nodes)
    return mean + grid @ chol.T, torch.cartesian_prod(weights, weights).prod(1)


class LinearScore(nn.Module):
    """s(x) = A x + b: the family that holds every Gaussian's score."""

    def __init__(self, a: Tensor, b: Tensor) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(a.clone()), nn.Parameter(b.clone())

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.a.T + self.b


MEAN = torch.tensor([0.3, -0.7], dtype=torch.float64)
CHOL = torch.tensor([[1.2, 0.0], [0.5, 0.8]], dtype=torch.float64)
COV = CHOL @ CHOL.T


def gaussian_score(x: Tensor, cov: Tensor = COV) -> Tensor:
    return -(x - MEAN) @ torch.linalg.inv(cov)


def some_score() -> LinearScore:
    g = generator(3)
    return LinearScore(
        torch.randn(2, 2, generator=g, dtype=torch.float64), torch.randn(2, generator=g, dtype=torch.float64)
    )


def gradients(loss: Tensor, net: nn.Module) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(net.parameters()))])


def small_mlp() -> FreeScore:
    torch.manual_seed(5)
    return FreeScore(2, 8, 2, "softplus").double()


def test_implicit_equals_explicit_up_to_a_constant_on_a_gaussian() -> None:
    x, weight = gauss_hermite(MEAN, CHOL)
    net = some_score()
    explicit = (weight * matching.explicit_score_matching(net, gaussian_score, x)).sum()
    implicit = (weight * matching.implicit_score_matching(net, x)).sum()
    torch.testing.assert_close(gradients(implicit, net), gradients(explicit, net), rtol=0, atol=1e-10)
    half_fisher_information = 0.5 * torch.linalg.inv(COV).trace()
    assert float((explicit - implicit).detach()) == pytest.approx(float(half_fisher_information), abs=1e-10)


def test_implicit_equals_explicit_for_a_network_too() -> None:
    # not a polynomial: Gauss-Hermite converges to it, so the identity must hold to the quadrature's accuracy
    x, weight = gauss_hermite(MEAN, CHOL, order=60)
    net = small_mlp()
    explicit = (weight * matching.explicit_score_matching(net, gaussian_score, x)).sum()
    implicit = (weight * matching.implicit_score_matching(net, x)).sum()
    torch.testing.assert_close(gradients(implicit, net), gradients(explicit, net), rtol=0, atol=1e-8)


@pytest.mark.parametrize("objective", ["explicit", "implicit", "denoising", "sliced", "sliced_vr"])
def test_the_true_score_is_the_minimum(objective: str) -> None:
    sigma = 0.4
    x, weight = gauss_hermite(MEAN, CHOL, order=8)
    z, z_weight = gauss_hermite(torch.zeros(2, dtype=torch.float64), torch.eye(2, dtype=torch.float64), order=8)
    pairs, pair_weight = _pairs(x, z), torch.cartesian_prod(weight, z_weight).prod(1)
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=2)), dtype=torch.float64)
    losses = {
        "explicit": lambda s: weight @ matching.explicit_score_matching(s, gaussian_score, x),
        "implicit": lambda s: weight @ matching.implicit_score_matching(s, x),
        "denoising": lambda s: pair_weight @ matching.denoising_score_matching(s, pairs[0], sigma, pairs[1]),
        "sliced": lambda s: sum(weight @ matching.sliced_score_matching(s, x, v.expand_as(x)) for v in signs),
        "sliced_vr": lambda s: sum(weight @ matching.sliced_score_matching_vr(s, x, v.expand_as(x)) for v in signs),
    }
    cov = COV + sigma**2 * torch.eye(2, dtype=torch.float64) if objective == "denoising" else COV
    precision = torch.linalg.inv(cov)
    net = LinearScore(-precision, precision @ MEAN)
    loss = losses[objective](net)
    torch.testing.assert_close(gradients(loss, net), torch.zeros(6, dtype=torch.float64), rtol=0, atol=1e-10)
    for bump in torch.eye(6, dtype=torch.float64) * 0.05:
        worse = LinearScore(-precision + bump[:4].view(2, 2), precision @ MEAN + bump[4:])
        assert losses[objective](worse) > loss


def _pairs(x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    return x.repeat_interleave(len(z), 0), z.repeat(len(x), 1)


def test_denoising_is_explicit_matching_of_the_smoothed_density() -> None:
    sigma = 0.6
    smooth_cov = COV + sigma**2 * torch.eye(2, dtype=torch.float64)
    x, weight = gauss_hermite(MEAN, CHOL, order=12)
    z, z_weight = gauss_hermite(torch.zeros(2, dtype=torch.float64), torch.eye(2, dtype=torch.float64), order=12)
    (a, b), pair_weight = _pairs(x, z), torch.cartesian_prod(weight, z_weight).prod(1)
    y, y_weight = gauss_hermite(MEAN, torch.linalg.cholesky(smooth_cov), order=12)
    net = some_score()
    denoising = (pair_weight * matching.denoising_score_matching(net, a, sigma, b)).sum()
    explicit = (y_weight * matching.explicit_score_matching(net, lambda v: gaussian_score(v, smooth_cov), y)).sum()
    torch.testing.assert_close(gradients(denoising, net), sigma**2 * gradients(explicit, net), rtol=0, atol=1e-10)


def test_the_mean_of_sliced_matching_over_all_signs_is_implicit_matching() -> None:
    net, x = small_mlp(), torch.randn(5, 2, generator=generator(), dtype=torch.float64)
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=2)), dtype=torch.float64)
    implicit = matching.implicit_score_matching(net, x)
    for objective in (matching.sliced_score_matching, matching.sliced_score_matching_vr):
        mean = torch.stack([objective(net, x, v.expand_as(x)) for v in signs]).mean(0)
        torch.testing.assert_close(mean, implicit, rtol=0, atol=1e-12)


def test_variance_reduction_reduces_variance() -> None:
    net, x = some_score(), torch.randn(1, 2, generator=generator(1), dtype=torch.float64) + 2
    v = torch.randn(20_000, 2, generator=generator(2), dtype=torch.float64)
    rows = x.expand_as(v)
    plain = matching.sliced_score_matching(net, rows, v)
    reduced = matching.sliced_score_matching_vr(net, rows, v)
    difference = (plain - reduced).detach()
    assert abs(float(difference.mean())) < 4 * float(difference.std()) / len(v) ** 0.5
    assert reduced.var() < 0.5 * plain.var()


def test_tweedie_gives_the_posterior_mean_of_a_gaussian() -> None:
    sigma = 0.7
    smooth = COV + sigma**2 * torch.eye(2, dtype=torch.float64)
    y = torch.randn(6, 2, generator=generator(), dtype=torch.float64)
    posterior = MEAN + (y - MEAN) @ torch.linalg.inv(smooth) @ COV
    torch.testing.assert_close(matching.tweedie(y, gaussian_score(y, smooth), sigma), posterior)


def test_denoising_loss_stays_finite_in_half_precision_at_tiny_noise() -> None:
    sigma = 1e-4  # sigma^2 underflows in float16 and 1 / sigma^2 overflows
    assert torch.tensor(sigma**2).half() < 1e-7
    x = torch.randn(64, 2, generator=generator()).half()
    z = torch.randn(64, 2, generator=generator(1)).half()
    loss = matching.denoising_score_matching(lambda y: -y, x, sigma, z)
    assert loss.dtype == torch.float16
    torch.testing.assert_close(loss, 0.5 * z.square().sum(-1), rtol=0.01, atol=0.01)


def test_the_score_of_an_energy_ignores_constants_and_has_no_curl() -> None:
    torch.manual_seed(0)
    net = EnergyScore(3, 8, 2).double()
    x = torch.randn(4, 3, generator=generator(), dtype=torch.float64)
    before = net(x)
    with torch.no_grad():
        net.net[-1].bias += 17.0
    torch.testing.assert_close(net(x), before, rtol=0, atol=0)
    jacobian = torch.autograd.functional.jacobian(lambda v: net(v[None])[0], x[0])
    torch.testing.assert_close(jacobian, jacobian.T, rtol=0, atol=1e-12)


def test_the_score_of_the_energy_model_is_minus_the_gradient_of_its_energy() -> None:
    model = entries.DSM_ENERGY.build(DataInfo(2, "continuous"), **entries.DSM_ENERGY.params)
    x = torch.randn(5, 2, generator=generator()).requires_grad_(True)
    (grad,) = torch.autograd.grad(model.energy(x).sum(), x)
    torch.testing.assert_close(model.score(x.detach()), -grad)


def test_gaussian_fit_keeps_the_moments() -> None:
    x = MEAN + torch.randn(500, 2, generator=generator(), dtype=torch.float64) @ CHOL.T
    fit = GaussianFit(2).double()
    fit.fit(x)
    torch.testing.assert_close(fit.basis * fit.variance @ fit.basis.T, torch.cov(x.T, correction=0))
    torch.testing.assert_close(fit.from_basis(fit.to_basis(x)) + fit.mean, x)


def test_an_untrained_noise_network_is_exact_on_a_gaussian() -> None:
    x = MEAN + torch.randn(500, 2, generator=generator(), dtype=torch.float64) @ CHOL.T
    net = NoiseNet(2, hidden=8, depth=2).double()
    net.gaussian.fit(x)
    y, log_rho = x[:6], torch.linspace(-3, 3, 6, dtype=torch.float64)
    for row, level, eps in zip(y, log_rho, net(y, log_rho), strict=True):
        smooth = torch.cov(x.T, correction=0) + torch.eye(2, dtype=torch.float64) * (2 * level).exp()
        expected = level.exp() * torch.linalg.solve(smooth, row - x.mean(0))
        torch.testing.assert_close(eps, expected)


def test_noise_predictions_do_not_depend_on_the_rest_of_the_batch() -> None:
    torch.manual_seed(0)
    net = NoiseNet(2, hidden=16, depth=3, features=8).double()
    nn.init.normal_(net.last.weight)
    y, level = torch.randn(7, 2, dtype=torch.float64), torch.linspace(-3, 2, 7, dtype=torch.float64)
    alone = torch.cat([net(y[i : i + 1], level[i : i + 1]) for i in range(7)])
    torch.testing.assert_close(net(y, level), alone)


def test_beyond_its_reach_a_noise_network_adds_little_to_the_gaussian_fit() -> None:
    """Twice as far away, the prediction grows by the fit's own part alone."""
    torch.manual_seed(0)
    net = NoiseNet(2, hidden=16, depth=3, reach=3.0).double()
    nn.init.normal_(net.last.weight)
    net.gaussian.fit(MEAN + torch.randn(500, 2, generator=generator(), dtype=torch.float64) @ CHOL.T)
    level = torch.zeros(4, dtype=torch.float64)
    away = 20_000 * torch.randn(4, 2, generator=generator(1), dtype=torch.float64)
    near, far = (net(net.gaussian.mean + k * away, level) for k in (1, 2))
    plain = NoiseNet(2, hidden=16, depth=3).double()  # untrained: the fit alone
    plain.gaussian.load_state_dict(net.gaussian.state_dict())
    torch.testing.assert_close(far - near, plain(plain.gaussian.mean + away, level))


@pytest.mark.parametrize("name", ENTRIES)
def test_entries_build_train_and_sample_reproducibly(name: str) -> None:
    entry: ModelEntry = ENTRIES[name]
    data = torch.randn(64, 2, generator=generator())

    def outcome(noise: int) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        model = entry.build(DataInfo(2, "continuous"), **entry.params)
        model.initialise(data, generator())
        loss = model.loss(data, generator(noise))
        loss.backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]  # an energy's constant has none
        assert len(grads) >= len(list(model.parameters())) - 1
        assert all(g.isfinite().all() for g in grads)
        torch.manual_seed(noise)  # the global generator must not matter
        return loss.detach(), model.sample(16, generator(noise))

    (loss, sample), (loss_again, sample_again) = outcome(1), outcome(1)
    assert loss.isfinite()
    assert sample.shape == (16, 2)
    torch.testing.assert_close(loss, loss_again, rtol=0, atol=0)
    torch.testing.assert_close(sample, sample_again, rtol=0, atol=0)
    assert not torch.equal(sample, outcome(2)[1])


def test_a_denoising_model_learns_the_smoothed_score_of_a_gaussian() -> None:
    x = 0.8 * torch.randn(2000, 2, generator=generator())
    torch.manual_seed(0)
    model = DenoisingModel(FreeScore(2, 16, 1), sigma=0.6, dim=2, langevin_steps=300, step_size=0.05)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    g = generator(1)
    for _ in range(400):
        optimizer.zero_grad()
        model.loss(x, g).backward()
        optimizer.step()
    error = (model.score(x) + x).square().mean()  # 0.8^2 + 0.6^2 = 1
    assert error < 0.02
    samples = model.sample(2000, g)
    torch.testing.assert_close(samples.var(0), torch.ones(2), rtol=0, atol=0.15)


def test_dropout_uses_the_generator_and_is_off_in_evaluation() -> None:
    torch.manual_seed(0)
    net = NoiseNet(2, hidden=16, depth=2, dropout=0.5)
    nn.init.normal_(net.last.weight)
    y, level = torch.randn(4, 2), torch.zeros(4)
    first = net(y, level, generator(1))
    torch.manual_seed(99)
    torch.testing.assert_close(net(y, level, generator(1)), first, rtol=0, atol=0)
    assert not torch.equal(net(y, level, generator(2)), first)
    torch.testing.assert_close(net.eval()(y, level, generator(1)), net(y, level), rtol=0, atol=0)
