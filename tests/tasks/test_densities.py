"""The densities are what they say: normalised, with the score of their log p, and sampled exactly."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from replicate.tasks.base import Task
from replicate.tasks.densities import CURVE_SD, SIZES, Checkerboard, GaussianMixture, data_seed
from replicate.tasks.loading import tasks

DENSITIES = {name: entry for name, entry in tasks().items() if entry.kind == "density"}
PLANE = [n for n in DENSITIES if not n.startswith("mixture") or n == "mixture-2"]
SMOOTH = [n for n in DENSITIES if n != "checkerboard"]
SMOOTH_PLANE = [n for n in PLANE if n in SMOOTH]
MIXTURES = [n for n in DENSITIES if n.startswith("mixture")]
CURVES = ["two-moons", "rings", "pinwheel", "spirals"]
#: the tests below look at fixed seeds: one in ten thousand would be a wrong sampler rather than bad luck
P_VALUE = 1e-4

_loaded: dict[str, Task] = {}


def task(name: str) -> Task:
    """A task, loaded once for the whole file."""
    if name not in _loaded:
        _loaded[name] = DENSITIES[name].load()
    return _loaded[name]


def density(name: str) -> GaussianMixture:
    """The mixture behind a smooth task."""
    found = task(name).density
    assert isinstance(found, GaussianMixture)
    return found


def everywhere(name: str, n: int = 400) -> Tensor:
    """Float64 points: half of them samples, half uniform in the density's box, where log p may be very low."""
    d = density(name)
    g = torch.Generator().manual_seed(11)
    far = (2 * torch.rand(n, d.dim, generator=g, dtype=torch.float64) - 1) * d.half_width
    return torch.cat([d.sample(n, g).double(), far])


def centres(half_width: float, n: int) -> Tensor:
    """Centres of n x n squares that tile [-half_width, half_width]^2, shape (n * n, 2), float64."""
    line = (torch.arange(n, dtype=torch.float64) + 0.5) * (2 * half_width / n) - half_width
    return torch.cartesian_prod(line, line)


def cell_p_value(x: Tensor, name: str, cells: int = 32, inner: int = 10) -> float:
    """Chi-square p-value of the counts of x in cells x cells squares against the density's quadrature.

    Squares with fewer than 10 expected points, and all that lies outside the box, are merged into one.
    """
    d = task(name).density
    assert d is not None
    fine = cells * inner
    area = (2 * d.half_width / fine) ** 2
    mass = d.log_prob(centres(d.half_width, fine)).exp().reshape(cells, inner, cells, inner).sum((1, 3)) * area
    edges = np.linspace(-d.half_width, d.half_width, cells + 1)
    seen, _, _ = np.histogram2d(x[:, 0].numpy(), x[:, 1].numpy(), bins=[edges, edges])
    expected = mass.numpy() * len(x)
    big = expected >= 10
    counts = np.append(seen[big], len(x) - seen[big].sum())
    wanted = np.append(expected[big], len(x) - expected[big].sum())
    if wanted[-1] < 1e-6 * len(x):  # the squares hold everything: nothing may lie elsewhere
        if counts[-1] > 0:
            return 0.0
        counts, wanted = counts[:-1], wanted[:-1]
    return float(stats.chisquare(counts, wanted * counts.sum() / wanted.sum()).pvalue)


@pytest.mark.parametrize("name", SMOOTH_PLANE)
def test_integrates_to_one_on_its_box(name: str) -> None:
    d = density(name)
    n = 360
    total = d.log_prob(centres(d.half_width, n)).exp().sum() * (2 * d.half_width / n) ** 2
    # the midpoint rule is exact to rounding for Gaussians this wide; what is left is the mass outside the box
    assert abs(float(total) - 1) < 1e-8


def test_checkerboard_integrates_to_exactly_one() -> None:
    d = Checkerboard()
    # 64 x 64 squares never cross an edge of the 4 x 4 cells
    assert float(d.log_prob(centres(d.half_width, 64)).exp().sum() * (8 / 64) ** 2) == pytest.approx(1, abs=1e-12)
    assert torch.isneginf(d.log_prob(centres(3 * d.half_width, 192)[:64])).all()


@pytest.mark.parametrize("name", MIXTURES)
def test_the_box_holds_all_but_a_negligible_mass(name: str) -> None:
    d = density(name)
    sd = d.covariance.diagonal().sqrt()
    tails = stats.norm.sf((d.half_width - d.means.abs()) / sd) + stats.norm.sf((d.half_width + d.means.abs()) / sd)
    assert float((d.weights.numpy() @ tails).sum()) < 1e-8


@pytest.mark.parametrize("name", SMOOTH)
def test_log_prob_agrees_with_torch_distributions(name: str) -> None:
    d = density(name)
    components = MultivariateNormal(d.means, covariance_matrix=d.covariance)
    reference = MixtureSameFamily(Categorical(d.weights), components)
    x = everywhere(name)
    torch.testing.assert_close(d.log_prob(x), reference.log_prob(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", SMOOTH)
def test_score_is_the_gradient_of_log_prob(name: str) -> None:
    d = density(name)
    x = everywhere(name).requires_grad_(True)
    (gradient,) = torch.autograd.grad(d.log_prob(x).sum(), x)
    torch.testing.assert_close(d.score(x.detach()), gradient, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", PLANE)
def test_sample_counts_agree_with_quadrature(name: str) -> None:
    assert cell_p_value(task(name).train, name) > P_VALUE


@pytest.mark.parametrize("name", PLANE)
def test_the_count_check_notices_a_slightly_wrong_sampler(name: str) -> None:
    wider = task(name).train * 1.02
    assert cell_p_value(wider, name) < P_VALUE


@pytest.mark.parametrize("name", MIXTURES)
def test_mixture_samples_have_the_closed_form_mean_and_covariance(name: str) -> None:
    d, x = density(name), task(name).train.double()
    mean = d.weights @ d.means
    between = (d.means - mean).T @ torch.diag(d.weights) @ (d.means - mean)
    whiten = torch.linalg.inv(torch.linalg.cholesky(d.covariance + between)).T
    y = (x - mean) @ whiten
    assert stats.chi2.sf(len(y) * float(y.mean(0).square().sum()), d.dim) > P_VALUE
    # an entry's standard error is at most sqrt(2 / n); 5 of them for the largest of up to 2080 entries
    error = (y.T @ y / len(y) - torch.eye(d.dim, dtype=torch.float64)).abs().max()
    assert float(error) < 5 * math.sqrt(2 / len(y))


@pytest.mark.parametrize("name", MIXTURES)
def test_mixture_projections_have_the_closed_form_distribution(name: str) -> None:
    d, x = density(name), task(name).train.double()
    precision = torch.linalg.inv(d.covariance)
    for direction in (precision @ (d.means[0] - d.means[1]), precision @ (d.means[0] - d.means[2])):
        centre, sd = d.means @ direction, float((direction @ d.covariance @ direction).sqrt())

        def cdf(t: np.ndarray, centre: Tensor = centre, sd: float = sd) -> np.ndarray:
            return stats.norm.cdf((t[:, None] - centre.numpy()) / sd) @ d.weights.numpy()

        assert stats.kstest((x @ direction).numpy(), cdf).pvalue > P_VALUE


@pytest.mark.parametrize("name", MIXTURES)
def test_mixtures_overlap_alike_in_every_dimension(name: str) -> None:
    d = density(name)
    apart = torch.pdist(torch.linalg.solve_triangular(d.factor, d.means.T, upper=False).T)
    torch.testing.assert_close(apart, torch.full((3,), 5.0, dtype=torch.float64))
    assert 0.8 < float(task(name).train.std(0).mean()) < 2.5
    index = torch.arange(d.dim, dtype=torch.float64)
    torch.testing.assert_close(d.covariance, 0.6 ** (index[:, None] - index).abs())


@pytest.mark.parametrize("name", list(DENSITIES))
def test_modes_are_visited_with_their_weights(name: str) -> None:
    d = task(name).density
    assert d is not None
    weights, modes = d.mode_weights(), d.mode_of(task(name).train)
    assert weights is not None
    assert modes.dtype == torch.int64
    assert float(weights.sum()) == pytest.approx(1, abs=1e-12)
    share = torch.bincount(modes, minlength=len(weights)).double() / len(modes)
    stderr = (weights * (1 - weights) / len(modes)).sqrt()
    # the most probable mode is not always the one drawn: overlap moves a share by less than 0.002
    assert ((share - weights).abs() < 4 * stderr + 0.002).all()


@pytest.mark.parametrize("name", SMOOTH)
def test_every_component_lies_in_its_own_mode(name: str) -> None:
    d = density(name)
    assert torch.equal(d.mode_of(d.means), d.modes)


@pytest.mark.parametrize("name", CURVES)
def test_curves_are_sampled_more_densely_than_they_are_wide(name: str) -> None:
    d = density(name)
    torch.testing.assert_close(d.covariance, CURVE_SD**2 * torch.eye(2, dtype=torch.float64))
    same_curve = d.modes[1:] == d.modes[:-1]
    step = (d.means[1:] - d.means[:-1]).norm(dim=1)[same_curve]
    assert float(step.max()) <= CURVE_SD


def test_two_gaussians_are_those_of_the_paper() -> None:
    d = density("two-gaussians")
    assert d.means.tolist() == [[-5, -5], [5, 5]]
    assert d.weights.tolist() == [0.2, 0.8]
    assert torch.equal(d.covariance, torch.eye(2, dtype=torch.float64))


def test_checkerboard_has_no_score_outside_its_cells() -> None:
    d = Checkerboard()
    x = torch.tensor([[-3.0, -3.0], [-1.0, -3.0], [3.9, 3.9], [4.1, 3.9], [-4.5, 0.5]])
    inside = torch.tensor([True, False, True, False, False])
    score = d.score(x)
    assert (score[inside] == 0).all()
    assert score[~inside].isnan().all()
    assert d.log_prob(x)[inside].tolist() == pytest.approx([-math.log(32)] * 2)
    assert torch.isneginf(d.log_prob(x)[~inside]).all()


def test_checkerboard_samples_are_uniform_inside_its_cells() -> None:
    d, x = Checkerboard(), task("checkerboard").train
    assert torch.isfinite(d.log_prob(x)).all()
    within = torch.frac((x.double() + d.half_width) / d.side)
    assert float(within.min()) > 0  # never on an edge
    for axis in range(2):
        assert stats.kstest(within[:, axis].numpy(), "uniform").pvalue > P_VALUE
    cell = ((x + d.half_width) / d.side).floor().long()
    assert torch.equal(d.cells[d.mode_of(x)], cell)


@pytest.mark.parametrize("name", list(DENSITIES))
def test_results_come_in_the_input_dtype_and_do_not_depend_on_the_batch(name: str) -> None:
    d, x = task(name).density, task(name).test
    assert d is not None
    assert x.dtype == torch.float32
    for method in (d.log_prob, d.score):
        single, double = method(x), method(x.double())
        assert (single.dtype, double.dtype) == (torch.float32, torch.float64)
        torch.testing.assert_close(single.double(), double, rtol=2e-7, atol=1e-7)
        torch.testing.assert_close(method(x.double()[4990:4993]), double[4990:4993], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", list(DENSITIES))
def test_task_has_its_sizes_and_hides_nothing(name: str) -> None:
    t = task(name)
    assert t.name == name
    assert t.about == DENSITIES[name].about
    assert DENSITIES[name].kind == "density"
    assert t.density is not None
    assert (t.info.dim, t.info.domain) == (t.density.dim, "continuous")
    assert t.density.smooth is (name != "checkerboard")
    for part, x in zip(SIZES.values(), (t.train, t.valid, t.test), strict=True):
        assert x.shape == (part, t.info.dim)
        assert torch.isfinite(x).all()
        assert float(x.abs().max()) <= t.density.half_width
    assert [len(t.train), len(t.valid), len(t.test)] == [50_000, 5_000, 10_000]
    # three streams, not one cut up or reused
    assert not torch.equal(t.train[:5000], t.valid)
    assert not torch.equal(t.test[:5000], t.valid)


@pytest.mark.parametrize("name", list(DENSITIES))
def test_loading_twice_gives_the_same_bytes_and_leaves_the_global_generator_alone(name: str) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    again = DENSITIES[name].load()
    assert torch.equal(torch.get_rng_state(), before)
    assert again.sha256() == task(name).sha256()


def test_data_sets_differ_from_task_to_task() -> None:
    assert len({data_seed(n, part) for n in DENSITIES for part in SIZES}) == 3 * len(DENSITIES)
    assert len({task(n).sha256() for n in DENSITIES}) == len(DENSITIES)


@pytest.mark.parametrize("name", list(DENSITIES))
def test_samples_depend_on_the_generator_alone(name: str) -> None:
    d = task(name).density
    assert d is not None
    first, again, other = (d.sample(100, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert d.sample(0, torch.Generator()).shape == (0, d.dim)
