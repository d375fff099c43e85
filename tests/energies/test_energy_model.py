"""A network and an objective as a model of the suite: log Z, the sampler, training, and refusals."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from replicate.energies.model import ENERGY, EnergyNet, TrainedEnergy, build, build_objective
from replicate.energies.objectives import METHODS, ImplicitScoreMatching
from replicate.errors import UsageError
from replicate.likelihood.ais import bracket, schedule
from replicate.likelihood.estimator import Effort, log_likelihood
from replicate.model import DataInfo, Training
from replicate.runs.seeds import Streams
from replicate.runs.training import train

PLANE = DataInfo(2, "continuous")
TINY = {"hidden": 8, "layers": 2, "chains": 20, "flow_couplings": 2, "flow_steps": 3}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def data(n: int = 400, dim: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    mix = torch.eye(dim) + 0.4 * torch.ones(dim, dim).tril(-1)
    return (torch.randn(n, dim, generator=generator(7)) @ mix + 0.5).to(dtype)


class Bowl(nn.Module):
    """g(x) = a |x|^2 / 2, with which the tilted Gaussian is a Gaussian again."""

    def __init__(self, a: float) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(a))

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * self.a * x.square().sum(1)


def bowl(a: float = 1.5) -> tuple[TrainedEnergy, float, Tensor, Tensor]:
    """(model, its log Z, its mean, its covariance) in closed form."""
    model = TrainedEnergy(Bowl(a), ImplicitScoreMatching(), PLANE, step_size=0.5, annealing=20, after=20)
    x = data()
    model.initialise(x, generator())
    mean, cov = x.mean(0).double(), torch.cov(x.T).double()
    before, after = torch.linalg.inv(cov), torch.linalg.inv(cov) + a * torch.eye(2)
    centre = torch.linalg.solve(after, before @ mean)
    log_z = 0.5 * (torch.logdet(before) - torch.logdet(after))
    log_z += 0.5 * (centre @ after @ centre - mean @ before @ mean)
    return model, float(log_z), centre, torch.linalg.inv(after)


def test_an_untrained_energy_is_the_gaussian_fit() -> None:
    model = build(PLANE, **ENERGY.params)
    x = data()
    model.initialise(x, generator())
    fit = torch.distributions.MultivariateNormal(x.mean(0), torch.cov(x.T))
    torch.testing.assert_close(-model.energy(x).detach(), fit.log_prob(x), rtol=1e-4, atol=1e-4)
    assert model.base_log_z() == 0.0


def test_log_z_by_annealing_and_by_quadrature_is_the_closed_form() -> None:
    model, log_z, _, _ = bowl()
    found = bracket(model, 400, schedule(30), generator(1))
    for run in found:
        assert abs(run.log_z.value - log_z) < 5 * run.log_z.stderr + 0.02
    x = data(50)
    effort = Effort(ais_chains=20, ais_steps=5)
    log_p = log_likelihood(model, x, effort, generator(2), half_width=8.0)
    torch.testing.assert_close(log_p.values, -model.energy(x).detach() - log_z, rtol=0, atol=1e-3)


@pytest.mark.parametrize("jumps", [True, False])
def test_samples_have_the_moments_of_the_energy(jumps: bool) -> None:
    model, _, mean, cov = bowl()
    model.jumps = jumps
    x = model.sample(6000, generator(3)).double()
    torch.testing.assert_close(x.mean(0), mean, rtol=0, atol=0.04)
    torch.testing.assert_close(torch.cov(x.T), cov, rtol=0, atol=0.04)


@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_the_kernel_leaves_its_temperature_invariant_and_moves(beta: float) -> None:
    model, _, _, _ = bowl(1.0)
    x = data()
    before = torch.linalg.inv(torch.cov(x.T).double())
    precision = before + beta * torch.eye(2)
    centre = torch.linalg.solve(precision, before @ x.mean(0).double())
    cov = torch.linalg.inv(precision)
    z = torch.randn(8000, 2, generator=generator(4), dtype=torch.float64)
    start = (centre + z @ torch.linalg.cholesky(cov).T).float()
    increment, moved = model.anneal(start, beta - 0.1, beta, generator(5))
    torch.testing.assert_close(increment, -0.1 * model.network(start).detach().double(), rtol=1e-5, atol=1e-6)
    assert float((moved != start).all(1).double().mean()) > 0.5
    torch.testing.assert_close(moved.double().mean(0), centre, rtol=0, atol=0.05)
    torch.testing.assert_close(torch.cov(moved.T.double()), cov, rtol=0, atol=0.05)


def test_fourier_features_are_sines_of_projections() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = EnergyNet(2, 6, 2, 1.5)
    nn.init.ones_(net.head.weight)
    x = data(5)
    phase = x @ net.wave_numbers
    (layer,) = net.hidden
    h = torch.cat([phase.sin(), phase.cos()], 1) @ layer.weight.T + layer.bias
    torch.testing.assert_close(net(x), (h * h.sigmoid()).sum(1))


@pytest.mark.parametrize("name", list(METHODS))
def test_every_objective_trains_repeats_and_restores_its_state(name: str) -> None:
    def trained() -> TrainedEnergy:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            model = build(PLANE, **{**ENERGY.params, **TINY, "objective": name})
        train(model, data(), data(50), Training(4, 32, 1e-2, ema=0.9), Streams("t", "energy", 0))
        return model

    model, again = trained(), trained()
    state = model.state_dict()
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in state.items())
    assert float(model.network.head.weight.detach().abs().max()) > 0
    fresh = build(PLANE, **{**ENERGY.params, **TINY, "objective": name})
    fresh.load_state_dict(state)
    assert torch.equal(fresh.energy(data()), model.energy(data()))
    loss = [float(m.loss(data(64), generator(2)).detach()) for m in (model, fresh.train())]
    assert loss[0] == loss[1]
    assert math.isfinite(loss[0])


@pytest.mark.parametrize("name", [m for m in METHODS if m != "ml"])
def test_objectives_but_ml_work_in_three_dimensions(name: str) -> None:
    model = build(DataInfo(5, "continuous"), **{**ENERGY.params, **TINY, "objective": name}).double()
    x = data(60, 5, torch.float64)
    model.initialise(x, generator())
    loss = model.loss(x, generator(1))
    assert loss.dtype == torch.float64
    loss.backward()
    assert torch.isfinite(loss)


def test_an_unknown_objective_is_reported_with_the_nearest_name() -> None:
    with pytest.raises(UsageError, match=r"unknown objective 'nc'\. Did you mean .*nce.*one of ml, cd, pcd"):
        build_objective("nc", 2)
    with pytest.raises(UsageError, match=r"needs log Z.*have 3\. Set objective to one of cd"):
        build_objective("ml", 3)
    with pytest.raises(ValueError, match="continuous data, not bits"):
        TrainedEnergy(Bowl(1.0), ImplicitScoreMatching(), DataInfo(4, "bits"))
