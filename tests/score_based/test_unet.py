"""The U-Net against the Gaussian that it starts at, and the pieces that it is made of."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from replicate.likelihood.estimator import Effort, log_likelihood
from replicate.likelihood.ode import ode_log_prob
from replicate.model import DataInfo
from replicate.score_based.images import SDES, DequantisedImages, build_diffusion, even_levels
from replicate.score_based.networks import NoiseNet
from replicate.score_based.unet import NoiseUNet, PixelFeatures, Upsample
from replicate.sde import VE, VP

SMALL = (4, 4)
#: enough pixels for a trace by probes
INFO = DataInfo(32, "levels", 8, (4, 8))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network(image: tuple[int, int] = SMALL, stirred: bool = False, **settings: float) -> NoiseUNet:
    """A U-Net of width 4 whose last layers are 0, as before training, or drawn like the others."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = NoiseUNet(image, channels=4, octaves=2, spacing=0.25, **settings)
        if stirred:
            for p in net.parameters():
                p.data += 0.1 * torch.randn(p.shape)
    return net


def correlated(n: int = 400) -> Tensor:
    """Rows (n, 16) of a Gaussian with correlations and a mean, in [-1, 1] for the most part."""
    factor = torch.randn(16, 16, generator=generator(1)) / 8
    return 0.3 + torch.randn(n, 16, generator=generator(2)) @ factor


def fitted(net: NoiseUNet, x: Tensor) -> torch.distributions.MultivariateNormal:
    """Fit the net and return the same Gaussian, float64."""
    net.gaussian.fit(x)
    x = x.double()
    return torch.distributions.MultivariateNormal(x.mean(0), torch.cov(x.T, correction=0))


@pytest.mark.parametrize("image", [(28, 28), (8, 8), (4, 8)])
def test_noise_has_the_shape_of_the_images(image: tuple[int, int]) -> None:
    y = torch.randn(3, image[0] * image[1], generator=generator())
    assert network(image)(y, torch.zeros(3), generator()).shape == y.shape


def test_the_default_network_has_about_a_million_and_a_half_weights() -> None:
    assert sum(p.numel() for p in NoiseUNet((28, 28)).parameters()) == pytest.approx(1.5e6, rel=0.05)


def test_images_that_cannot_be_halved_twice_are_refused() -> None:
    with pytest.raises(ValueError, match="6x8"):
        NoiseUNet((6, 8))


@pytest.mark.parametrize("log_rho", [-6.0, 1.0])
def test_an_untrained_unet_is_the_score_of_the_noised_gaussian_fit(log_rho: float) -> None:
    net, x = network().double(), correlated()
    truth = fitted(net, x)
    rho = math.exp(log_rho)
    noised = torch.distributions.MultivariateNormal(truth.mean, truth.covariance_matrix + rho**2 * torch.eye(16))
    y = x[:5].double().requires_grad_(True)
    (score,) = torch.autograd.grad(noised.log_prob(y).sum(), y)
    eps = net(y, torch.full((5,), log_rho, dtype=torch.float64))
    torch.testing.assert_close(eps, -rho * score, rtol=1e-4, atol=1e-6)


def test_the_unet_starts_at_the_same_function_as_the_mlp() -> None:
    mlp, unet, x = NoiseNet(16, hidden=4, depth=2), network(), correlated()
    mlp.gaussian.fit(x)
    unet.gaussian.fit(x)
    level = torch.linspace(-5, 3, len(x))
    torch.testing.assert_close(unet(x, level), mlp(x, level))


def test_every_weight_is_used() -> None:
    net, x = network(stirred=True), correlated(8)
    net.gaussian.fit(x)
    net(x, torch.linspace(-3, 1, 8)).square().sum().backward()
    unused = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert unused == []


def test_from_the_start_the_gradient_reaches_the_last_layer_alone() -> None:
    """The last convolution is 0, so that the first step moves only it; then the others follow."""
    net, x = network(), correlated(8)
    net.gaussian.fit(x)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    moved = []
    for _ in range(2):
        optimizer.zero_grad()
        net(x, torch.linspace(-3, 1, 8)).square().sum().backward()
        moved.append({name.split(".")[1] for name, p in net.named_parameters() if p.grad is not None and p.grad.any()})
        optimizer.step()
    assert moved[0] == {"last"}
    assert {"first", "up", "last"} <= moved[1]


def test_an_image_does_not_depend_on_the_rest_of_its_batch() -> None:
    net, x = network(stirred=True), correlated(6)
    net.gaussian.fit(x)
    level = torch.linspace(-3, 1, 6)
    far = torch.cat([x[:1], 100 * x[1:]])
    torch.testing.assert_close(net(far, level)[:1], net(x[:1], level[:1]), rtol=1e-4, atol=1e-5)


def test_upsampling_equals_torch_nearest_neighbour() -> None:
    h = torch.randn(2, 3, 2, 4, generator=generator())
    grow = Upsample(3, 5)
    torch.testing.assert_close(grow(h), grow.conv(torch.nn.functional.interpolate(h, scale_factor=2.0)))


def test_pixel_features_are_damped_by_their_expectation_under_the_noise() -> None:
    """E sin(w (y + rho z)) by Gauss-Hermite quadrature."""
    features = PixelFeatures(3, 0.25).double()
    nodes, weights = (torch.from_numpy(v) for v in np.polynomial.hermite_e.hermegauss(40))
    y, rho = torch.tensor([[0.3, -0.7]], dtype=torch.float64), 0.1
    clean = features((y[0] + rho * nodes[:, None]), torch.zeros(40, 1, dtype=torch.float64))
    expected = (weights[:, None, None] * clean).sum(0) / math.sqrt(2 * math.pi)
    damped = features(y, torch.full((1, 1), rho, dtype=torch.float64))[0]
    slow = [1, 2, 4, 5]  # periods of 2 and 4 levels, which the quadrature resolves
    torch.testing.assert_close(damped[slow], expected[slow], rtol=1e-6, atol=1e-6)


# horizons at which data of unit scale are forgotten, so that what is measured is network and solver
LONG = {"vp": VP(beta_max=60.0, t_min=4e-7), "ve": VE(2e-4, 1e6)}


def uncorrelated(name: str) -> tuple[DequantisedImages, torch.distributions.Normal]:
    """An untrained model whose fit is diagonal, where one trace probe is exact, and that fit noised by rho at t_min."""
    sde = LONG[name]
    inner = build_diffusion(INFO, sde, even_levels(sde), "likelihood", 2, channels=4)
    model, gaussian = DequantisedImages(inner, INFO).eval(), inner.net.gaussian
    gaussian.mean.copy_(torch.linspace(-0.5, 0.5, 32))
    gaussian.variance.copy_(torch.linspace(0.05, 1.5, 32))
    low = sde.log_ratio(torch.tensor([sde.t_min], dtype=torch.float64)).exp()
    truth = torch.distributions.Normal(gaussian.mean.double(), (gaussian.variance.double() + low.square()).sqrt())
    return model.double(), truth


def test_the_flow_likelihood_of_an_untrained_unet_is_that_of_the_gaussian() -> None:
    model, truth = uncorrelated("vp")
    x = torch.randn(3, 32, generator=generator(), dtype=torch.float64)
    found = ode_log_prob(model.inner, x, generator(), steps=16)
    error = float((found.values - truth.log_prob(x).sum(-1)).abs().mean())
    assert error < found.details["solver_error"].value < 0.5
    assert error < 0.06


def test_bits_per_dim_of_levels_are_those_of_the_gaussian() -> None:
    """The whole way from integers to the bound on log P, for the draw of u that the model makes."""
    model, truth = uncorrelated("ve")
    x = torch.randint(0, 8, (3, 32), generator=generator(3)).double()
    found = log_likelihood(model, x, Effort(ode_draws=1, ode_steps=16), generator(5))
    u = torch.rand(3, 32, generator=generator(5), dtype=torch.float64)
    expected = truth.log_prob(2 * (x + u) / 8 - 1).sum(-1) - 32 * math.log(4)
    assert found.kind == "lower_bound"
    torch.testing.assert_close(found.values, expected, rtol=0, atol=0.1)


@pytest.mark.parametrize("name", SDES)
def test_every_sde_starts_at_the_same_noise(name: str) -> None:
    sde = SDES[name]
    ends = torch.tensor([sde.t_min, sde.t_max], dtype=torch.float64)
    low, high = sde.log_ratio(ends).tolist()
    assert math.exp(low) == pytest.approx(2e-4)
    levels = even_levels(sde).sample(4000, generator())
    share, _ = torch.sort((levels - low) / (high - low))
    torch.testing.assert_close(share, (torch.arange(4000).double() + 0.5) / 4000, rtol=0, atol=1e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_two_calls_on_the_device_give_the_same_bits() -> None:
    def gradient() -> list[Tensor]:
        net = network((28, 28), stirred=True).cuda()
        y = torch.randn(64, 784, generator=generator()).cuda()
        net(y, torch.linspace(-6, 3, 64).cuda()).square().sum().backward()
        return [p.grad.cpu() for p in net.parameters() if p.grad is not None]

    torch.use_deterministic_algorithms(True)
    try:
        assert all(torch.equal(a, b) for a, b in zip(gradient(), gradient(), strict=True))
    finally:
        torch.use_deterministic_algorithms(False)
