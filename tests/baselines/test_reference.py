"""References: exact densities against enumeration, quadrature and scikit-learn; EM climbs."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from sklearn.mixture import GaussianMixture
from sklearn.neighbors import KernelDensity
from torch import Tensor

from baselines.reference import BERNOULLI_MIXTURE, GAUSSIAN_MIXTURE, KDE, MARGINALS
from replicate.model import DataInfo, Model, ModelEntry

BITS = DataInfo(4, "bits", 2)
LEVELS = DataInfo(3, "levels", 4)
PLANE = DataInfo(2, "continuous")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def all_states(info: DataInfo) -> Tensor:
    assert info.levels is not None
    return torch.tensor(list(itertools.product(range(info.levels), repeat=info.dim))).float()


def data(info: DataInfo, n: int = 300) -> Tensor:
    """Two clusters, so that dependence matters."""
    side = torch.rand(n, 1, generator=generator(1)) < 0.3
    if info.domain == "continuous":
        return torch.randn(n, info.dim, generator=generator(2)) * 0.4 + 2 * side
    assert info.levels is not None
    p = torch.linspace(0.1, 0.9, info.dim).expand(n, -1)
    p = torch.where(side, p, 1 - p)
    draws = torch.rand(n, info.dim, info.levels - 1, generator=generator(3)) < p[..., None]
    return draws.float().sum(-1)


def fitted(entry: ModelEntry, info: DataInfo, n: int = 300, **params: object) -> Model:
    model = entry.build(info, **{**entry.params, **params})
    model.initialise(data(info, n), generator())
    return model.eval()


DISCRETE = [(MARGINALS, {}), (BERNOULLI_MIXTURE, {"components": 5})]
CONTINUOUS = [(MARGINALS, {}), (GAUSSIAN_MIXTURE, {"components": 3}), (KDE, {})]
NAMES = ["marginals", "mixture-em"], ["marginals", "gaussian-mixture", "kde"]


@pytest.mark.parametrize("info", [BITS, LEVELS], ids=["bits", "levels"])
@pytest.mark.parametrize(("entry", "params"), DISCRETE, ids=NAMES[0])
def test_discrete_references_sum_to_one_and_samples_follow(entry: ModelEntry, params: dict, info: DataInfo) -> None:
    model = fitted(entry, info, **params)
    x = all_states(info)
    p = model.log_prob(x).exp()
    assert float(p.sum()) == pytest.approx(1.0, abs=1e-5)
    samples = model.sample(40_000, generator(4))
    place = torch.tensor([float(info.levels or 0) ** i for i in reversed(range(info.dim))])
    frequency = torch.bincount((samples @ place).long(), minlength=len(x)) / len(samples)
    # the expected total deviation of 40,000 draws from 64 cells is below 0.04
    assert float((frequency - p).abs().sum()) < 0.05


def test_discrete_marginals_are_the_smoothed_frequencies() -> None:
    model = fitted(MARGINALS, BITS, pseudo_count=2.0)
    ones = (data(BITS).sum(0) + 2.0) / (300 + 4.0)
    torch.testing.assert_close(model.log_prob(torch.ones(1, 4)), ones.log().sum().view(1))
    torch.testing.assert_close(model.log_prob(torch.zeros(1, 4)), (1 - ones).log().sum().view(1))


def test_continuous_marginals_are_the_gaussian_of_each_dimension() -> None:
    x = data(PLANE)
    expected = torch.distributions.Normal(x.mean(0), x.std(0, unbiased=False)).log_prob(x).sum(1)
    torch.testing.assert_close(fitted(MARGINALS, PLANE).log_prob(x), expected)


@pytest.mark.parametrize("info", [BITS, LEVELS], ids=["bits", "levels"])
@pytest.mark.parametrize("strength", [1e-9, 2.0])
def test_em_never_lowers_its_objective(info: DataInfo, strength: float) -> None:
    """With vanishing priors the objective is the log-likelihood itself."""
    model = fitted(BERNOULLI_MIXTURE, info, components=4, strength=strength, iterations=60)
    steps = model.objective.diff()
    assert float(steps.min()) > -1e-10
    assert float(steps[:5].sum()) > 1e-3
    if strength < 1:
        assert float(model.log_prob(data(info)).mean()) == pytest.approx(float(model.objective[-1]), abs=1e-3)


def test_an_em_step_is_the_textbooks() -> None:
    """One step against loops: responsibilities by enumeration of the components, then weighted frequencies."""
    x = data(BITS, 30)
    before = fitted_on(x, iterations=1)
    after = fitted_on(x, iterations=2)
    joint = np.zeros((30, 3))
    p_one = before.log_p[:, :, 1].double().exp().numpy()
    for i, k in itertools.product(range(30), range(3)):
        likelihood = [p_one[k, d] if x[i, d] else 1 - p_one[k, d] for d in range(4)]
        joint[i, k] = before.log_w[k].exp() * np.prod(likelihood)
    np.testing.assert_allclose(np.log(joint.sum(1)), before.log_prob(x).numpy(), rtol=1e-5)
    r = joint / joint.sum(1, keepdims=True)
    centre = (x.sum(0).numpy() + 0.5) / 31
    expected = (r.T @ x.numpy() + 2.0 * centre) / (r.sum(0)[:, None] + 2.0)
    np.testing.assert_allclose(after.log_p[:, :, 1].exp().numpy(), expected, rtol=1e-5)
    np.testing.assert_allclose(after.log_w.exp().numpy(), r.mean(0), rtol=1e-5)


def fitted_on(x: Tensor, iterations: int) -> Model:
    model = BERNOULLI_MIXTURE.build(BITS, components=3, strength=2.0, iterations=iterations)
    model.initialise(x, generator())
    return model


def test_em_finds_the_two_clusters() -> None:
    """Dependence is worth at least 0.2 nats here, and the mixture gets them."""
    fresh = data(BITS, 2000)[1000:]
    gain = fitted(BERNOULLI_MIXTURE, BITS, 1000, components=2).log_prob(fresh) - fitted(MARGINALS, BITS, 1000).log_prob(
        fresh
    )
    assert float(gain.mean()) > 0.2


@pytest.mark.parametrize(("entry", "params"), CONTINUOUS, ids=NAMES[1])
def test_continuous_references_integrate_to_one_and_samples_follow(entry: ModelEntry, params: dict) -> None:
    model = fitted(entry, PLANE, **params)
    axis = torch.linspace(-6, 8, 281)
    grid = torch.cartesian_prod(axis, axis)
    p = model.log_prob(grid).exp().double() * float(axis[1] - axis[0]) ** 2
    assert float(p.sum()) == pytest.approx(1.0, abs=1e-3)
    x = model.sample(40_000, generator(4)).double()
    assert x.shape == (40_000, 2)
    torch.testing.assert_close(x.mean(0), p @ grid.double(), atol=0.03, rtol=0)
    second = torch.stack([p @ (grid[:, i] * grid[:, j]).double() for i, j in ((0, 0), (0, 1), (1, 1))])
    got = torch.stack([(x[:, i] * x[:, j]).mean() for i, j in ((0, 0), (0, 1), (1, 1))])
    torch.testing.assert_close(got, second, atol=0.06, rtol=0)


@pytest.mark.parametrize(("entry", "params"), CONTINUOUS, ids=NAMES[1])
def test_the_score_is_the_gradient_of_log_prob(entry: ModelEntry, params: dict) -> None:
    model = fitted(entry, PLANE, **params).double()
    x = data(PLANE)[:20].double().requires_grad_(True)
    (expected,) = torch.autograd.grad(model.log_prob(x).sum(), x)
    torch.testing.assert_close(model.score(x.detach()), expected, atol=1e-8, rtol=1e-8)


def test_kde_against_scikit_learn() -> None:
    """Same centres and bandwidth; a batch longer than one chunk, and a narrow kernel far from the origin."""
    model = fitted(KDE, PLANE)
    x = torch.cat([data(PLANE, 2500), data(PLANE)[:3] + 20])
    for h in (float(model.bandwidth), 0.01):
        model.bandwidth.fill_(h)
        # one leaf: scikit-learn's tree sums give narrow kernels wrong tails, by hundreds of nats
        reference = KernelDensity(bandwidth=float(model.bandwidth), leaf_size=10_000).fit(
            model.centres.double().numpy()
        )
        expected = torch.from_numpy(reference.score_samples(x.double().numpy()))
        torch.testing.assert_close(model.log_prob(x.double()), expected, atol=1e-6, rtol=1e-6)


def test_kde_picks_the_bandwidth_that_held_out_points_prefer() -> None:
    """A fresh sample prefers the chosen bandwidth to one three times as wide or as narrow."""
    model = fitted(KDE, PLANE, 2000)
    assert torch.equal(model.centres.sort(0).values, data(PLANE, 2000).sort(0).values)
    fresh = torch.randn(2000, 2, generator=generator(9)) * 0.4 + 2 * (torch.rand(2000, 1, generator=generator(8)) < 0.3)
    best, chosen = float(model.log_prob(fresh).mean()), float(model.bandwidth)
    for factor in (3.0, 1 / 3):
        model.bandwidth.fill_(chosen * factor)
        assert float(model.log_prob(fresh).mean()) < best


@pytest.mark.parametrize("covariance", ["full", "tied"])
def test_gaussian_mixture_against_scikit_learn(covariance: str) -> None:
    model = fitted(GAUSSIAN_MIXTURE, PLANE, components=3, covariance=covariance, ridge=1e-3)
    x = data(PLANE, 50)
    means = model.means.double().numpy()
    reference = GaussianMixture(3, covariance_type="full")
    reference.weights_, reference.means_ = model.log_w.double().exp().numpy(), means
    reference.precisions_cholesky_ = model.whiten.double().numpy()
    expected = torch.from_numpy(reference.score_samples(x.double().numpy())).float()
    torch.testing.assert_close(model.log_prob(x), expected, atol=1e-5, rtol=1e-5)
    # and the fit is worth something: better than one Gaussian a dimension on fresh rows
    fresh = data(PLANE, 2000)[1000:]
    assert float(model.log_prob(fresh).mean() - fitted(MARGINALS, PLANE).log_prob(fresh).mean()) > 0.3


def test_unknown_covariance_is_an_error() -> None:
    with pytest.raises(ValueError, match="full or tied"):
        GAUSSIAN_MIXTURE.build(PLANE, covariance="round")


@pytest.mark.parametrize(
    ("entry", "params", "info"),
    [(e, p, BITS) for e, p in DISCRETE] + [(e, p, PLANE) for e, p in CONTINUOUS],
    ids=["marginals-bits", *NAMES[0][1:], *NAMES[1]],
)
def test_fits_repeat_bit_for_bit_and_leave_global_generators_alone(
    entry: ModelEntry, params: dict, info: DataInfo
) -> None:
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    first, second = fitted(entry, info, **params), fitted(entry, info, **params)
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
    assert torch.equal(first.sample(9, generator(1)), second.sample(9, generator(1)))
    assert torch.equal(state, torch.get_rng_state())
    assert np.array_equal(numpy_state, np.random.get_state()[1])  # noqa: NPY002
    assert not list(first.parameters())
    assert ("score" in first.capabilities) == (info.domain == "continuous")


def test_a_fit_survives_saving_and_loading() -> None:
    for entry, params in CONTINUOUS:
        model, fresh = fitted(entry, PLANE, **params), entry.build(PLANE, **{**entry.params, **params})
        fresh.load_state_dict(model.state_dict())
        assert torch.equal(fresh.log_prob(data(PLANE)), model.log_prob(data(PLANE)))
    assert math.isfinite(float(model.bandwidth))
