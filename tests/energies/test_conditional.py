"""Conditional energies: losses against enumeration and finite differences, inference against closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import logsumexp
from scipy.stats import truncnorm
from torch import Tensor, nn

from replicate.energies.conditional import (
    ConditionalEnergy,
    PairEnergy,
    ProductEnergy,
    WellsEnergy,
    descend,
    langevin_answers,
    ranked_right,
    ranking_loss,
    reflected,
)

F64 = torch.float64


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=F64)


class FixedWells(WellsEnergy):
    """The same wells c (K, b) and costs (K,) for every x."""

    def __init__(self, width: float, c: Tensor, costs: Tensor) -> None:
        super().__init__(width)
        self.c, self.cost = c, costs

    def candidates(self, x: Tensor) -> Tensor:
        return self.c.expand(len(x), *self.c.shape)

    def costs(self, x: Tensor) -> Tensor:
        return self.cost.expand(len(x), -1)


def product_energy() -> ProductEnergy:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        of_x = nn.Sequential(nn.Linear(4, 6), nn.SiLU(), nn.Linear(6, 5))
        of_y = nn.Sequential(nn.Linear(3, 6), nn.SiLU(), nn.Linear(6, 6))
        return ProductEnergy(of_x, of_y, 4, 3, 5).double()


WELLS = FixedWells(0.3, torch.tensor([[0.2, 0.9, 0.5], [0.7, 0.1, 0.4]], dtype=F64), torch.tensor([0.5, 0.1]).to(F64))


@pytest.mark.parametrize("network", [product_energy(), WELLS], ids=["product", "wells"])
def test_an_energy_is_the_same_pair_by_pair_and_all_at_once(network: PairEnergy) -> None:
    x, y = normal(5, 4), normal(7, 3, seed=1)
    table = network.pairs(network.observe(x), y)
    each = torch.stack([torch.stack([network(x[i : i + 1], y[j : j + 1])[0] for j in range(7)]) for i in range(5)])
    torch.testing.assert_close(table, each)
    torch.testing.assert_close(network.energy(network.observe(x), y.expand(5, 7, 3)), each)


def test_wells_are_minus_the_log_of_a_sum_of_gaussians() -> None:
    y = normal(6, 3, seed=2)
    squared = ((y[:, None] - WELLS.c) ** 2).sum(2).numpy()
    expected = -logsumexp(-squared / (2 * 0.3**2) - WELLS.cost.numpy(), axis=1)
    np.testing.assert_allclose(WELLS(normal(6, 4), y).numpy(), expected)


def test_the_ranking_loss_is_least_at_the_pointwise_mutual_information() -> None:
    joint = torch.rand(3, 4, generator=generator(3), dtype=F64)
    joint = joint / joint.sum()
    given_x = joint / joint.sum(1, keepdim=True)
    pointwise = (given_x / joint.sum(0)).log()

    def steepest(energy: Tensor) -> float:
        """Largest derivative of the expected loss over all batches of two rows."""
        table = energy.clone().requires_grad_(True)
        cells = [(i, j) for i in range(3) for j in range(4)]
        total = torch.zeros((), dtype=F64)
        for i, j in cells:
            for k, m in cells:
                batch = table[[i, k]][:, [j, m]]
                total = total + joint[i, j] * joint[k, m] * ranking_loss(batch, torch.arange(2))
        (slope,) = torch.autograd.grad(total, table)
        return float(slope.abs().max())

    assert steepest(normal(3, 1, seed=4) - pointwise) < 1e-12  # up to any function of x
    assert steepest(-given_x.log()) > 1e-3


def test_the_loss_is_ranking_plus_weighted_denoising_by_finite_differences() -> None:
    network, sigma, weight = product_energy(), 0.2, 1.7
    batch = normal(6, 7, seed=6)
    with_denoising = ConditionalEnergy(network, 4, sigma, weight).loss(batch, generator(7))
    g = generator(7)
    torch.randn(6, 7, generator=g, dtype=F64)  # the jitter's draw
    z = torch.randn(6, 3, generator=g, dtype=F64)
    x, at, step = batch[:, :4], batch[:, 4:] + sigma * z, 1e-6
    slope = torch.stack([(network(x, at + step * e) - network(x, at - step * e)) / (2 * step) for e in torch.eye(3)], 1)
    denoising = 0.5 * (z - sigma * slope).square().sum(1).mean()
    table = network.pairs(network.observe(x), batch[:, 4:])
    ranking = (table.diagonal() + (-table).logsumexp(1)).mean()
    torch.testing.assert_close(with_denoising, ranking + weight * denoising, rtol=1e-6, atol=1e-8)


def test_distractors_are_ranked_with_the_other_rows() -> None:
    network, batch, wrong = product_energy(), normal(4, 7, seed=8), normal(4, 2, 3, seed=9)
    model = ConditionalEnergy(network, 4, 0.1, 0.0, distractors=lambda x, g: wrong)
    x, y = batch[:, :4], batch[:, 4:]
    rows = []
    for i in range(4):
        against = torch.cat([y, wrong[i]])
        energies = network(x[i].expand(6, 4), against)
        rows.append(energies[i] + (-energies).logsumexp(0))
    torch.testing.assert_close(model.loss(batch, generator()), torch.stack(rows).mean())


def test_descent_ends_at_the_nearest_point_of_the_box_to_a_single_well() -> None:
    well = FixedWells(0.3, torch.tensor([[0.4, 1.3, -0.2]], dtype=F64), torch.zeros(1, dtype=F64))
    starts = torch.rand(2, 3, 3, generator=generator(), dtype=F64)
    found = descend(well, normal(2, 4), starts, 200, 0.05)
    torch.testing.assert_close(found.y, torch.tensor([[0.4, 1.0, 0.0]], dtype=F64).expand(2, 3))
    assert float(found.spread.max()) < 1e-9


def test_of_several_starts_the_one_in_the_deeper_well_wins() -> None:
    deep = FixedWells(0.1, torch.tensor([[0.1, 0.1], [0.9, 0.9]], dtype=F64), torch.tensor([2.0, 0.0]).to(F64))
    starts = torch.tensor([[[0.2, 0.1], [0.8, 0.8]], [[0.8, 0.9], [0.1, 0.2]]], dtype=F64)
    found = descend(deep, normal(2, 4), starts, 100, 0.005)
    torch.testing.assert_close(found.y, torch.full((2, 2), 0.9, dtype=F64))
    assert found.start.tolist() == [1, 0]
    np.testing.assert_allclose(found.energy.numpy(), 0.0, atol=1e-9)
    np.testing.assert_allclose(found.spread.numpy(), 1.0, atol=1e-9)  # energies 0 and 2


@pytest.mark.parametrize("temperature", [1.0, 0.25])
def test_langevin_answers_have_the_law_of_a_gaussian_cut_to_the_box(temperature: float) -> None:
    width, centre = 0.3, 0.15
    well = FixedWells(width, torch.tensor([[centre]], dtype=F64), torch.zeros(1, dtype=F64))
    start = torch.rand(1, 10_000, 1, generator=generator(1), dtype=F64)
    y = langevin_answers(well, normal(1, 4), start, 300, 0.04 * width**2 * temperature, temperature, generator(2))
    sd = width * temperature**0.5
    law = truncnorm((0 - centre) / sd, (1 - centre) / sd, centre, sd)
    assert float(y.min()) >= 0
    assert float(y.mean()) == pytest.approx(law.mean(), abs=0.01)
    assert float(y.std()) == pytest.approx(law.std(), abs=0.01)


def test_langevin_refuses_temperature_zero() -> None:
    with pytest.raises(ValueError, match="temperature > 0"):
        langevin_answers(WELLS, normal(1, 4), torch.rand(1, 1, 3), 3, 0.1, 0.0, generator())


@given(st.floats(-5, 5))
def test_reflection_folds_the_line_onto_the_box(value: float) -> None:
    y = torch.tensor([value, -value, value + 2, 2 - value], dtype=F64)
    folded = reflected(y)
    assert bool(((folded >= 0) & (folded <= 1)).all())
    torch.testing.assert_close(folded, folded[:1].expand(4), rtol=0, atol=1e-12)
    if 0 <= value <= 1:
        assert float(folded[0]) == pytest.approx(value, abs=1e-12)


def test_ranks_are_counted_as_by_hand_and_a_tie_is_no_success() -> None:
    energies = torch.tensor([[0.0, 1.0, 0.0], [5.0, 2.0, 3.0], [1.0, 1.0, 4.0]])
    found = ranked_right(energies, generator())
    assert found["all"].value == pytest.approx((1 / 2 + 1 + 0) / 3)
    assert found["first"].value == pytest.approx(1 / 3)
    assert found["random"].value in (1 / 3, 2 / 3)


def test_one_random_wrong_answer_estimates_the_share_over_all() -> None:
    energies = torch.rand(2000, 2000, generator=generator(4))
    found = ranked_right(energies, generator(5))
    assert found["random"].value == pytest.approx(found["all"].value, abs=4 * found["random"].stderr)
