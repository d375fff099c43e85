"""Flows: every layer's inverse and log-determinant, then what follows for the density as a whole."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TypeVar

import pytest
import torch
from torch import Tensor

from baselines.flow import (
    REALNVP,
    SPLINE_FLOW,
    Affine,
    Coupling,
    Flow,
    Layer,
    LULinear,
    Shape,
    Spline,
    Whitening,
    dropout,
    splits,
)
from replicate.model import DataInfo, ModelEntry

ENTRIES = pytest.mark.parametrize("entry", [REALNVP, SPLINE_FLOW], ids=["realnvp", "spline-flow"])
M = TypeVar("M", bound=torch.nn.Module)
DIM = 4
SMALL = {"couplings": 4, "hidden": 16, "blocks": 1}


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    """Layers draw their first weights from the global generator, as torch's do."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randomised(module: M, scale: float = 0.3) -> M:
    """The module in float64 with every parameter moved away from its start, which is the identity.

    The moves shrink with the number of inputs, so that the maps stay well conditioned at any width.
    """
    module.double()
    generator = seeded(11)
    for p in module.parameters():
        p.data += scale / p.shape[-1] ** 0.5 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return module


def correlated(n: int, dim: int, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """n draws of a Gaussian in float64, with its mean and covariance."""
    g = seeded(seed)
    root = 0.3 * torch.randn(dim, dim, generator=g, dtype=torch.float64) + torch.eye(dim)
    mean = torch.randn(dim, generator=g, dtype=torch.float64)
    x = mean + torch.randn(n, dim, generator=g, dtype=torch.float64) @ root.T
    return x, mean, root @ root.T


def fitted_whitening(principal: bool) -> Layer:
    layer = Whitening(DIM, principal).double()
    layer.initialise(correlated(500, DIM)[0])
    return layer


def small_flow(entry: ModelEntry, dim: int = 2, scale: float = 0.3) -> Flow:
    model = entry.build(DataInfo(dim, "continuous"), **SMALL)
    model.double()
    model.initialise(correlated(500, dim)[0], seeded())
    return randomised(model, scale).eval()


LAYERS: dict[str, Callable[[], Layer | Flow]] = {
    "whitening": lambda: fitted_whitening(False),
    "whitening-principal": lambda: fitted_whitening(True),
    "lu": lambda: randomised(LULinear(DIM)),
    "affine": lambda: randomised(Coupling(DIM, [0, 2], Affine(), Shape(hidden=8, blocks=1))),
    "affine-one-moved": lambda: randomised(Coupling(DIM, [0, 1, 3], Affine(), Shape(hidden=8, blocks=0))),
    "spline": lambda: randomised(Coupling(DIM, [1, 3], Spline(bins=5, bound=2.0), Shape(hidden=8, blocks=1))),
    "spline-many-bins": lambda: randomised(Coupling(DIM, [0], Spline(bins=40, bound=3.0), Shape(hidden=8, blocks=1))),
    "realnvp": lambda: small_flow(REALNVP, DIM),
    "spline-flow": lambda: small_flow(SPLINE_FLOW, DIM),
}


@pytest.mark.parametrize("name", LAYERS)
class TestEveryLayer:
    def inputs(self, n: int = 200) -> Tensor:
        """Well inside and well outside of the splines' intervals."""
        return 2.0 * torch.randn(n, DIM, generator=seeded(3), dtype=torch.float64)

    def test_inverse_undoes_forward_and_forward_undoes_inverse(self, name: str) -> None:
        layer, x = LAYERS[name](), self.inputs()
        y, _ = layer(x)
        assert not torch.allclose(y, x, atol=1e-2)  # else the check below says nothing
        torch.testing.assert_close(layer.inverse(y), x, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(layer(layer.inverse(x))[0], x, rtol=1e-8, atol=1e-8)

    def test_log_determinant_is_that_of_the_autograd_jacobian(self, name: str) -> None:
        layer, x = LAYERS[name](), self.inputs(20)
        jacobian = torch.func.vmap(torch.func.jacrev(lambda row: layer(row[None])[0][0]))(x)
        sign, logdet = torch.linalg.slogdet(jacobian)
        assert (sign > 0).all()
        torch.testing.assert_close(layer(x)[1], logdet, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    "layer",
    [
        LULinear(DIM),
        Coupling(DIM, [0, 2], Affine(), Shape(hidden=8, blocks=1)),
        Coupling(DIM, [1, 3], Spline(), Shape(hidden=8, blocks=1)),
    ],
    ids=["lu", "affine", "spline"],
)
def test_every_layer_starts_as_the_identity(layer: Layer) -> None:
    x = 2.0 * torch.randn(200, DIM, generator=seeded(3), dtype=torch.float64)
    y, logdet = layer.double()(x)
    torch.testing.assert_close(y, x)
    torch.testing.assert_close(logdet, torch.zeros_like(logdet), atol=1e-12, rtol=0)


def one_spline(scale: float, bins: int = 6, bound: float = 2.0) -> tuple[Spline, Callable[[Tensor], Tensor]]:
    """Splines and random parameters that are the same for every x."""
    parameters = scale * torch.randn(1, 1, 3 * bins - 1, generator=seeded(4), dtype=torch.float64)
    return Spline(bins, bound), lambda x: parameters.expand(len(x), -1, -1)


class TestSpline:
    def test_the_tails_are_the_identity(self) -> None:
        spline, parameters = one_spline(2.0)
        x = torch.tensor([[-1e6], [-2.0001], [2.0001], [1e6]], dtype=torch.float64)
        y, logdet = spline.forward(x, parameters(x))
        assert torch.equal(y, x)
        assert torch.equal(logdet, torch.zeros_like(x))
        assert torch.equal(spline.inverse(x, parameters(x)), x)

    def test_value_and_slope_are_continuous_at_the_ends_of_the_interval(self) -> None:
        spline, parameters = one_spline(2.0)
        for end in (-2.0, 2.0):
            x = torch.tensor([[end - 1e-9], [end + 1e-9]], dtype=torch.float64)
            y, logdet = spline.forward(x, parameters(x))
            torch.testing.assert_close(y, x, atol=1e-7, rtol=0)
            torch.testing.assert_close(logdet, torch.zeros_like(x), atol=1e-5, rtol=0)

    def test_goes_through_its_knots_and_rises_throughout(self) -> None:
        spline, parameters = one_spline(2.0)
        size = spline._sizes(parameters(torch.zeros(1, 1)))
        assert (size > 0).all()
        right = size.cumsum(-1)[0, 0] - 2.0
        torch.testing.assert_close(right[:, -1], torch.full((2,), 2.0, dtype=torch.float64))
        y, _ = spline.forward(right[0, :, None], parameters(right[0]))
        torch.testing.assert_close(y[:, 0], right[1])
        grid = torch.linspace(-2.5, 2.5, 5001, dtype=torch.float64)[:, None]
        assert (spline.forward(grid, parameters(grid))[0].diff(dim=0) > 0).all()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_extreme_parameters_stay_finite_and_invertible(self, dtype: torch.dtype) -> None:
        spline, parameters = one_spline(30.0, bins=10)
        x = torch.linspace(-1.999, 1.999, 2001, dtype=dtype)[:, None].requires_grad_(True)
        p = parameters(x).to(dtype)
        y, logdet = spline.forward(x, p)
        (grad,) = torch.autograd.grad(logdet.sum() + y.sum(), x)
        assert torch.isfinite(y).all()
        assert torch.isfinite(logdet).all()
        assert torch.isfinite(grad).all()
        back = spline.inverse(y, p)
        assert torch.isfinite(back).all()
        again = spline.forward(back, p)[0]  # flat pieces lose digits of x, never of y
        torch.testing.assert_close(again, y, atol=1e-5 if dtype == torch.float32 else 1e-10, rtol=0)


@ENTRIES
class TestDensity:
    def test_integrates_to_one(self, entry: ModelEntry) -> None:
        model = small_flow(entry)
        axis = torch.linspace(-12, 12, 401, dtype=torch.float64)
        with torch.no_grad():
            mass = model.log_prob(torch.cartesian_prod(axis, axis)).exp().sum() * (axis[1] - axis[0]) ** 2
        assert float(mass) == pytest.approx(1.0, abs=1e-3)

    def test_score_is_the_slope_of_log_prob(self, entry: ModelEntry) -> None:
        model, h = small_flow(entry, 3), 1e-6
        x = torch.randn(50, 3, generator=seeded(5), dtype=torch.float64)
        steps = h * torch.eye(3, dtype=torch.float64)
        with torch.no_grad():
            slopes = [(model.log_prob(x + e) - model.log_prob(x - e)) / (2 * h) for e in steps]
        torch.testing.assert_close(model.score(x), torch.stack(slopes, 1), atol=1e-5, rtol=1e-5)

    def test_samples_fall_into_cells_as_often_as_the_density_says(self, entry: ModelEntry) -> None:
        model, n, side = small_flow(entry), 20_000, 12
        axis = torch.linspace(-6, 6, side * 20 + 1, dtype=torch.float64)
        middle = (axis[1:] + axis[:-1]) / 2
        with torch.no_grad():
            density = model.log_prob(torch.cartesian_prod(middle, middle)).exp().view(side, 20, side, 20)
        expected = density.sum((1, 3)) * (axis[1] - axis[0]) ** 2
        cell = ((model.sample(n, seeded(6)) + 6) / 12 * side).floor().long()
        cell = cell[((cell >= 0) & (cell < side)).all(1)]
        observed = torch.bincount(cell[:, 0] * side + cell[:, 1], minlength=side**2).view(side, side) / n
        full = expected > 20 / n
        error = (observed - expected)[full] / (expected * (1 - expected) / n).sqrt()[full]
        assert full.sum() > 10
        assert float(error.abs().max()) < 4.5
        assert float(error.square().mean()) < 1.6

    def test_the_prior_is_summed_over_dimensions_once_and_so_is_each_log_determinant(self, entry: ModelEntry) -> None:
        """Scaling every dimension by c adds D log c in all, not D times D log c."""
        model = entry.build(DataInfo(DIM, "continuous"), **SMALL)
        x = torch.randn(7, DIM, generator=seeded(7))
        standard = torch.distributions.Normal(0.0, 1.0).log_prob(x).sum(-1)
        torch.testing.assert_close(model.log_prob(x), standard)  # every layer is the identity still
        whitening = model.layers[0]
        assert isinstance(whitening, Whitening)
        whitening.weight *= 2.0
        whitening.logdet += DIM * math.log(2.0)
        expected = torch.distributions.Normal(0.0, 0.5).log_prob(x).sum(-1)
        torch.testing.assert_close(model.log_prob(x), expected)

    def test_reaches_the_closed_form_on_a_gaussian(self, entry: ModelEntry) -> None:
        train, mean, cov = correlated(20_000, 3)
        test = correlated(20_000, 3, seed=1)[0]
        model = entry.build(DataInfo(3, "continuous"), **SMALL).double()
        model.initialise(train, seeded())
        truth = torch.distributions.MultivariateNormal(mean, cov).log_prob(test).mean()
        with torch.no_grad():
            assert float(truth - model.log_prob(test).mean()) == pytest.approx(0.0, abs=1e-3)

    def test_draws_come_from_the_given_generator_alone(self, entry: ModelEntry) -> None:
        model = entry.build(DataInfo(2, "continuous"), **SMALL, dropout=0.5)
        randomised(model).float()
        x = torch.randn(64, 2, generator=seeded(8))
        before = torch.get_rng_state()
        first = [model.loss(x, seeded(1)), model.sample(5, seeded(1)), model.log_prob(x)]
        assert torch.equal(torch.get_rng_state(), before)
        torch.manual_seed(123)
        again = [model.loss(x, seeded(1)), model.sample(5, seeded(1)), model.log_prob(x)]
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        assert not torch.equal(model.loss(x, seeded(2)), first[0])
        assert not torch.equal(model.sample(5, seeded(2)), first[1])

    def test_dropout_is_for_training_only(self, entry: ModelEntry) -> None:
        model = entry.build(DataInfo(2, "continuous"), **SMALL, dropout=0.5)
        randomised(model)
        x = torch.randn(64, 2, generator=seeded(8), dtype=torch.float64)
        assert torch.equal(model.validation_loss(x, seeded(1)), -model.log_prob(x).mean())
        assert not torch.equal(model.loss(x, seeded(1)), -model.log_prob(x).mean())


def test_a_linear_flow_trained_by_gradients_finds_the_gaussian() -> None:
    train = correlated(4000, 3)[0]
    model = Flow(3, [LULinear(3)]).double()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model.loss(train, seeded())
        loss.backward()
        return loss

    optimizer.step(closure)
    fitted = torch.distributions.MultivariateNormal(train.mean(0), torch.cov(train.T, correction=0))
    with torch.no_grad():
        torch.testing.assert_close(model.log_prob(train).mean(), fitted.log_prob(train).mean(), atol=1e-5, rtol=0)


def test_whitening_gives_unit_covariance_and_keeps_each_dimension_closest_to_itself() -> None:
    x = correlated(1000, 3)[0]
    layer = Whitening(3).double()
    layer.initialise(x)
    y, _ = layer(x)
    torch.testing.assert_close(torch.cov(y.T), torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(y.mean(0), torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(layer.weight, layer.weight.T)


def test_principal_whitening_has_the_principal_components_in_rising_order() -> None:
    x = torch.randn(20_000, 3, generator=seeded(), dtype=torch.float64) * torch.tensor([1.0, 9.0, 3.0])
    layer = Whitening(3, principal=True).double()
    layer.initialise(x)
    y, _ = layer(x)
    torch.testing.assert_close(torch.cov(y.T), torch.eye(3, dtype=torch.float64))
    correlation = torch.corrcoef(torch.cat([x, y], 1).T)[:3, 3:].abs()
    torch.testing.assert_close(correlation, torch.eye(3, dtype=torch.float64)[[0, 2, 1]], atol=0.02, rtol=0)


def test_shrinkage_keeps_the_whitening_of_few_examples_fit_for_others() -> None:
    few, others = torch.randn(60, 40, generator=seeded(1)).split([30, 30])  # 30 examples in 40 dimensions

    def nll(shrinkage: float) -> float:
        layer = Whitening(40, shrinkage=shrinkage)
        layer.initialise(few)
        y, logdet = layer(others)
        return float((0.5 * y.square().sum(1) - logdet).mean())

    assert nll(0.0) > 1000
    assert nll(0.8) == pytest.approx(20, abs=5)  # that of N(0, I), D / 2


def test_whitening_of_a_constant_dimension_stays_finite() -> None:
    x = torch.randn(50, 3, generator=seeded())
    x[:, 1] = 4.0
    layer = Whitening(3)
    layer.initialise(x)
    y, logdet = layer(x)
    assert torch.isfinite(y).all()
    assert torch.isfinite(logdet).all()
    torch.testing.assert_close(layer.inverse(y), x, atol=1e-3, rtol=0)


def test_dropout_keeps_the_mean_and_drops_the_share() -> None:
    x = torch.ones(100_000)
    y = dropout(x, 0.3, seeded())
    assert float((y == 0).float().mean()) == pytest.approx(0.3, abs=0.006)
    assert float(y.mean()) == pytest.approx(1.0, abs=0.01)
    assert dropout(x, 0.3, None) is x


@pytest.mark.parametrize("dim", [2, 3, 5, 8, 64])
def test_splits_move_every_dimension_in_each_pair_and_let_any_two_meet(dim: int) -> None:
    kept = splits(dim, 2 * (dim - 1).bit_length())
    for a, b in zip(kept[::2], kept[1::2], strict=True):
        assert sorted([*a, *b]) == list(range(dim))
        assert a
        assert b
    for i in range(dim):
        for j in range(i + 1, dim):
            assert any((i in part) != (j in part) for part in kept)


def test_a_coupling_that_moves_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one dimension to move"):
        Coupling(2, [0, 1], Affine(), Shape(hidden=4, blocks=0))
