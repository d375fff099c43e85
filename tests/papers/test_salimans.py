"""Jacobians, circulations and constants against closed forms and autograd; each experiment once, tiny."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.autograd.functional import jacobian

from replicate.experiments import Experiment, Run
from replicate.ledger.claims import claims_of
from replicate.papers.salimans import PAPER, fields
from replicate.papers.salimans.fields import MIXTURE, MOONS, Settings, constant
from replicate.runs.seeds import Streams
from replicate.score_based.networks import EnergyScore, FreeScore

ROTATION = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)


def new_run(experiment: Experiment, seed: int = 0) -> Run:
    return Run(experiment.settings("smoke"), Streams(experiment.name, "salimans", seed), torch.device("cpu"))


def points(n: int, dim: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotating(x: Tensor) -> Tensor:
    """(-y, x): the field that is nothing but circulation."""
    return x @ ROTATION.T


def test_jacobians_are_those_of_autograd_s_own_function() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = FreeScore(3, 8, 2).double()
    x = points(5, 3)
    expected = torch.stack([jacobian(lambda y: net(y[None])[0], row) for row in x])
    torch.testing.assert_close(fields.jacobians(net, x), expected)


def test_asymmetry_is_0_for_a_gradient_and_4_for_a_rotation_and_between_for_a_spiral() -> None:
    x = points(200)
    assert fields.asymmetry(lambda y: -(y**3), x).value == 0
    assert fields.asymmetry(rotating, x).value == pytest.approx(4)
    # J = -I + R: |J - J'|^2 = 8, |J|^2 = 4
    spiral = fields.asymmetry(lambda y: rotating(y) - y, x)
    assert spiral.value == pytest.approx(2)
    assert spiral.stderr == pytest.approx(0, abs=1e-12)


def test_the_standard_error_of_the_asymmetry_is_its_spread() -> None:
    def field(y: Tensor) -> Tensor:
        return -(y**3) + rotating(y) * y[:, :1]

    found = [fields.asymmetry(field, points(200, seed=s)) for s in range(30)]
    spread = float(torch.tensor([f.value for f in found]).std())
    assert 0.6 < spread / found[0].stderr < 1.6


def test_a_rotation_circulates_by_twice_the_triangle_s_area() -> None:
    a, b, c = (points(20, seed=s) for s in range(3))
    area = 0.5 * ((b - a)[:, 0] * (c - a)[:, 1] - (b - a)[:, 1] * (c - a)[:, 0])
    torch.testing.assert_close(fields.circulation(rotating, a, b, c), 2 * area)


def test_the_line_integral_of_an_energy_s_score_is_the_difference_of_energies() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = EnergyScore(2, 16, 2).double()
    a, b, c = (2 * points(20, seed=s) for s in range(3))
    torch.testing.assert_close(fields.line_integral(net, a, b), (net.energy(a) - net.energy(b)).detach())
    torch.testing.assert_close(fields.circulation(net, a, b, c), torch.zeros(20).double(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("experiment", [MOONS, MIXTURE], ids=lambda e: e.name)
def test_the_energy_s_field_is_conservative_and_the_free_one_is_not(experiment: Experiment) -> None:
    found = experiment.measure(new_run(experiment))
    e = found.estimates
    assert e["asymmetry:energy"].value < 1e-20
    assert e["circulation:energy"].value < 1e-6
    assert e["asymmetry:free"].value > 1e-4
    assert e["circulation:free"].value > 1e-3
    assert e["fisher_divergence:energy"].value < e["score_size"].value
    assert e["operations:energy"].value > e["operations:free"].value
    used = {c.measure for c in claims_of(PAPER).claims if c.experiment == experiment.name}
    assert used <= set(e)
    assert all(len(line.x) == len(line.y) == fields.LOOKS for plot in found.plots for line in plot.lines)


def test_both_fields_see_the_same_batches_and_noise() -> None:
    """The free network twice is one result twice."""
    run = new_run(MOONS)
    s = Settings(**run.settings)
    net, other = (fields.networks(run, s, 2)["free"] for _ in range(2))
    data = points(300).float()
    truth = fields.noised(fields.two_moons(), 0.3)
    a, b = (fields.train(run, s, n, data, truth, data[:10]) for n in (net, other))
    assert all(torch.equal(u, v) for u, v in zip(net.parameters(), other.parameters(), strict=True))
    assert a.fisher == b.fisher


def test_a_constant_moves_the_log_density_and_nothing_that_is_made_of_the_score() -> None:
    e = constant.measure(new_run(constant, 1)).estimates
    assert e["moved:score"].value == e["moved:langevin"].value == e["moved:loss"].value == 0.0
    assert e["moved:log_density"].value < 1e-9
    assert e["moved:log_z"].value < 1e-9
    assert not math.isnan(e["moved:loss"].value)
    assert {c.measure for c in claims_of(PAPER).claims if c.experiment == constant.name} <= set(e)


def test_a_factor_that_depends_on_x_moves_the_score() -> None:
    """What the constants leave alone can move: exp(-f) times exp(x1 + x2)."""
    with new_run(constant).initialisation():
        net = fields.Scaled(2, 8, 1).double()
    x = points(10)
    before = net(x).detach()
    net.energy = lambda y: EnergyScore.energy(net, y) - y.sum(1)  # type: ignore[method-assign]
    torch.testing.assert_close(net(x).detach(), before + 1)
