"""Image flows: every layer's inverse and log-determinant, then what follows for the density as a whole."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

from baselines.flow import Affine, Layer, Shape, Spline
from baselines.image_flow import (
    BY_ROWS,
    GLOW,
    IMAGE_REALNVP,
    IMAGE_SPLINE_FLOW,
    SWAPPED,
    ActNorm,
    Conv1x1,
    ImageCoupling,
    ImageFlow,
    ImageFlowSettings,
    Reorder,
    Squeeze,
    build,
)
from replicate.model import DataInfo, ModelEntry

ENTRIES = pytest.mark.parametrize(
    "entry", [IMAGE_REALNVP, GLOW, IMAGE_SPLINE_FLOW], ids=["image-realnvp", "glow", "image-spline-flow"]
)
M = TypeVar("M", bound=torch.nn.Module)
DIM = 16
SMALL = Shape(hidden=6, blocks=1)
TINY = {"depth": 2, "hidden": 6, "blocks": 1, "dropout": 0.0}


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    """Layers draw their first weights from the global generator, as torch's do."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def info_of(height: int, width: int) -> DataInfo:
    return DataInfo(height * width, "continuous", None, (height, width))


def randomised(module: M, scale: float = 0.3) -> M:
    """The module in float64 with every parameter moved away from its start, little enough to stay well conditioned."""
    module.double()
    generator = seeded(11)
    for p in module.parameters():
        move = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        p.data += scale / max(1, p[0].numel()) ** 0.5 * move
    return module


def small_flow(entry: ModelEntry, height: int, width: int, scale: float = 0.3) -> ImageFlow:
    model = entry.build(info_of(height, width), **TINY)
    assert isinstance(model, ImageFlow)
    model.double()
    model.initialise(torch.randn(50, height * width, generator=seeded(1), dtype=torch.float64), seeded())
    return randomised(model, scale).eval()


class Images(Layer):
    """A layer of images as one of vectors."""

    def __init__(self, layer: Layer, *shape: int) -> None:
        super().__init__()
        self.layer, self.shape = layer, shape

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        y, logdet = self.layer(x.view(-1, *self.shape), generator)
        self.after = y.shape
        return y.flatten(1), logdet

    def inverse(self, y: Tensor) -> Tensor:
        return self.layer.inverse(y.view(-1, *self.after[1:])).flatten(1)


def fitted_actnorm() -> ActNorm:
    layer = ActNorm(4).double()
    layer.initialise(3 + 2 * torch.randn(100, 4, 2, 2, generator=seeded(2), dtype=torch.float64))
    return layer


#: 16 numbers as four channels of 2 x 2
LAYERS: dict[str, Callable[[], Any]] = {
    "squeeze": lambda: Images(Squeeze(), 1, 4, 4),
    "actnorm": lambda: Images(fitted_actnorm(), 4, 2, 2),
    "actnorm-of-vectors": lambda: randomised(ActNorm(DIM, sides=0)),
    "reorder": lambda: Images(Reorder((2, 0, 3, 1)), 4, 2, 2),
    "conv1x1": lambda: Images(randomised(Conv1x1(4)), 4, 2, 2),
    "affine": lambda: Images(randomised(ImageCoupling(4, Affine(2.0), SMALL)), 4, 2, 2),
    "affine-with-positions": lambda: Images(randomised(ImageCoupling(4, Affine(2.0), SMALL, (2, 2))), 4, 2, 2),
    "spline": lambda: Images(randomised(ImageCoupling(4, Spline(5, 3.0), SMALL)), 4, 2, 2),
    "image-realnvp": lambda: small_flow(IMAGE_REALNVP, 4, 4),
    "glow": lambda: small_flow(GLOW, 4, 4),
    "image-spline-flow": lambda: small_flow(IMAGE_SPLINE_FLOW, 4, 4),
    "one-scale": lambda: small_flow(GLOW, 2, 8),
    "three-scales": lambda: randomised(
        build(info_of(8, 2), ImageFlowSettings("affine", "mask", scales=3, depth=3, hidden=4))
    ),
}


@pytest.mark.parametrize("name", LAYERS)
class TestEveryLayer:
    def inputs(self, n: int = 50) -> Tensor:
        """Well inside and well outside of the splines' intervals."""
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


def test_couplings_start_as_the_identity_and_a_1x1_convolution_as_a_rotation() -> None:
    x = 2.0 * torch.randn(20, 4, 2, 2, generator=seeded(3), dtype=torch.float64)
    for layer in (ImageCoupling(4, Affine(2.0), SMALL), ImageCoupling(4, Spline(5, 3.0), SMALL)):
        y, logdet = layer.double()(x)
        torch.testing.assert_close(y, x)
        torch.testing.assert_close(logdet, torch.zeros_like(logdet), atol=1e-12, rtol=0)
    y, logdet = Conv1x1(4).double()(x)
    torch.testing.assert_close(y.square().sum(1), x.square().sum(1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(logdet, torch.zeros_like(logdet), atol=1e-6, rtol=0)


def test_every_actnorm_starts_with_mean_0_and_deviation_1_on_the_first_images() -> None:
    model = build(info_of(8, 8), ImageFlowSettings("affine", "conv1x1", depth=2, hidden=4)).double()
    x = 5 + 3 * torch.randn(200, 64, generator=seeded(4), dtype=torch.float64).cumsum(1)
    model.initialise(x, seeded())
    seen: list[Tensor] = []
    for layer in model.modules():
        if isinstance(layer, ActNorm):
            layer.register_forward_hook(lambda module, args, out: seen.append(out[0]))
    model.log_prob(x)
    assert len(seen) == 4
    for y in seen:
        torch.testing.assert_close(y.mean((0, 2, 3)), y.new_zeros(y.shape[1]))
        torch.testing.assert_close(y.transpose(0, 1).flatten(1).std(1), y.new_ones(y.shape[1]))


def test_actnorm_of_a_constant_channel_stays_finite_and_invertible() -> None:
    x = torch.randn(50, 4, 2, 2, generator=seeded())
    x[:, 1] = 4.0
    layer = ActNorm(4)
    layer.initialise(x)
    y, logdet = layer(x)
    assert torch.isfinite(y).all()
    assert torch.isfinite(logdet).all()
    torch.testing.assert_close(layer.inverse(y), x)


def test_28_pixels_become_14_and_7_and_none_is_added() -> None:
    model = build(info_of(28, 28), ImageFlowSettings("affine", "conv1x1", depth=1, hidden=2))
    shapes: list[tuple[int, ...]] = []
    for layer in model.modules():
        if isinstance(layer, ActNorm):
            layer.register_forward_hook(lambda module, args, out: shapes.append(tuple(out[0].shape)))
    z, _ = model(torch.zeros(1, 784))
    assert z.shape == (1, 784)
    assert shapes == [(1, 4, 14, 14), (1, 8, 7, 7)]


def test_masks_move_each_colour_of_the_checkerboard_and_then_each_row_of_its_squares() -> None:
    model = build(info_of(4, 4), ImageFlowSettings("affine", "mask", scales=1, depth=4, hidden=4))
    pixels = torch.arange(16.0).view(1, 1, 4, 4)
    moved: list[list[int]] = []
    for layer in model.scales[0]:
        if isinstance(layer, ImageCoupling):
            moved.append(sorted(pixels.chunk(2, 1)[1].flatten().int().tolist()))
        elif not isinstance(layer, ActNorm):
            pixels, _ = layer(pixels)
    row, column = torch.arange(16) // 4, torch.arange(16) % 4
    odd = [(row + column) % 2 == 1, (row + column) % 2 == 0, row % 2 == 1, row % 2 == 0]
    assert moved == [part.nonzero().flatten().tolist() for part in odd]


def test_orders_of_blocks_are_permutations_and_undo_themselves() -> None:
    for order in (SWAPPED, BY_ROWS):
        assert sorted(order) == [0, 1, 2, 3]
        assert [order[i] for i in order] == [0, 1, 2, 3]


@ENTRIES
class TestDensity:
    def test_has_mass_one(self, entry: ModelEntry) -> None:
        """Importance sampling from a wide normal distribution over 2 x 2 pixels: the mean weight is 1."""
        model, width = small_flow(entry, 2, 2, scale=0.2), 2.0
        x = width * torch.randn(40_000, 4, generator=seeded(5), dtype=torch.float64)
        with torch.no_grad():
            weight = (model.log_prob(x) - torch.distributions.Normal(0, width).log_prob(x).sum(1)).exp()
        stderr = float(weight.std()) / math.sqrt(len(x))
        assert stderr < 0.03
        assert float(weight.mean()) == pytest.approx(1.0, abs=4 * stderr)

    def test_log_p_of_a_sample_is_the_normal_density_through_the_autograd_jacobian_of_the_sampler(
        self, entry: ModelEntry
    ) -> None:
        model = small_flow(entry, 4, 4)
        z = torch.randn(5, DIM, generator=seeded(6), dtype=torch.float64)
        jacobian = [torch.autograd.functional.jacobian(lambda r: model.inverse(r[None])[0], row) for row in z]
        normal = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(1)
        expected = normal - torch.linalg.slogdet(torch.stack(jacobian)).logabsdet
        torch.testing.assert_close(model.log_prob(model.sample(5, seeded(6))), expected)

    def test_samples_are_latents_sent_back(self, entry: ModelEntry) -> None:
        model = small_flow(entry, 8, 4)
        x = model.sample(20, seeded(7))
        z = torch.randn(20, 32, generator=seeded(7), dtype=torch.float64)
        torch.testing.assert_close(model(x)[0], z, rtol=1e-8, atol=1e-8)
        assert not x.requires_grad

    def test_an_image_does_not_depend_on_its_batch_mates(self, entry: ModelEntry) -> None:
        model = small_flow(entry, 4, 4)
        x = torch.randn(9, DIM, generator=seeded(8), dtype=torch.float64)
        alone = torch.cat([model.log_prob(row[None]) for row in x])
        torch.testing.assert_close(model.log_prob(x), alone, rtol=1e-10, atol=1e-10)
        model.train()
        torch.testing.assert_close(model.loss(x, seeded()), -alone.mean(), rtol=1e-10, atol=1e-10)

    def test_score_is_the_slope_of_log_prob(self, entry: ModelEntry) -> None:
        model, h = small_flow(entry, 2, 4), 1e-6
        x = torch.randn(6, 8, generator=seeded(9), dtype=torch.float64)
        steps = h * torch.eye(8, dtype=torch.float64)
        with torch.no_grad():
            slopes = [(model.log_prob(x + e) - model.log_prob(x - e)) / (2 * h) for e in steps]
        torch.testing.assert_close(model.score(x), torch.stack(slopes, 1), atol=1e-5, rtol=1e-5)

    def test_float32_follows_float64_on_whole_images(self, entry: ModelEntry) -> None:
        model = small_flow(entry, 28, 28, scale=0.1)
        x = 3 * torch.randn(4, 784, generator=seeded(10), dtype=torch.float64)
        with torch.no_grad():
            exact = model.log_prob(x)
            short = model.float().log_prob(x.float())
            back = model.inverse(model(x.float())[0])
        torch.testing.assert_close(short.double(), exact, rtol=1e-5, atol=0.01)
        torch.testing.assert_close(back, x.float(), rtol=1e-3, atol=1e-3)

    def test_draws_come_from_the_given_generator_alone(self, entry: ModelEntry) -> None:
        model = randomised(entry.build(info_of(4, 4), **{**TINY, "dropout": 0.5})).float()
        x = torch.randn(30, DIM, generator=seeded(8))
        before = torch.get_rng_state()
        first = [model.loss(x, seeded(1)), model.sample(5, seeded(1)), model.log_prob(x)]
        assert torch.equal(torch.get_rng_state(), before)
        again = [model.loss(x, seeded(1)), model.sample(5, seeded(1)), model.log_prob(x)]
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        assert not torch.equal(model.loss(x, seeded(2)), first[0])
        assert not torch.equal(model.sample(5, seeded(2)), first[1])
        assert torch.equal(model.validation_loss(x, seeded(1)), -model.log_prob(x).mean())  # without dropout

    def test_needs_images_of_even_sides(self, entry: ModelEntry) -> None:
        with pytest.raises(ValueError, match="no images; use realnvp or spline-flow"):
            entry.build(DataInfo(4, "continuous"), **entry.params)
        with pytest.raises(ValueError, match="these have 3 x 4"):
            entry.build(info_of(3, 4), **entry.params)


def test_positions_tell_places_apart() -> None:
    """Without them a coupling of 1x1 filters treats every place alike; with them it does not."""
    x = torch.ones(1, 4, 4, 4, dtype=torch.float64)
    for places, alike in ((None, True), ((4, 4), False)):
        layer = randomised(ImageCoupling(4, Affine(2.0), Shape(hidden=6, blocks=0), places))
        inside = layer(x)[0][:, :, 1:3, 1:3]  # the border sees the padding
        assert torch.allclose(inside, inside[:, :, :1, :1].expand_as(inside)) is alike


def test_unknown_options_are_refused() -> None:
    with pytest.raises(ValueError, match="coupling is 'cubic'"):
        build(info_of(4, 4), ImageFlowSettings("cubic", "mask"))
    with pytest.raises(ValueError, match="permutation is 'reverse'"):
        build(info_of(4, 4), ImageFlowSettings("affine", "reverse"))


def test_as_many_scales_as_the_sides_can_be_halved() -> None:
    sides = [2, 4, 6, 8, 28]
    for height, width in itertools.product(sides, sides):
        halvings = sum(height % 2**k == 0 == width % 2**k for k in (1, 2))
        assert (
            len(build(info_of(height, width), ImageFlowSettings("affine", "mask", depth=1, hidden=2)).scales)
            == halvings
        )
