"""MAF: every layer's inverse and log-determinant, then what follows for the density as a whole."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TypeVar

import pytest
import torch
from torch import Tensor

from baselines.flow import Flow, Layer
from baselines.maf import MAF, Autoregression, MaskedNet, Reverse, build_maf
from replicate.model import DataInfo, Training
from replicate.runs.seeds import Streams
from replicate.runs.training import train

M = TypeVar("M", bound=torch.nn.Module)
DIM = 5


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    """Layers draw their first weights from the global generator, as torch's do."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randomised(module: M, scale: float = 0.3) -> M:
    """The module in float64 with every parameter moved away from its start."""
    module.double()
    generator = seeded(11)
    for p in module.parameters():
        p.data += scale / p.shape[-1] ** 0.5 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return module


def small_maf(dim: int = DIM, blocks: int = 3, scale: float = 0.3, reach: float = 0.0) -> Flow:
    model = build_maf(DataInfo(dim, "continuous"), blocks=blocks, hidden=12, reach=reach)
    model.double()
    model.initialise(torch.randn(200, dim, generator=seeded(1), dtype=torch.float64), seeded())
    return randomised(model, scale).eval()


def block(dim: int = DIM, layers: int = 2) -> Autoregression:
    return randomised(Autoregression(MaskedNet(dim, 12, layers, 0.0), 3.0))


LAYERS: dict[str, Callable[[], Layer | Flow]] = {
    "autoregression": block,
    "autoregression-one-layer": lambda: block(layers=1),
    "reverse": Reverse,
    "maf": small_maf,
    "made": lambda: small_maf(blocks=1),
    "maf-within-reach": lambda: small_maf(reach=2.0),
}


@pytest.mark.parametrize("name", LAYERS)
class TestEveryLayer:
    def inputs(self, n: int = 50) -> Tensor:
        return 2.0 * torch.randn(n, DIM, generator=seeded(3), dtype=torch.float64)

    def test_inverse_undoes_forward_and_forward_undoes_inverse(self, name: str) -> None:
        layer, x = LAYERS[name](), self.inputs()
        y, _ = layer(x)
        assert not torch.allclose(y, x, atol=1e-2)  # else the check below says nothing
        torch.testing.assert_close(layer.inverse(y), x, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(layer(layer.inverse(x))[0], x, rtol=1e-8, atol=1e-8)

    def test_log_determinant_is_that_of_the_autograd_jacobian(self, name: str) -> None:
        layer, x = LAYERS[name](), self.inputs(10)
        jacobian = torch.func.vmap(torch.func.jacrev(lambda row: layer(row[None])[0][0]))(x)
        logdet = torch.linalg.slogdet(jacobian).logabsdet
        torch.testing.assert_close(layer(x)[1], logdet, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("dim", [1, 2, 5, 20])
def test_a_dimension_moves_by_all_dimensions_before_it_and_no_other(dim: int) -> None:
    net = randomised(MaskedNet(dim, 40, 2, 0.0))
    for p in net.parameters():
        p.data.abs_()  # every unit is active
    x = torch.rand(dim, generator=seeded(4), dtype=torch.float64)
    for part in (0, 1):
        jacobian = torch.autograd.functional.jacobian(lambda r, part=part: net(r[None])[part][0], x)
        assert torch.equal(jacobian != 0, torch.ones(dim, dim).tril(-1).bool())


def test_blocks_take_the_dimensions_in_turned_order() -> None:
    """In the second block the last dimension comes first: it moves alone, and all others may move by it."""
    model = small_maf(blocks=2)
    x = torch.randn(DIM, generator=seeded(4), dtype=torch.float64)
    first, norm, *rest = model.layers
    middle = norm(first(x[None])[0])[0][0]

    def second(row: Tensor) -> Tensor:
        for layer in rest:
            row = layer(row[None])[0][0]
        return row

    jacobian = torch.autograd.functional.jacobian(second, middle)
    assert not jacobian.flip(1).triu(1).any()
    assert jacobian[1:, -1].any()
    assert model.nfe == 2 * DIM


def test_one_block_is_a_product_of_normal_conditionals() -> None:
    """MADE: m and a of each dimension from the network, written out."""
    model = small_maf(blocks=1)
    auto, norm = model.layers
    assert isinstance(auto, Autoregression)
    x = torch.randn(20, DIM, generator=seeded(5), dtype=torch.float64)
    shift, raw = auto.net(x)
    std = torch.exp(auto.bound * torch.tanh(raw / auto.bound)) * torch.exp(-norm.log_scale)  # type: ignore[operator]
    mean = shift - norm.bias * torch.exp(auto.bound * torch.tanh(raw / auto.bound))  # type: ignore[operator]
    torch.testing.assert_close(model.log_prob(x), torch.distributions.Normal(mean, std).log_prob(x).sum(1))


def test_starts_as_the_standardised_normal_density() -> None:
    x = 3 + 2 * torch.randn(500, DIM, generator=seeded(6), dtype=torch.float64)
    model = build_maf(DataInfo(DIM, "continuous"), **MAF.params).double()
    model.initialise(x, seeded())
    expected = torch.distributions.Normal(x.mean(0), x.std(0)).log_prob(x).sum(1)
    torch.testing.assert_close(model.log_prob(x), expected)


def test_integrates_to_one() -> None:
    model = small_maf(2)
    axis = torch.linspace(-12, 12, 301, dtype=torch.float64)
    with torch.no_grad():
        mass = model.log_prob(torch.cartesian_prod(axis, axis)).exp().sum() * (axis[1] - axis[0]) ** 2
    assert float(mass) == pytest.approx(1.0, abs=1e-3)


def test_samples_are_latents_sent_back_one_dimension_at_a_time() -> None:
    model = small_maf()
    x = model.sample(20, seeded(7))
    z = torch.randn(20, DIM, generator=seeded(7), dtype=torch.float64)
    torch.testing.assert_close(model(x)[0], z, rtol=1e-8, atol=1e-8)


def test_an_example_does_not_depend_on_its_batch_mates() -> None:
    model = small_maf()
    x = torch.randn(9, DIM, generator=seeded(8), dtype=torch.float64)
    alone = torch.cat([model.log_prob(row[None]) for row in x])
    torch.testing.assert_close(model.log_prob(x), alone, rtol=1e-10, atol=1e-10)
    model.train()
    torch.testing.assert_close(model.loss(x, seeded()), -alone.mean(), rtol=1e-10, atol=1e-10)


def test_score_is_the_slope_of_log_prob() -> None:
    model, h = small_maf(3), 1e-6
    x = torch.randn(20, 3, generator=seeded(9), dtype=torch.float64)
    steps = h * torch.eye(3, dtype=torch.float64)
    with torch.no_grad():
        slopes = [(model.log_prob(x + e) - model.log_prob(x - e)) / (2 * h) for e in steps]
    torch.testing.assert_close(model.score(x), torch.stack(slopes, 1), atol=1e-5, rtol=1e-5)


def test_draws_come_from_the_given_generator_alone_and_dropout_is_for_training_only() -> None:
    model = randomised(build_maf(DataInfo(DIM, "continuous"), hidden=20, dropout=0.5)).float()
    x = torch.randn(30, DIM, generator=seeded(8))
    before = torch.get_rng_state()
    first = [model.loss(x, seeded(1)), model.sample(5, seeded(1)), model.log_prob(x)]
    again = [model.loss(x, seeded(1)), model.sample(5, seeded(1)), model.log_prob(x)]
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(model.loss(x, seeded(2)), first[0])
    assert not torch.equal(model.sample(5, seeded(2)), first[1])
    assert torch.equal(model.validation_loss(x, seeded(1)), -model.log_prob(x).mean())


def test_finds_the_entropy_of_a_parabola_with_noise() -> None:
    """x_1 normal, x_2 normal about x_1^2: entropy log(2 pi e) - log 4 nats, and MADE in this order says it exactly."""
    z = torch.randn(6000, 2, generator=seeded(10))
    x = torch.stack([z[:, 0], z[:, 0].square() + 0.25 * z[:, 1]], 1)
    model = build_maf(DataInfo(2, "continuous"), blocks=1, hidden=32)
    settings = Training(steps=400, batch_size=256, lr=1e-2, ema=0.99)
    train(model, x[:4000], x[4000:5000], settings, Streams("maf-test", "maf", 0))
    with torch.no_grad():
        nll = -float(model.log_prob(x[4000:]).mean())
    truth = -float(
        (
            torch.distributions.Normal(0.0, 1.0).log_prob(x[4000:, 0])
            + torch.distributions.Normal(x[4000:, 0].square(), 0.25).log_prob(x[4000:, 1])
        ).mean()
    )
    assert truth == pytest.approx(math.log(2 * math.pi * math.e) - math.log(4), abs=0.05)
    assert 0 <= nll - truth < 0.05


def test_beyond_its_reach_a_network_answers_as_at_it() -> None:
    net = randomised(MaskedNet(DIM, 12, 2, 0.0, reach=2.0))
    far = torch.full((1, DIM), 40.0, dtype=torch.float64)
    for near, further in zip(net(far), net(100 * far), strict=True):
        assert torch.equal(near, further)
    within = 0.01 * torch.randn(20, DIM, generator=seeded(), dtype=torch.float64)
    seen = net(within)
    net.reach = 0.0
    for a, b in zip(seen, net(within), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
