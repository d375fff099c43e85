"""Sliced score matching's experiments against closed forms, quadrature, autograd and made-up files."""

from __future__ import annotations

import gzip
import itertools
import math
import struct
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from replicate.errors import UsageError
from replicate.experiments import Run
from replicate.ledger.claims import claims_of
from replicate.likelihood.ais import ais, schedule
from replicate.papers.ssm import PAPER, kernel, nice, objectives, tables
from replicate.runs.experiment import Experiment, Outcome
from replicate.runs.seeds import Streams
from replicate.score_based import matching
from replicate.score_based.networks import EnergyScore, FreeScore
from replicate.tasks.tables import read_columns, without_correlated

#: settings at which an experiment takes a second or less
TINY: Mapping[str, Mapping[str, Any]] = {
    "ssm-unbiased": {"dim": 3, "hidden": 8, "points": 4},
    "ssm-cost-counted": {"smallest": 2, "largest": 8, "hidden": 8, "batch": 4},
    "ssm-cost-timed": {"smallest": 2, "largest": 8, "hidden": 8, "batch": 4, "repeats": 1},
    "ssm-covariance": {"dim": 2, "examples": 100, "datasets": 30},
    "ssm-nice-mnist": {"hidden": 6, "depth": 1, "epochs": 1, "batch": 8, "test_images": 4},
    "ssm-nice-learning-rate": {"hidden": 6, "depth": 1, "epochs": 1, "validate_every": 1, "test_images": 5},
    "ssm-partition": {"dim": 3, "chains": 20, "temperatures": 10},
}
TINY_TABLE = {"inducing": 6, "hidden": 4, "steps": 2, "batch": 20, "validate_every": 1, "chains": 4, "temperatures": 2}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tiny(experiment: Experiment, seed: int = 0) -> Outcome:
    changes = TINY_TABLE if "table" in experiment.params else TINY[experiment.name]
    settings = {**experiment.settings(experiment.profiles[0]), **changes}
    assert settings.keys() == experiment.params.keys() | changes.keys()
    return experiment.measure(Run(settings, Streams(experiment.name, "ssm", seed), torch.device("cpu")))


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder with made-up images and tables, in the real files' formats."""
    monkeypatch.setenv("REPLICATE_DATA", str(tmp_path))
    monkeypatch.setattr("replicate.data.files.expected", lambda path: None)  # made-up content under real names
    rng = np.random.default_rng(0)
    (tmp_path / "mnist").mkdir()
    for part, count in (("train", 30), ("t10k", 6)):
        pixels = rng.integers(0, 256, (count, 4, 4), dtype=np.uint8)
        raw = struct.pack(">4i", 0x803, *pixels.shape) + pixels.tobytes()
        (tmp_path / "mnist" / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(raw))
    (tmp_path / "uci").mkdir()
    for source in tables.SOURCES.values():
        rows = rng.normal(size=(80, source.fields)).round(1)
        rows = np.concatenate([rows, rows[:20]])
        text = "\n".join(source.delimiter.join(map(str, row)) for row in rows)
        (tmp_path / source.file).write_text("header\n" + text + "\n")
    return tmp_path


# --- the contract ----------------------------------------------------------------------------------------------------


def test_claims_read_and_name_what_experiments_measure(data: Path) -> None:
    tables = [e for e in PAPER.experiments if "table" in e.params]  # one function: measured once
    found = {e.name: tiny(e) for e in PAPER.experiments if e not in tables[1:]}
    found |= {e.name: found[tables[0].name] for e in tables[1:]}
    for claim in claims_of(PAPER).claims:
        outcome = found[claim.experiment]
        plots = {plot.name for plot in outcome.plots}
        for metric in filter(None, (claim.measure, claim.minus, claim.over)):
            assert metric in outcome.estimates or (claim.needs and metric in outcome.missing), (claim.id, metric)
        assert set(claim.plots) <= plots, claim.id


@pytest.mark.parametrize("name", ["ssm-covariance", "ssm-nice-learning-rate", "ssm-partition", "ssm-cost-counted"])
def test_equal_seeds_give_equal_numbers(name: str) -> None:
    (experiment,) = (e for e in PAPER.experiments if e.name == name)
    first, second = (tiny(experiment, seed=3).estimates for _ in range(2))
    assert {k: e.value for k, e in first.items()} == {k: e.value for k, e in second.items()}


# --- the mean over projections ---------------------------------------------------------------------------------------


def test_all_signs_are_all_sign_vectors() -> None:
    """With an objective that returns its projection's binary number, each number comes once, for each x."""

    def numbered(score: matching.Score, x: Tensor, v: Tensor) -> Tensor:
        return ((v + 1) / 2 * torch.tensor([4.0, 2.0, 1.0], dtype=v.dtype)).sum(1) + 10 * x[:, 0]

    x = torch.tensor([[0.0, 0, 0], [1.0, 0, 0]], dtype=torch.float64)
    expected = torch.arange(8.0, dtype=torch.float64) + torch.tensor([[0.0], [10.0]], dtype=torch.float64)
    assert torch.equal(objectives.all_signs(numbered, lambda y: y, x), expected)


def test_unbiasedness_finds_a_wrong_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    """An objective with the square's factor 1/2 missing is off by more than the claim's tolerance."""

    def wrong(score: matching.Score, x: Tensor, v: Tensor) -> Tensor:
        return matching.sliced_score_matching(score, x, v) + 0.5 * (v * score(x)).sum(-1).square()

    right = tiny(objectives.unbiasedness).estimates["largest_error:ssm-free"].value
    monkeypatch.setitem(objectives.SLICED, "ssm", wrong)  # type: ignore[arg-type]
    assert right < 1e-12
    assert tiny(objectives.unbiasedness).estimates["largest_error:ssm-free"].value > 1e-3


# --- cost ------------------------------------------------------------------------------------------------------------


def test_operations_of_a_linear_score_are_counted_by_hand() -> None:
    """s = xW + b at batch n, D = d: products of n x d and d x d, the only ones there are."""
    n, d = 4, 8
    net = FreeScore(d, 0, 0)
    step = objectives.Step(net, torch.randn(n, d), torch.ones(n, d), torch.randn(n, d))  # type: ignore[arg-type]
    one = 2 * n * d * d
    assert objectives.operations(step, "dsm") == 2 * one  # forward; gradient in W
    assert objectives.operations(step, "ssm") == 5 * one  # forward, s'v; gradient in W through both and in x through s
    assert objectives.operations(step, "sm") == (3 + 2 * d) * one  # the same with d rows in place of s'v


def test_saved_bytes_count_each_tensor_once() -> None:
    """The graph of D second-order passes holds about D times that of one; equal calls give equal counts."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = EnergyScore(16, 8, 2, "softplus")
    x = torch.randn(4, 16, generator=generator())
    step = objectives.Step(net, x, torch.ones(4, 16), x)
    counts = {name: objectives.saved_bytes(step, name) for name in objectives.LABELS}
    assert counts == {name: objectives.saved_bytes(step, name) for name in objectives.LABELS}
    assert counts["dsm"] < counts["ssm"] < counts["sm"] / 4
    parameters = sum(p.numel() for p in net.parameters())
    assert counts["dsm"] > 4 * parameters * 0.5


def test_power_is_the_exponent() -> None:
    dims = [2, 4, 8, 16]
    assert objectives.power(dims, [3 * d**1.7 for d in dims]) == pytest.approx(1.7, abs=1e-12)


# --- asymptotic covariances ------------------------------------------------------------------------------------------


def test_exact_covariance_is_the_inverse_fisher_information() -> None:
    """Score matching of a Gaussian is maximum likelihood, with Cov(K_ij, K_kl) = K_ik K_jl + K_il K_jk."""
    k = objectives.precision_matrix(3)
    row, column = torch.triu_indices(3, 3)
    wishart = k[row][:, row] * k[column][:, column] + k[row][:, column] * k[column][:, row]
    torch.testing.assert_close(objectives.asymptotic_covariances(k).exact, wishart, rtol=1e-10, atol=1e-10)


def test_covariances_of_corollary_1_by_quadrature_and_autograd() -> None:
    """The gradients of the suite's own sliced objective, integrated over x by Gauss-Hermite and over all signs v."""
    k = objectives.precision_matrix(2)
    basis = objectives.symmetric_basis(2)
    theta = torch.stack([k[0, 0], k[0, 1], k[1, 1]])
    nodes, weights = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(8))
    z, w = torch.cartesian_prod(nodes, nodes), torch.cartesian_prod(weights, weights).prod(1) / (2 * math.pi)
    x = z @ torch.linalg.cholesky(torch.linalg.inv(k)).T

    def gradients(v: Tensor) -> Tensor:
        def value(t: Tensor) -> Tensor:
            kt = torch.einsum("a,aij->ij", t, basis)
            return matching.sliced_score_matching(lambda y: -y @ kt, x, v.expand_as(x))

        return torch.autograd.functional.jacobian(value, theta, create_graph=False)

    def hessian(t: Tensor) -> Tensor:
        kt = torch.einsum("a,aij->ij", t, basis)
        return (w * matching.implicit_score_matching(lambda y: -y @ kt, x)).sum()

    inverse = torch.linalg.inv(torch.autograd.functional.hessian(hessian, theta))
    signs = [torch.tensor(s, dtype=torch.float64) for s in itertools.product([-1.0, 1.0], repeat=2)]
    per_sign = [gradients(v) for v in signs]
    middle = sum(torch.einsum("n,na,nb->ab", w, g, g) for g in per_sign) / len(signs)
    pairs = torch.cartesian_prod(nodes, nodes)  # Gaussian projections: fourth moments need few nodes
    normal = sum(u * torch.einsum("n,na,nb->ab", w, g, g) for u, g in ((u, gradients(v)) for u, v in zip(w, pairs)))  # noqa: B905
    theory = objectives.asymptotic_covariances(k)
    torch.testing.assert_close(theory.sliced(1, gaussian=False), inverse @ middle @ inverse, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(theory.sliced(1, gaussian=True), inverse @ normal @ inverse, rtol=1e-8, atol=1e-8)


def test_exact_estimates_are_maximum_likelihood() -> None:
    x = torch.randn(4, 50, 3, generator=generator(), dtype=torch.float64)
    inverse = torch.linalg.inv(x.transpose(1, 2) @ x / 50)
    row, column = torch.triu_indices(3, 3)
    torch.testing.assert_close(objectives.exact_estimates(x), inverse[:, row, column], rtol=1e-9, atol=1e-9)


def test_normal_equations_are_the_gradient_of_the_suites_objective() -> None:
    x, v = (torch.randn(2, 20, 3, generator=generator(s), dtype=torch.float64) for s in (0, 1))
    theta = torch.randn(6, generator=generator(2), dtype=torch.float64).requires_grad_(True)
    k = torch.einsum("a,aij->ij", theta, objectives.symmetric_basis(3))
    loss = matching.sliced_score_matching(lambda y: -y @ k, x[1], v[1]).mean()
    (gradient,) = torch.autograd.grad(loss, theta)
    g, h = objectives.normal_equations(x, v)
    torch.testing.assert_close(g[1] @ theta.detach() - h[1], gradient)


# --- NICE ------------------------------------------------------------------------------------------------------------


def small_nice(dim: int = 4) -> nice.NICE:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nice.NICE(dim, 5, 2).double()
        torch.nn.init.normal_(net.log_scale, std=0.3)
    return net


def test_nice_density_is_the_change_of_variables() -> None:
    net, x = small_nice(), torch.randn(3, 4, generator=generator(), dtype=torch.float64)
    normal = scipy.stats.multivariate_normal(np.zeros(4))
    for row, value in zip(x, net.log_prob(x), strict=True):
        jacobian = torch.autograd.functional.jacobian(lambda y: net(y[None])[0], row)
        expected = normal.logpdf(net(row[None])[0].detach().numpy()) + torch.linalg.slogdet(jacobian)[1].item()
        assert value.item() == pytest.approx(expected, abs=1e-10)


def test_every_dimension_of_nice_moves_by_the_others() -> None:
    jacobian = torch.autograd.functional.jacobian(
        lambda y: small_nice(6)(y[None])[0], torch.zeros(6, dtype=torch.float64)
    )
    assert bool((jacobian.abs() > 1e-8).all())


def test_nice_score_matching_loss_is_the_suites() -> None:
    net, x = small_nice(), torch.randn(5, 4, generator=generator(), dtype=torch.float64)
    expected = matching.implicit_score_matching(net.score, x)
    torch.testing.assert_close(nice.score_matching_loss(net, x, 2), expected.detach(), rtol=1e-10, atol=1e-10)


def test_logits_of_levels() -> None:
    """Noise spans one level, the ends are clipped, and the mean stays at the level."""
    x = torch.tensor([0.0, 128.0, 255.0]).repeat(20_000, 1)
    pixels = torch.sigmoid(nice.to_logits(x, 256, generator()))
    assert pixels.min().item() == pytest.approx(nice.CLIP, rel=1e-3)
    assert pixels.max().item() == pytest.approx(1 - nice.CLIP, rel=1e-3)
    middle = pixels[:, 1]
    assert (middle.max() - middle.min()).item() == pytest.approx(1 / 256, rel=1e-2)
    assert middle.mean().item() == pytest.approx(128 / 255, abs=1e-4)


def test_idx_files_are_read(data: Path) -> None:
    images = nice.mnist(generator())
    assert [len(part) for part in images[:3]] == [27, 3, 6]
    everything = torch.cat([images.train, images.validation]).sum(1).sort().values
    raw = np.frombuffer(gzip.decompress((data / "mnist" / "train-images-idx3-ubyte.gz").read_bytes())[16:], np.uint8)
    assert torch.equal(everything, torch.from_numpy(raw.reshape(30, 16).astype(np.float32)).sum(1).sort().values)


@pytest.mark.parametrize("experiment", [nice.table_1, tables.FIGURE_1[1]])
def test_missing_data_is_one_clear_line(
    experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REPLICATE_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(UsageError, match="is missing: REPLICATE_DATA=") as caught:
        experiment.measure(Run(experiment.params, Streams("t", "ssm", 0), torch.device("cpu")))
    assert "\n" not in str(caught.value)


# --- deep kernel exponential family ----------------------------------------------------------------------------------


FIGURE = ("sm", "ssm", "ssm-vr", "dsm")


@pytest.fixture
def family() -> kernel.DeepKernelFamily:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kernel.DeepKernelFamily(torch.randn(5, 3), 4).double()
        torch.nn.init.normal_(model.alpha)
        torch.nn.init.normal_(model.mixing)
    return model


def score(family: kernel.DeepKernelFamily, x: Tensor) -> Tensor:
    """Return grad_x log p (n, D) by the derivatives along all coordinate directions."""
    directions = kernel.coordinate_directions(x)
    return family.kernels(x, directions, 0).first(family.alpha) - x / kernel.BASE_VARIANCE


def test_derivatives_along_directions_are_autograds(family: kernel.DeepKernelFamily) -> None:
    x, v = (torch.randn(2, 3, generator=generator(s), dtype=torch.float64) for s in (0, 1))
    first, second = family.kernels(x, v[:, None], 1).expansion()
    for i, m in itertools.product(range(2), range(5)):

        def along(t: Tensor, i: int = i, m: int = m) -> Tensor:
            nowhere = torch.zeros(1, 0, 3, dtype=torch.float64)
            return family.kernels(x[i : i + 1] + t * v[i], nowhere, 0).each.sum(0)[0, m]

        at = torch.zeros((), dtype=torch.float64)
        assert first[i, 0, m].item() == pytest.approx(torch.autograd.functional.jacobian(along, at).item(), abs=1e-10)
        assert second[i, m].item() == pytest.approx(torch.autograd.functional.hessian(along, at).item(), abs=1e-10)


def test_second_derivatives_are_summed_over_the_last_directions(family: kernel.DeepKernelFamily) -> None:
    x = torch.randn(2, 3, generator=generator(1), dtype=torch.float64)
    v = torch.randn(2, 4, 3, generator=generator(4), dtype=torch.float64)
    each = [family.kernels(x, v[:, k : k + 1], 1).expansion()[1] for k in (2, 3)]
    torch.testing.assert_close(family.kernels(x, v, 2).expansion()[1], sum(each), rtol=1e-10, atol=1e-10)


def test_quadratic_forms_are_the_suites_objectives(family: kernel.DeepKernelFamily) -> None:
    """Each objective as a function of alpha equals the suite's on the same score and the same draws."""
    x = torch.randn(7, 3, generator=generator(5), dtype=torch.float64)
    v = matching.rademacher(x, generator(9))
    z = torch.randn(x.shape, generator=generator(9), dtype=torch.float64)
    expected = {
        "sm": (kernel.exact, matching.implicit_score_matching(partial(score, family), x)),
        "ssm": (kernel.sliced, matching.sliced_score_matching(partial(score, family), x, v)),
        "ssm-vr": (kernel.sliced_vr, matching.sliced_score_matching_vr(partial(score, family), x, v)),
        "dsm": (kernel.denoising(0.3), matching.denoising_score_matching(partial(score, family), x, 0.3, z)),
    }
    for objective, value in expected.values():
        mean = kernel.mean_objective(family, objective(x, generator(9)), family.alpha)
        torch.testing.assert_close(mean, value.mean(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", FIGURE)
def test_the_form_differs_from_the_objective_by_a_constant(family: kernel.DeepKernelFamily, name: str) -> None:
    x = torch.randn(7, 3, generator=generator(5), dtype=torch.float64)
    slices = tables.objectives(0.3)[name](x, generator(9))
    form = kernel.quadratic(family, slices)
    alphas = (family.alpha, family.alpha.square(), torch.zeros_like(family.alpha))
    gaps = [(kernel.mean_objective(family, slices, alpha) - form(alpha)).item() for alpha in alphas]
    assert gaps == pytest.approx([gaps[-1]] * len(gaps), abs=1e-10)


@pytest.mark.parametrize("name", FIGURE)
def test_the_gradient_through_alpha_is_autograds(family: kernel.DeepKernelFamily, name: str) -> None:
    fitted, judged = (
        tables.objectives(0.3)[name](torch.randn(7, 3, generator=generator(s), dtype=torch.float64), generator(s))
        for s in (5, 6)
    )
    alpha = kernel.quadratic(family, fitted).minimiser(family.log_ridge)
    parameters = list(family.parameters())
    expected = torch.autograd.grad(kernel.mean_objective(family, judged, alpha), parameters)
    kernel.loss_through_alpha(family, fitted, judged).backward()
    for parameter, gradient in zip(parameters, expected, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-8, atol=1e-8)


def test_score_is_the_gradient_of_the_log_density(family: kernel.DeepKernelFamily) -> None:
    x = torch.randn(4, 3, generator=generator(), dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(family.log_density(x).sum(), x)
    torch.testing.assert_close(score(family, x), gradient, rtol=1e-8, atol=1e-8)


def test_state_of_a_chain_is_not_evaluated_again(family: kernel.DeepKernelFamily) -> None:
    evaluated = []

    def log_density(x: Tensor) -> Tensor:
        evaluated.append(x)
        return family.log_density(x)

    x, y, z = (torch.randn(4, 3, generator=generator(s), dtype=torch.float64) for s in range(3))
    accepted = torch.tensor([True, False, False, True])
    state = torch.where(accepted[:, None], y, x)
    found = tables.Evaluated(log_density)
    # a step: state, proposal, next state; then a step whose proposals are all rejected
    for point, evaluations in ((x, 1), (y, 2), (state, 2), (z, 3), (state.clone(), 3), (x, 4)):
        torch.testing.assert_close(found(point)[0], family.log_density(point).detach())
        torch.testing.assert_close(found(point)[1], score(family, point).detach(), rtol=1e-8, atol=1e-8)
        assert len(evaluated) == evaluations


def test_minimiser_has_no_slope() -> None:
    a = torch.randn(4, 4, generator=generator(), dtype=torch.float64)
    form = kernel.Quadratic(a @ a.T, a[0])
    alpha = form.minimiser(torch.tensor(-1.0, dtype=torch.float64)).requires_grad_(True)
    (slope,) = torch.autograd.grad(form(alpha) + 0.05 * alpha.square().sum(), alpha)
    assert slope.abs().max().item() < 1e-12


def test_chunks_do_not_change_a_mean(family: kernel.DeepKernelFamily, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(11, 3, generator=generator(), dtype=torch.float64)
    slices = kernel.exact(x, generator())
    whole = (*kernel.quadratic(family, slices), kernel.mean_objective(family, slices, family.alpha))
    monkeypatch.setattr(kernel, "CHUNK", 4)
    form = kernel.quadratic_over(family, kernel.exact, x, generator())
    mean = kernel.objective_over(family, kernel.exact, x, family.alpha, generator())
    for a, b in zip((*form, torch.tensor(mean, dtype=torch.float64)), whole, strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", list(tables.SOURCES))
def test_tables_are_white_and_copies_stay_together(data: Path, name: str) -> None:
    rows = read_columns(tables.SOURCES[name])
    rest, test = tables.hold_out(rows, generator(1))
    assert sorted([*rest, *test]) == list(range(len(rows)))
    assert not {tuple(r) for r in rows[rest]} & {tuple(r) for r in rows[test]}
    table = tables.load_table(name, generator())
    together = torch.cat(list(table))
    assert len(together) == len(rows)
    assert together.mean(0).abs().max().item() < 0.05
    cov = torch.cov(together.T)
    torch.testing.assert_close(cov, torch.eye(len(cov), dtype=cov.dtype), rtol=0, atol=0.05)


def test_correlated_columns_go() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 500))
    rows = np.stack([a, b, -a + 0.01 * rng.normal(size=500)], 1)
    np.testing.assert_array_equal(without_correlated(rows), rows[:, 1:])


# --- log Z -----------------------------------------------------------------------------------------------------------


def test_log_z_of_a_gaussian_by_both_estimators() -> None:
    """f = exp(-|x|^2 / 2) has log Z = D / 2 log(2 pi)."""
    path = tables.GaussianPath(2, 2.0, lambda x: -0.5 * x.square().sum(1), lambda x: -x, 0.5)
    truth = math.log(2 * math.pi)
    assert ais(path, 500, schedule(50), generator()).log_z.value == pytest.approx(truth, abs=0.05)
    log_z, ess_share = tables.importance_log_z(path, 20_000, generator())
    assert log_z == pytest.approx(truth, abs=0.05)
    # w = exp(-x^2 / 4) under N(0, 2): E[w]^2 / E[w^2] = (1/2) / (1/sqrt 3) a dimension
    assert ess_share == pytest.approx((math.sqrt(3) / 2) ** 2, abs=0.02)


def test_mixture_is_white_and_normalised() -> None:
    density = tables.whitened_mixture(2, 3, generator())
    cov = density.covariance + density.means.T @ (density.weights[:, None] * density.means)
    torch.testing.assert_close(cov, torch.eye(2, dtype=cov.dtype))
    axis = torch.linspace(-6, 6, 601, dtype=torch.float64)
    mass = density.log_prob(torch.cartesian_prod(axis, axis)).exp().sum().item() * 0.02**2
    assert mass == pytest.approx(1, abs=1e-6)
