"""Metrics against closed forms, against scipy, and on sets where the answer is known."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import scipy.linalg
import torch
from scipy import stats
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from replicate.metrics.classifier import c2st
from replicate.metrics.divergences import fisher_divergence, kl
from replicate.metrics.features import DIGITS, FeatureClassifier
from replicate.metrics.intervals import t_interval
from replicate.metrics.quality import frechet, precision_recall_density_coverage
from replicate.metrics.samples import mmd, mode_weight_error, w2
from replicate.model import Estimate, Kind, LogLikelihood
from replicate.runs.evaluate import digit_features
from replicate.tasks.digits import digits_shuffled
from replicate.tasks.loading import load_task

torch.set_num_threads(1)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(n: int, dim: int, seed: int) -> Tensor:
    return torch.randn(n, dim, generator=rng(seed), dtype=torch.float64)


def gaussian_log_prob(x: Tensor, mean: float, std: float) -> Tensor:
    return torch.distributions.Normal(mean, std).log_prob(x).sum(-1)


def calibration(estimate: Callable[[int], Estimate], replicates: int) -> float:
    """Spread of a number over independent replicates, over the root mean square of its stated standard errors."""
    results = [estimate(seed) for seed in range(replicates)]
    values, stated = np.array([e.value for e in results]), np.array([e.stderr for e in results])
    return float(values.std(ddof=1) / np.sqrt(np.mean(stated**2)))


# -- divergences


def test_kl_between_gaussians_is_the_closed_form() -> None:
    x = 0.5 + 0.8 * normal(20_000, 2, 0)
    p = LogLikelihood(gaussian_log_prob(x, 0.5, 0.8), "exact")
    e = kl(p, LogLikelihood(gaussian_log_prob(x, 0.0, 1.0), "exact"))
    closed = 2 * (-math.log(0.8) + (0.64 + 0.25 - 1) / 2)
    assert abs(e.value - closed) < 4 * e.stderr
    assert e.stderr < 0.02 * closed
    assert (e.kind, e.unit, e.n) == ("exact", "nats", 20_000)
    assert kl(p, p).value == 0


@pytest.mark.parametrize(
    ("kind", "flipped"),
    [
        ("exact", "exact"),
        ("estimate", "estimate"),
        ("lower_bound", "upper_bound"),
        ("upper_bound", "lower_bound"),
    ],
)
def test_a_bound_of_log_q_bounds_kl_from_the_other_side(kind: Kind, flipped: Kind) -> None:
    zeros = torch.zeros(10)
    assert kl(LogLikelihood(zeros, "exact"), LogLikelihood(zeros - 1, kind)).kind == flipped


def test_kl_carries_the_error_that_all_examples_share() -> None:
    x = normal(100, 1, 0)
    p, q = gaussian_log_prob(x, 0, 1), gaussian_log_prob(x, 0.3, 1)
    alone = kl(LogLikelihood(p, "exact"), LogLikelihood(q, "estimate"))
    shared = kl(LogLikelihood(p, "exact"), LogLikelihood(q, "estimate", shared_stderr=0.5))
    assert shared.stderr == pytest.approx(math.hypot(alone.stderr, 0.5))


def test_kl_refuses_a_truth_that_is_not_exact_and_shapes_that_differ() -> None:
    exact, bound = LogLikelihood(torch.zeros(3), "exact"), LogLikelihood(torch.zeros(3), "lower_bound")
    with pytest.raises(ValueError, match="must be exact"):
        kl(bound, exact)
    with pytest.raises(ValueError, match="shape"):
        kl(exact, LogLikelihood(torch.zeros(3, 1), "exact"))


def test_fisher_divergence_between_gaussians_is_the_closed_form() -> None:
    """E ||x / s^2 - x||^2 with x ~ N(0, I) is D (1 / s^2 - 1)^2."""
    x = normal(50_000, 3, 0)
    e = fisher_divergence(-x / 0.5, -x)
    assert abs(e.value - 3.0) < 4 * e.stderr
    assert e.stderr < 0.05
    with pytest.raises(ValueError, match="shapes"):
        fisher_divergence(x, x[:, :2])


# -- 2-Wasserstein


def test_w2_of_a_shifted_set_is_the_shift() -> None:
    x = normal(200, 3, 0)
    e = w2(x + torch.tensor([3.0, 0.0, -4.0]), x)
    assert e.value == pytest.approx(5.0, rel=1e-9)
    assert w2(x, x[torch.randperm(200, generator=rng())]).value == pytest.approx(0, abs=1e-6)


def test_w2_on_the_line_is_that_of_sorted_samples() -> None:
    x, y = normal(300, 1, 0), 1 + 2 * normal(300, 1, 1)
    closed = (x.sort(0).values - y.sort(0).values).square().mean().sqrt()
    assert w2(x, y).value == pytest.approx(float(closed), rel=1e-9)


def test_w2_is_the_best_assignment() -> None:
    x, y = normal(150, 4, 0), 0.5 * normal(150, 4, 1)
    cost = torch.cdist(x, y).square().numpy()
    rows, columns = linear_sum_assignment(cost)
    assert w2(x.float(), y.float()).value == pytest.approx(math.sqrt(cost[rows, columns].mean()), rel=1e-5)


def test_the_error_of_w2_is_the_spread_between_sets() -> None:
    def one(seed: int) -> Estimate:
        return w2(normal(80, 2, 2 * seed), 3 + normal(80, 2, 2 * seed + 1))

    assert calibration(one, 150) == pytest.approx(1, abs=0.2)


# -- maximum mean discrepancy


def test_mmd_has_mean_zero_under_the_null_and_its_stated_error() -> None:
    results = [mmd(normal(60, 2, 2 * seed), normal(60, 2, 2 * seed + 1)) for seed in range(300)]
    values = np.array([e.value for e in results])
    assert abs(values.mean()) < 4 * values.std() / math.sqrt(300)
    assert values.min() < 0 < values.max()
    assert values.std() / np.sqrt(np.mean([e.stderr**2 for e in results])) == pytest.approx(1, abs=0.25)


def test_the_error_of_mmd_is_the_spread_between_sets_away_from_the_null() -> None:
    def one(seed: int) -> Estimate:
        return mmd(1 + normal(60, 2, 2 * seed), normal(60, 2, 2 * seed + 1))

    assert calibration(one, 200) == pytest.approx(1, abs=0.2)


def test_mmd_is_the_double_sum_of_its_definition() -> None:
    x, y = normal(12, 3, 0), 0.5 + normal(12, 3, 1)
    median = float(np.median([float((y[i] - y[j]).norm()) for i in range(12) for j in range(i)]))
    # torch's median of an even number of values is the lower one, numpy's the mean of both
    between = sorted(float((y[i] - y[j]).norm()) for i in range(12) for j in range(i))
    lower = between[(len(between) - 1) // 2]
    assert lower <= median

    def k(a: Tensor, b: Tensor) -> float:
        d2 = float((a - b).square().sum())
        return sum(math.exp(-d2 / (2 * (c * lower) ** 2)) for c in (0.25, 0.5, 1, 2, 4)) / 5

    total = 0.0
    for i in range(12):
        for j in range(12):
            if i != j:
                total += k(x[i], x[j]) + k(y[i], y[j]) - k(x[i], y[j]) - k(x[j], y[i])
    assert mmd(x, y).value == pytest.approx(total / (12 * 11), rel=1e-9)


def test_mmd_does_not_depend_on_the_unit_of_length() -> None:
    x, y = normal(100, 2, 0), 1 + normal(100, 2, 1)
    assert mmd(1000 * x, 1000 * y).value == pytest.approx(mmd(x, y).value, rel=1e-9)


@pytest.mark.parametrize("distance", [w2, mmd])
def test_sets_of_different_size_are_refused(distance: Callable[[Tensor, Tensor], Estimate]) -> None:
    with pytest.raises(ValueError, match="same size"):
        distance(normal(10, 2, 0), normal(9, 2, 0))


# -- weights of modes


def test_mode_weight_error_is_half_the_l1_distance() -> None:
    modes = torch.tensor([0] * 50 + [1] * 30 + [2] * 20)
    e = mode_weight_error(modes, torch.tensor([0.2, 0.3, 0.25, 0.25]))
    assert e.value == pytest.approx((0.3 + 0 + 0.05 + 0.25) / 2)
    assert e.unit == "probability"
    exact = mode_weight_error(modes, torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64))
    assert exact.value == pytest.approx(0, abs=1e-12)


def test_the_error_of_mode_weights_is_the_spread_between_sets() -> None:
    def one(seed: int) -> Estimate:
        modes = torch.multinomial(torch.tensor([0.6, 0.3, 0.1]), 500, replacement=True, generator=rng(seed))
        return mode_weight_error(modes, torch.tensor([0.2, 0.4, 0.4]))

    assert calibration(one, 300) == pytest.approx(1, abs=0.15)


def test_modes_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ValueError, match=r"0\.\.1"):
        mode_weight_error(torch.tensor([0, 2]), torch.tensor([0.5, 0.5]))


# -- Frechet distance


def moments(x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    return x.mean(0).numpy(), np.cov(x.numpy().T)


def test_frechet_agrees_with_the_matrix_root_of_scipy() -> None:
    mix = normal(6, 6, 9)
    x, y = normal(200, 6, 0) @ mix, 0.3 + normal(300, 6, 1)
    (mx, cx), (my, cy) = moments(x), moments(y)
    root = scipy.linalg.sqrtm(cx @ cy).real
    expected = ((mx - my) ** 2).sum() + np.trace(cx + cy - 2 * root)
    e = frechet(x, y)
    assert e.value == pytest.approx(expected, rel=1e-9)
    assert frechet(y, x).value == pytest.approx(expected, rel=1e-9)
    assert frechet(y, x).stderr == pytest.approx(e.stderr, rel=1e-6)


def test_frechet_of_commuting_gaussians_is_the_closed_form() -> None:
    """With C = diag(s^2) on both sides: ||m||^2 + sum (s - t)^2, here on sets whose moments are set exactly."""
    x = normal(500, 3, 0)
    x = (x - x.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T
    s, t, shift = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 2.0, 0.5]), torch.tensor([1.0, 0.0, -1.0])
    e = frechet(x * s, x * t + shift)
    assert e.value == pytest.approx(float(shift.square().sum() + (s - t).square().sum()), rel=1e-9)


def test_frechet_of_singular_covariances_is_finite_and_zero_for_equal_sets() -> None:
    x = normal(50, 3, 0) @ normal(3, 10, 1)
    assert frechet(x, x).value == pytest.approx(0, abs=1e-6)
    moved = frechet(x + 1, x)
    assert moved.value == pytest.approx(10, rel=1e-6)
    assert math.isfinite(moved.stderr)


def test_the_error_of_frechet_is_the_spread_between_sets() -> None:
    mix = normal(4, 4, 5)

    def one(seed: int) -> Estimate:
        return frechet(normal(300, 4, 2 * seed) @ mix, 1 + normal(200, 4, 2 * seed + 1))

    assert calibration(one, 200) == pytest.approx(1, abs=0.2)


def test_frechet_refuses_features_that_differ_in_number() -> None:
    with pytest.raises(ValueError, match="features"):
        frechet(normal(10, 2, 0), normal(10, 3, 0))


# -- precision, recall, density, coverage


def test_the_four_fractions_are_their_definitions_written_out() -> None:
    real, fake, k = normal(40, 2, 0), 0.5 * normal(30, 2, 1) + 0.7, 3

    def radius(rows: Tensor, i: int) -> float:
        return sorted(float((rows[i] - rows[j]).norm()) for j in range(len(rows)) if j != i)[k - 1]

    real_balls, fake_balls = ([radius(rows, i) for i in range(len(rows))] for rows in (real, fake))
    near = [[float((r - f).norm()) for f in fake] for r in real]
    n, m = len(real), len(fake)
    expected = {
        "precision": sum(any(near[i][j] <= real_balls[i] for i in range(n)) for j in range(m)) / m,
        "recall": sum(any(near[i][j] <= fake_balls[j] for j in range(m)) for i in range(n)) / n,
        "density": sum(near[i][j] <= real_balls[i] for i in range(n) for j in range(m)) / (k * m),
        "coverage": sum(any(near[i][j] <= real_balls[i] for j in range(m)) for i in range(n)) / n,
    }
    assert len({round(v, 6) for v in expected.values()}) == 4  # no two could be mistaken for one another
    got = precision_recall_density_coverage(real, fake, k)
    assert {name: e.value for name, e in got.items()} == pytest.approx(expected)


def test_a_set_against_itself_is_perfect() -> None:
    x = normal(200, 4, 0)
    got = precision_recall_density_coverage(x, x)
    assert [got[name].value for name in ("precision", "recall", "coverage")] == [1, 1, 1]
    # each row lies in its own ball and in those of the rows that count it among their 5 nearest: 5 on average
    assert got["density"].value == pytest.approx(6 / 5)


def test_two_samples_of_one_distribution_score_near_one() -> None:
    got = precision_recall_density_coverage(normal(1000, 2, 0), normal(1000, 2, 1))
    assert got["density"].value == pytest.approx(1, abs=0.05)
    # a ball of 5 neighbours is missed by all of another set with probability 2^-5 (Naeem et al. 2020, Lemma 1)
    assert got["coverage"].value == pytest.approx(1 - 2**-5, abs=0.02)
    assert min(got["precision"].value, got["recall"].value) > 0.95


def test_disjoint_sets_score_zero() -> None:
    got = precision_recall_density_coverage(normal(100, 2, 0), 1000 + normal(100, 2, 1))
    assert [e.value for e in got.values()] == [0, 0, 0, 0]


def test_a_missing_mode_lowers_recall_and_a_false_one_precision() -> None:
    left, right = normal(300, 2, 0) - 50, normal(300, 2, 1) + 50
    fake = normal(300, 2, 2) - 50
    lost = precision_recall_density_coverage(torch.cat([left, right]), fake)
    assert lost["precision"].value > 0.9
    assert lost["recall"].value == pytest.approx(0.5, abs=0.05)
    assert lost["coverage"].value == pytest.approx(0.5, abs=0.05)
    invented = precision_recall_density_coverage(fake, torch.cat([left, right]))
    assert invented["precision"].value == pytest.approx(0.5, abs=0.05)
    assert invented["recall"].value > 0.9


def test_too_few_rows_for_k_neighbours_are_refused() -> None:
    with pytest.raises(ValueError, match="more than k = 5"):
        precision_recall_density_coverage(normal(5, 2, 0), normal(50, 2, 0))


# -- classifiers


def test_c2st_is_a_half_for_equal_distributions_and_one_for_distant_ones() -> None:
    x, y = normal(300, 2, 0), normal(300, 2, 1)
    same = c2st(x, y, rng())
    assert abs(same.value - 0.5) < 4 * same.stderr
    assert c2st(x, y + 20, rng()).value == 1.0
    assert same.n == 600


def test_c2st_reaches_the_bayes_accuracy_of_shifted_gaussians() -> None:
    """The best accuracy at telling N(0, I) from N((2, 0), I) is Phi(1) = 0.841."""
    e = c2st(normal(600, 2, 0), normal(600, 2, 1) + torch.tensor([2.0, 0.0]), rng())
    assert e.value == pytest.approx(stats.norm.cdf(1), abs=3.5 * e.stderr)


def test_c2st_sees_a_difference_that_no_linear_rule_sees() -> None:
    """Equal means and variances, other correlation sign."""
    z = normal(800, 2, 0)
    x = torch.stack([z[:400, 0], 0.9 * z[:400, 0] + 0.44 * z[:400, 1]], 1)
    y = torch.stack([z[400:, 0], -0.9 * z[400:, 0] + 0.44 * z[400:, 1]], 1)
    assert c2st(x, y, rng()).value > 0.75


def test_c2st_is_a_function_of_its_generator() -> None:
    x, y = normal(60, 2, 0), normal(60, 2, 1)
    np.random.seed(0)  # noqa: NPY002 - the global state must not matter
    first = c2st(x, y, rng(3))
    np.random.seed(1)  # noqa: NPY002
    assert c2st(x, y, rng(3)) == first
    with pytest.raises(ValueError, match="two sets"):
        c2st(x, y[:50], rng())


def test_digit_features_classify() -> None:
    task = digits_shuffled()
    assert task.labels is not None
    trained = FeatureClassifier.train(DIGITS, task.train, task.labels[0], 1)
    assert trained.features(task.test).shape == (447, 32)
    assert trained.accuracy(task.test, task.labels[2]).value > 0.96


@pytest.mark.parametrize("name", ["digits", "digits-shuffled", "digits-binary"])
def test_classifiers_of_digits_see_white_as_one(name: str) -> None:
    task = load_task(name)
    assert digit_features(task).design.white == float(task.train.max())


def test_digit_features_are_the_same_for_the_same_seed() -> None:
    task = digits_shuffled()
    assert task.labels is not None
    short = replace(DIGITS, epochs=2)
    before = torch.get_rng_state()
    trained = [FeatureClassifier.train(short, task.train, task.labels[0], seed) for seed in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), before)
    assert trained[0].sha256 == trained[1].sha256 != trained[2].sha256
    assert torch.equal(trained[0].features(task.test), trained[1].features(task.test))


# -- intervals


def test_the_t_interval_equals_scipy() -> None:
    x = [1.0, 2.0, 4.0, 3.5, 2.2]
    got = t_interval(x, 0.9)
    expected = stats.t.interval(0.9, 4, loc=np.mean(x), scale=stats.sem(x))
    assert got == pytest.approx(expected)
    assert all(math.isnan(end) for values in ([], [1.0], [1.0, 2.0]) for end in t_interval(values))


@pytest.mark.parametrize("n", [3, 5, 10])
def test_the_t_interval_has_its_nominal_coverage(n: int) -> None:
    draws = normal(4000, n, n).numpy()
    ends = np.array([t_interval(row) for row in draws])
    covered = ((ends[:, 0] < 0) & (ends[:, 1] > 0)).mean()
    assert covered == pytest.approx(0.95, abs=4 * math.sqrt(0.95 * 0.05 / 4000))
