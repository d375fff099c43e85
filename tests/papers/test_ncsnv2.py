"""NCSNv2's equations against scipy, simulation and brute force; its experiments at tiny size."""

import lzma
import math

import numpy as np
import pytest
import torch
from scipy import stats

from replicate.errors import UsageError
from replicate.experiments import Experiment, Run
from replicate.experiments.noise_schedules import geometric_levels
from replicate.ledger.claims import claims_of
from replicate.papers.ncsnv2 import PAPER, techniques
from replicate.papers.ncsnv2.techniques import (
    IMAGE_FILE,
    SETTINGS,
    first_level,
    last_step,
    levels_at,
    mixture_score,
    overlap_of,
    pairwise_distances,
    ratio_at,
    read_images,
    solve_levels,
    solve_step_size,
    step_size_for,
    variance_ratio,
)
from replicate.runs.experiment import Outcome
from replicate.runs.seeds import Streams


def measured(experiment: Experiment, **changes: float) -> Outcome:
    settings = {**experiment.settings("standard"), **changes}
    return experiment.measure(Run(settings, Streams(experiment.name, "ncsnv2", 0), torch.device("cpu")))


@pytest.mark.parametrize("ratio", [1.01, 1.0376, 1.08])
def test_overlap_is_the_mass_of_the_shell(ratio: float) -> None:
    dim = 3072
    # exact law of the radius at the lower level: chi; the paper's normal approximation errs by about 1 / sqrt(dim)
    centre, sd = ratio * math.sqrt(dim), ratio / math.sqrt(2)
    exact = stats.chi(dim).cdf(centre + 3 * sd) - stats.chi(dim).cdf(centre - 3 * sd)
    assert overlap_of(ratio, dim) == pytest.approx(exact, abs=0.02)


def test_levels_and_ratio_invert_each_other() -> None:
    for setting in SETTINGS.values():
        assert overlap_of(ratio_at(0.3, setting.dim), setting.dim) == pytest.approx(0.3, abs=1e-10)
        implied = overlap_of(setting.ratio, setting.dim)
        assert levels_at(implied, setting) == pytest.approx(setting.levels, rel=1e-6)


def test_half_overlap_has_a_closed_form() -> None:
    # at gamma with sqrt(2D)(gamma - 1) = 3 gamma the second Phi is 1/2 and the first is 1 within 1e-9
    for setting in SETTINGS.values():
        root = math.sqrt(2 * setting.dim)
        gamma = root / (root - 3)
        assert ratio_at(0.5, setting.dim) == pytest.approx(gamma, abs=1e-8)


@pytest.mark.parametrize(("fraction", "steps"), [(0.06, 5), (0.3, 3), (0.9, 1)])
def test_variance_ratio_is_the_chains_recursion(fraction: float, steps: int) -> None:
    variance = 1.04**2
    for _ in range(steps):
        variance = (1 - fraction) ** 2 * variance + 2 * fraction
    assert variance_ratio(fraction, 1.04, steps) == pytest.approx(variance, rel=1e-12)


def test_step_size_is_the_best_of_a_fine_grid() -> None:
    for setting in SETTINGS.values():
        grid = np.geomspace(1e-4, 0.5, 20_001)
        values = [abs(variance_ratio(f, setting.ratio, setting.steps) - 1) for f in grid]
        assert step_size_for(setting) / setting.end**2 == pytest.approx(grid[int(np.argmin(values))], rel=2e-3)


def test_mixture_score_is_the_gradient_of_its_log_density() -> None:
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(7, 5, generator=generator, dtype=torch.float64)
    x = torch.rand(3, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    sigma = torch.tensor([0.2, 0.5, 3.0], dtype=torch.float64)
    kernel = torch.distributions.Independent(torch.distributions.Normal(images, sigma[:, None, None]), 1)
    (score,) = torch.autograd.grad(kernel.log_prob(x[:, None]).logsumexp(1).sum(), x)
    torch.testing.assert_close(mixture_score(images, x.detach(), sigma), score)


def test_pairwise_distances_are_scipys() -> None:
    from scipy.spatial.distance import pdist

    x = torch.rand(23, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    np.testing.assert_allclose(np.sort(pairwise_distances(x, block=5)), np.sort(pdist(x.numpy())), atol=1e-12)


def test_geometric_levels_have_the_given_ends_and_ratio() -> None:
    sigmas = geometric_levels(50.0, 0.01, 232)
    assert sigmas[0] == pytest.approx(50)
    assert sigmas[-1] == pytest.approx(0.01)
    assert sigmas[0] / sigmas[1] == pytest.approx(SETTINGS["cifar10"].ratio)


def test_first_level_on_random_images(monkeypatch) -> None:
    # eight clusters of four: levels from far out visit all, those from 0.3 keep near the middle of the cube
    generator = torch.Generator().manual_seed(3)
    centres = (torch.rand(8, 1, 48, generator=generator) > 0.5).float()
    images = (centres + 0.01 * torch.randn(8, 4, 48, generator=generator)).flatten(0, 1)
    tiny = {"samples": 40, "sigma_large": 6.0, "sigma_small": 0.3, "levels": 60, "ncsn_steps": 5}
    monkeypatch.setattr(techniques, "read_images", lambda: images)
    outcome = measured(first_level, **tiny)
    found = outcome.estimates
    data = found["pairwise_distance:data"].value
    assert found["pairwise_distance:large"].value == pytest.approx(data, rel=0.15)
    assert outcome.plots[0].as_dict()["lines"]
    for claim in claims_of(PAPER).claims:
        if claim.experiment == first_level.name:
            assert found[claim.measure].unit == claim.unit


@pytest.mark.parametrize("case", ["unset", "absent", "other"])
def test_missing_images_are_named_in_one_line(case: str, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("REPLICATE_DATA", str(tmp_path))
    if case == "unset":
        monkeypatch.delenv("REPLICATE_DATA")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if case == "other":
        (tmp_path / "cifar-10").mkdir()
        (tmp_path / IMAGE_FILE).write_bytes(b"not images")
    with pytest.raises(UsageError) as error:
        measured(first_level)
    message = str(error.value)
    assert "\n" not in message
    words = ("10 bytes", "are expected") if case == "other" else ("REPLICATE_DATA", "cs.toronto.edu")
    for word in ("cifar-10/test_batch.bin", "replicate data fetch", *words):
        assert word in message


@pytest.mark.parametrize("packed", [False, True])
def test_images_are_read_past_their_labels(packed: bool, tmp_path, monkeypatch) -> None:
    rows = np.arange(2 * 3073, dtype=np.uint64).astype(np.uint8).reshape(2, 3073)
    (tmp_path / "cifar-10").mkdir()
    data, suffix = (lzma.compress(rows.tobytes()), ".xz") if packed else (rows.tobytes(), "")
    (tmp_path / (IMAGE_FILE + suffix)).write_bytes(data)
    monkeypatch.setenv("REPLICATE_DATA", str(tmp_path))
    monkeypatch.setattr("replicate.data.files.expected", lambda path: None)  # made-up content under real names
    np.testing.assert_allclose(read_images(), rows[:, 1:] / 255, atol=1e-7)


def test_last_step_on_a_barely_trained_model() -> None:
    outcome = measured(last_step, samples=120, training_steps=3)
    assert outcome.estimates["frechet:plain"].n == 120
    assert 0 <= outcome.estimates["pixels_changed"].value <= 1
    lines = {line.label: line for line in outcome.plots[0].lines}
    # where the chain ends early, noise is visible and the last step must help
    assert lines["denoised samples"].y[0] < lines["plain samples"].y[0]


@pytest.mark.parametrize("experiment", [solve_levels, solve_step_size], ids=lambda e: e.name)
def test_solved_equations_repeat_and_measure_their_claims(experiment: Experiment) -> None:
    found = measured(experiment)
    assert found.estimates == measured(experiment).estimates
    assert found.plots[0].as_dict()["lines"]
    for claim in claims_of(PAPER).claims:
        if claim.experiment == experiment.name:
            assert found.estimates[claim.measure].unit == claim.unit
