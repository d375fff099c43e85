"""Restricted Boltzmann machines and the neural energy against enumeration, quadrature and closed forms."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor

from baselines.ebm import (
    NEURAL_EBM,
    RBM,
    RBM_CD,
    RBM_PCD,
    GaussianMixture,
    NeuralEBM,
    NeuralSettings,
    _draw_levels,
    _softplus_change,
)
from replicate.likelihood.ais import ais, bracket, schedule
from replicate.likelihood.enumeration import enumerate_log_z, log_sum_over_states, rbm_log_z, states
from replicate.model import DataInfo

BITS = DataInfo(6, "bits", 2)
LEVELS = DataInfo(4, "levels", 3)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rbm(info: DataInfo, hidden: int = 5, strength: float = 1.0, seed: int = 0, **params: int) -> RBM:
    """A float64 RBM with weights as large as trained ones and data-dependent offsets."""
    g = seeded(seed)
    assert info.levels
    model = RBM(info, hidden=hidden, features=2, **params).double()
    train = torch.randint(info.levels, (40, info.dim), generator=g).double()
    model.initialise(train, g)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(strength * torch.randn(p.shape, generator=g, dtype=torch.float64))
    return model


def all_states(info: DataInfo) -> Tensor:
    assert info.levels
    return states(info.dim, info.levels, 0, info.levels**info.dim)


def log_z(model: RBM, info: DataInfo) -> Tensor:
    assert info.levels
    return log_sum_over_states(lambda x: -model.energy(x), info.dim, info.levels)


@pytest.mark.parametrize("info", [BITS, LEVELS], ids=["bits", "levels"])
class TestRBM:
    def test_free_energy_sums_out_the_hidden_units(self, info: DataInfo) -> None:
        model = rbm(info)
        w, b, c = model.table()
        h = states(5, 2, 0, 32)
        x, unit = all_states(info), torch.arange(info.dim)
        joint = b[unit, x.long()].sum(1, keepdim=True) + w[unit, x.long()].sum(1) @ h.T + h @ c
        assert torch.allclose(model.free_energy(x), -torch.logsumexp(joint, 1), atol=1e-10)

    def test_table_is_the_model(self, info: DataInfo) -> None:
        model = rbm(info)
        assert torch.allclose(rbm_log_z(*model.table()), log_z(model, info), atol=1e-10)

    def test_loss_gradient_is_the_difference_of_correlations(self, info: DataInfo) -> None:
        model = rbm(info, strength=0.5)
        batch = all_states(info)[::3]
        model.loss(batch, seeded(1)).backward()
        negatives = model.gibbs_sweeps(batch, model.gibbs, seeded(1))

        def correlations(v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            """<(phi(v) - mean)(h - 1/2)>, <[v = level]> and <h> written out, with h replaced by its mean."""
            centred = model.phi[v.long()].flatten(1) - model.offset
            h = torch.sigmoid(model.hidden_bias + centred @ model.weights)
            onehot = torch.nn.functional.one_hot(v.long(), len(model.phi)).double()
            return centred.T @ (h - 0.5) / len(v), onehot.mean(0), h.mean(0)

        def gradient(data: Tensor, model_side: Tensor) -> Tensor:
            return model_side - data  # of the loss: data correlations grow

        parameters = (model.weights, model.bias_change, model.hidden_bias)
        for p, positive, negative in zip(parameters, correlations(batch), correlations(negatives), strict=True):
            assert p.grad is not None
            assert torch.allclose(p.grad, gradient(positive, negative), atol=1e-10)

    def test_many_sweeps_give_the_likelihood_gradient(self, info: DataInfo) -> None:
        model = rbm(info, strength=0.5)
        batch = all_states(info)[-3:]
        (model.energy(batch).mean() + log_z(model, info)).backward()
        exact = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        copies = batch.repeat(8000, 1)
        model.gibbs = 20
        model.loss(copies, seeded(2)).backward()
        for p, e in zip(model.parameters(), exact, strict=True):
            assert p.grad is not None
            assert float((p.grad - e).abs().max()) < 0.02
            assert float(e.abs().max()) > 0.1  # so that the bound above says something

    def test_persistent_chains_move_on_and_are_the_negatives(self, info: DataInfo) -> None:
        model = rbm(info, chains=30)
        before = model.replay.clone()
        batch = all_states(info)[:7]
        loss = model.loss(batch, seeded(3))
        assert torch.equal(model.replay, model.gibbs_sweeps(before, 1, seeded(3)))
        assert torch.allclose(loss, model.energy(batch).mean() - model.energy(model.replay).mean())

    def test_base_is_the_smoothed_base_rate_model(self, info: DataInfo) -> None:
        model = rbm(info)
        train = all_states(info)[:10]
        model.initialise(train, seeded(4))
        rate = (train == 0).double().sum(0).add(0.5).div(10 + 0.5 * len(model.phi))
        assert torch.allclose(model.base_bias.softmax(1)[:, 0], rate)
        with torch.no_grad():
            model.bias_change.zero_()
            model.weights.zero_()
            model.hidden_bias.zero_()
        assert model.base_log_z() == pytest.approx(float(log_z(model, info).detach()))

    @pytest.mark.parametrize(("beta", "beta_next"), [(0.2, 0.7), (1.0, 0.5), (1.0, 1.0)])
    def test_anneal_weighs_by_the_path_and_keeps_it(self, info: DataInfo, beta: float, beta_next: float) -> None:
        model = rbm(info)
        b, c = model.biases()
        x, unit = all_states(info), torch.arange(info.dim)

        def log_f(beta: float) -> Tensor:
            pre = c + model.phi[x.long()].flatten(1) @ model.weights
            bias = (1 - beta) * model.base_bias + beta * b
            return bias[unit, x.long()].sum(1) + torch.nn.functional.softplus(beta * pre).sum(1)

        increment, _ = model.anneal(x, beta, beta_next, seeded(5))
        assert torch.allclose(increment, log_f(beta_next) - log_f(beta), atol=1e-10)
        target = log_f(beta_next).softmax(0)
        draws = torch.multinomial(target.detach(), 40000, replacement=True, generator=seeded(6))
        _, moved = model.anneal(x[draws], beta_next, beta_next, seeded(7))
        place = len(model.phi) ** torch.arange(info.dim - 1, -1, -1)
        counts = torch.bincount((moved.long() * place).sum(1), minlength=len(x)).double()
        chi2 = float(((counts - 40000 * target) ** 2 / (40000 * target)).sum())
        assert abs(chi2 - len(x)) < 5 * math.sqrt(2 * len(x))

    def test_ais_brackets_the_enumerated_log_z(self, info: DataInfo) -> None:
        model = rbm(info, hidden=8, strength=1.5)
        exact = float(log_z(model, info))
        both = bracket(model, 500, schedule(200), seeded(8))
        for result in both:
            assert 0 < result.log_z.stderr < 0.1
            assert abs(result.log_z.value - exact) < 4 * result.log_z.stderr

    def test_short_runs_lie_on_their_side(self, info: DataInfo) -> None:
        model = rbm(info, hidden=8, strength=1.5)
        probabilities = (-model.energy(all_states(info))).softmax(0).detach()
        exact, generator = float(log_z(model, info)), seeded(9)
        low, high = [], []
        for _ in range(150):
            start = all_states(info)[torch.multinomial(probabilities, 5, replacement=True, generator=generator)]
            both = bracket(model, 5, schedule(5), generator, start)
            low.append(both.forward.log_z.value - exact)
            high.append(both.reverse.log_z.value - exact)
        a, b = torch.tensor(low), torch.tensor(high)
        assert a.mean() < -3 * a.std() / 150**0.5
        assert b.mean() > 3 * b.std() / 150**0.5

    def test_samples_follow_the_model(self, info: DataInfo) -> None:
        model = rbm(info, strength=0.7)
        probabilities = (-model.energy(all_states(info))).softmax(0)
        x = model.sample(4000, seeded(10))
        for level in range(len(model.phi)):
            truth = probabilities @ (all_states(info) == level).double()
            assert (((x == level).double().mean(0) - truth).abs() < 4 * (truth * (1 - truth) / 4000).sqrt()).all()

    def test_validation_loss_is_nearly_the_nll(self, info: DataInfo) -> None:
        model = rbm(info)
        x = all_states(info)[:20]
        nll = float(model.energy(x).mean() + log_z(model, info))
        assert float(model.validation_loss(x, seeded(11))) == pytest.approx(nll, abs=0.2)


def test_persistent_training_reaches_a_known_likelihood() -> None:
    """Two prototypes of six bits, each bit flipped with probability 0.1: an RBM with one hidden unit is the truth."""
    prototypes, x = torch.tensor([[0.0, 1, 1, 0, 1, 0], [1.0, 0, 0, 1, 0, 1]]), all_states(BITS)
    flips = (x.float()[:, None] - prototypes).abs().sum(2)
    truth = (0.5 * 0.1**flips * 0.9 ** (6 - flips)).sum(1)
    generator = seeded(0)
    data = x[torch.multinomial(truth, 2000, replacement=True, generator=generator)].float()
    torch.manual_seed(0)
    model = RBM(BITS, hidden=8, chains=200)
    model.initialise(data, generator)
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for step in range(400):
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / 400)
        optimizer.zero_grad()
        model.loss(data[torch.randint(2000, (200,), generator=generator)], generator).backward()
        optimizer.step()
    model = model.double()
    with torch.no_grad():
        cross_entropy = truth.double() @ model.energy(x) + enumerate_log_z(model.energy, 6).value
    entropy = -truth @ truth.log()
    assert 0 < cross_entropy - entropy < 0.03
    assert model.base_bias.softmax(1)[:, 0].sub(0.5).abs().max() < 0.05  # independent bits would pay 1.1 nats more


@pytest.mark.parametrize(("beta", "beta_next"), [(0.3, 0.3001), (0.9, 0.2), (0.0, 1.0)])
def test_softplus_change_in_float32_keeps_its_digits(beta: float, beta_next: float) -> None:
    pre = 60 * torch.randn(300, 50, generator=seeded(0), dtype=torch.float32)
    exact = torch.nn.functional.softplus(torch.stack([beta_next * pre.double(), beta * pre.double()]), threshold=1e9)
    change = (exact[0] - exact[1]).sum(1)
    assert torch.allclose(_softplus_change(pre, beta, beta_next), change, rtol=1e-5, atol=1e-5 * abs(beta_next - beta))


def test_levels_are_drawn_by_their_probabilities() -> None:
    logits = torch.tensor([[[0.0, 1.0, -1.0], [2.0, -50.0, 2.0]]])
    x = _draw_levels(logits.expand(50000, -1, -1), seeded(0))
    for level in range(3):
        p = logits[0].softmax(1)[:, level]
        assert (((x == level).float().mean(0) - p).abs() <= 4.5 * (p * (1 - p) / 50000).sqrt()).all()


PLANE = DataInfo(2, "continuous")


def ring(n: int, seed: int) -> Tensor:
    """A thick ring of unit scale."""
    g = seeded(seed)
    angle = 2 * math.pi * torch.rand(n, generator=g)
    radius = 1.4 + 0.15 * torch.randn(n, generator=g)
    return torch.stack([radius * angle.cos(), radius * angle.sin()], 1)


def trained(**params: float) -> NeuralEBM:
    torch.manual_seed(0)
    model = NeuralEBM(PLANE, NeuralSettings(**{"hidden": 32, "layers": 2, "frequency": 1.5, "chains": 256, **params}))  # type: ignore[arg-type]
    data, generator = ring(2000, 0), seeded(1)
    model.initialise(data, generator)
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(250):
        optimizer.zero_grad()
        model.loss(data[torch.randint(2000, (256,), generator=generator)], generator).backward()
        optimizer.step()
    return model


@pytest.fixture(scope="module")
def neural() -> NeuralEBM:
    return trained()


def quadrature(
    model: NeuralEBM, beta: float = 1.0, half: float = 7.0, points: int = 281
) -> tuple[float, Tensor, Tensor]:
    """(log Z of f_beta, grid (points^2, 2), cell probabilities) by the trapezoidal rule, spectrally accurate here."""
    axis = torch.linspace(-half, half, points, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        log_f = model.base.log_prob(grid.float()).double() - beta * model.tilt(grid.float()).double()
    total = torch.logsumexp(log_f, 0)
    return float(total) + 2 * math.log(2 * half / (points - 1)), grid, (log_f - total).exp()


class TestNeuralEBM:
    def test_it_has_learnt_the_ring(self, neural: NeuralEBM) -> None:
        x = ring(4000, 5)
        log_z, _, _ = quadrature(neural)
        nll = float(neural.energy(x).mean()) + log_z
        base = float(-neural.base.log_prob(x).mean())
        assert nll < base - 0.5

    def test_ais_agrees_with_quadrature(self, neural: NeuralEBM) -> None:
        exact, _, _ = quadrature(neural)
        assert abs(exact) > 0.05  # a log Z that the base alone would get wrong
        both = bracket(neural, 1000, schedule(150), seeded(2))
        for result in both:
            assert 0 < result.log_z.stderr < 0.05
            assert abs(result.log_z.value - exact) < 4 * result.log_z.stderr

    @pytest.mark.parametrize("sign", [-1.0, 1.0])
    def test_a_bound_holds_however_far_the_network_runs(self, sign: float) -> None:
        torch.manual_seed(0)
        model = NeuralEBM(PLANE, NeuralSettings(hidden=16, layers=1, bound=3.0))
        model.initialise(ring(500, 0), seeded(1))
        x = 20 * torch.randn(200, 2, generator=seeded(2))
        torch.testing.assert_close(model.tilt(x), torch.zeros(200))
        head = model.g[-1]
        torch.nn.init.constant_(head.bias, sign * 0.01)
        torch.testing.assert_close(model.tilt(x), torch.full((200,), sign * 0.01), rtol=1e-4, atol=0)
        torch.nn.init.constant_(head.bias, sign * 1e4)
        torch.testing.assert_close(model.tilt(x), torch.full((200,), sign * 3.0))
        log_z, _, _ = quadrature(model)
        assert log_z == pytest.approx(-sign * 3.0, abs=1e-3)

    @pytest.mark.parametrize("jump", [0.0, 0.5])
    @pytest.mark.parametrize("beta", [0.5, 1.0])
    def test_moves_leave_the_path_invariant(self, neural: NeuralEBM, beta: float, jump: float) -> None:
        """Exact draws of f_beta stay exact draws, and a kernel without its correction would drift away."""
        _, grid, p = quadrature(neural, beta)
        n, g = 40000, seeded(3)
        cell = 14.0 / 280
        x = grid[torch.multinomial(p, n, replacement=True, generator=g)].float()
        x += cell * (torch.rand(n, 2, generator=g) - 0.5)
        neural.jump, before = jump, neural.jump
        for _ in range(4):
            _, x = neural.anneal(x, beta, beta, g)
        neural.jump = before
        for statistic in (lambda v: v[:, 0], lambda v: v.square().sum(1), lambda v: v.norm(dim=1), neural.tilt):
            with torch.no_grad():
                values, truth = statistic(x).double(), statistic(grid.float()).double()
            mean = (p * truth).sum()
            assert abs(values.mean() - mean) < 4.5 * values.std() / n**0.5

    def test_reversibility_by_pair_counts(self, neural: NeuralEBM) -> None:
        """Detailed balance: in equilibrium, moves from inside to outside are as many as back, for several regions."""
        _, grid, p = quadrature(neural)
        g = seeded(4)
        x = grid[torch.multinomial(p, 40000, replacement=True, generator=g)].float()
        _, y = neural.anneal(x, 1.0, 1.0, g)
        for radius in (1.2, 1.4, 1.6):
            out = ((x.norm(dim=1) < radius) & (y[:, 0] > 0) & (y.norm(dim=1) >= radius)).sum()
            back = ((y.norm(dim=1) < radius) & (x[:, 0] > 0) & (x.norm(dim=1) >= radius)).sum()
            assert out > 100
            assert abs(out - back) < 4.5 * math.sqrt(out + back)

    def test_weight_is_the_tilt(self, neural: NeuralEBM) -> None:
        x = ring(50, 6)
        increment, _ = neural.anneal(x, 0.25, 0.75, seeded(5))
        assert increment.dtype == torch.float64
        assert torch.allclose(increment, -0.5 * neural.tilt(x).double())

    def test_score_is_the_slope_of_the_energy(self, neural: NeuralEBM) -> None:
        model = copy.deepcopy(neural).double()
        x, h = ring(20, 7).double(), 1e-5
        slope = torch.stack([(model.energy(x - h * e) - model.energy(x + h * e)) / (2 * h) for e in torch.eye(2)], 1)
        assert torch.allclose(model.score(x), slope, atol=1e-6)

    def test_samples_follow_the_model(self, neural: NeuralEBM) -> None:
        _, grid, p = quadrature(neural)
        x = neural.sample(4000, seeded(8))
        for statistic in (lambda v: v[:, 0], lambda v: v.norm(dim=1), lambda v: (v[:, 0] * v[:, 1] > 0).double()):
            values, truth = statistic(x.double()), statistic(grid)
            assert abs(values.mean() - (p * truth).sum()) < 4.5 * values.std() / 4000**0.5

    def test_loss_is_the_contrast_with_the_moved_chains(self) -> None:
        model = trained(chains=64)
        batch, before = ring(32, 9), model.replay.clone()
        moved, _, _ = model._move(before, 1.0, model.moves, seeded(10))
        loss = model.loss(batch, seeded(10))
        assert torch.equal(model.replay, moved)
        assert torch.allclose(loss, model.tilt(batch).mean() - model.tilt(moved).mean())

    def test_validation_loss_is_nearly_the_nll(self, neural: NeuralEBM) -> None:
        x = ring(1000, 11)
        log_z, _, _ = quadrature(neural)
        nll = float(neural.energy(x).mean()) + log_z
        assert float(neural.validation_loss(x, seeded(12))) == pytest.approx(nll, abs=0.1)


class TestBase:
    def test_one_gaussian_has_the_moments_of_the_data(self) -> None:
        x = ring(5000, 0) @ torch.tensor([[1.0, 0.5], [0.0, 0.7]])
        base = GaussianMixture(2, 1)
        base.fit(x, seeded(0), prior=0.0, inflation=1.0)
        truth = torch.distributions.MultivariateNormal(x.mean(0), torch.cov(x.T, correction=0))
        assert torch.allclose(base.log_prob(x), truth.log_prob(x), atol=1e-3)

    def test_a_component_on_copies_of_one_row_is_a_clear_error_and_a_prior_mends_it(self) -> None:
        x = torch.cat([torch.full((50, 2), 9.0), 1e-3 * torch.randn(200, 2, generator=seeded(2))])
        with pytest.raises(ValueError, match=r"singular covariance.*set prior > 0 \(now 0\)"):
            GaussianMixture(2, 2).fit(x, seeded(0), prior=0.0, inflation=1.0)
        base = GaussianMixture(2, 2)
        base.fit(x, seeded(0), prior=1.0, inflation=1.0)
        assert base.log_prob(x).isfinite().all()

    def test_mixture_finds_two_modes_and_samples_what_it_scores(self) -> None:
        g = seeded(1)
        x = torch.cat([torch.randn(1000, 2, generator=g) - 4, 0.5 * torch.randn(3000, 2, generator=g) + 4])
        base = GaussianMixture(2, 2)
        base.fit(x, g, prior=1.0, inflation=1.0)
        assert torch.allclose(base.log_weight.exp().sort().values, torch.tensor([0.25, 0.75]), atol=0.01)
        draws = base.sample(20000, g)
        assert torch.allclose(draws.mean(0), x.mean(0), atol=0.12)
        assert abs(base.log_prob(draws).mean() - base.log_prob(x).mean()) < 0.05


def test_entries_build_what_they_say() -> None:
    assert RBM_CD.build(BITS, **RBM_CD.params).replay.numel() == 0
    assert len(RBM_PCD.build(BITS, **RBM_PCD.params).replay) > 0
    assert NEURAL_EBM.build(PLANE, **NEURAL_EBM.params).capabilities >= {"energy", "score", "annealing", "sample"}
    with pytest.raises(ValueError, match="discrete"):
        RBM_CD.build(PLANE)
    assert ais(RBM_CD.build(BITS), 3, schedule(2), seeded(0)).samples.shape == (3, 6)
