"""The comparison's parts against scipy, enumeration and closed forms; each experiment once, tiny."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

from replicate.experiments import Experiment, Run
from replicate.experiments.ica import Ica
from replicate.experiments.planar import BOX
from replicate.ledger.claims import claims_of
from replicate.papers.song_kingma import PAPER, bias, comparison
from replicate.resume import Journal, State
from replicate.runs.checkpoint import pack, unpack
from replicate.runs.experiment import Outcome
from replicate.runs.seeds import Streams
from replicate.tasks.densities import GaussianMixture

LINE = np.linspace(-6, 6, 41)
TINY = {"updates": 2, "samples": 40, "test_examples": 40, "grid": 40, "examples": 100}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def run(experiment: Experiment, **changed: object) -> Outcome:
    known = {k: v for k, v in {**TINY, **changed}.items() if k in experiment.params}
    settings = {**experiment.settings("smoke"), **known}
    return experiment.measure(Run(settings, Streams(experiment.name, "song_kingma", 0), torch.device("cpu")))


@pytest.mark.parametrize("name", list(comparison.DENSITIES))
def test_the_modes_regions_have_the_weights_of_samples(name: str) -> None:
    density = comparison.DENSITIES[name]()
    assert density.half_width < BOX
    x = density.sample(40_000, generator())
    share = torch.bincount(density.mode_of(x)).double() / len(x)
    masses = comparison.mode_masses(density, density.log_prob, 120, "cpu")
    torch.testing.assert_close(masses, share, rtol=0, atol=0.01)


def test_the_mode_error_of_wrong_weights_is_their_difference() -> None:
    density = comparison.far_gaussians()
    half = GaussianMixture(density.means, density.covariance, torch.ones(2))
    assert comparison.mode_error(density, lambda x: -half.log_prob(x), 120, "cpu").value == pytest.approx(0.3, abs=1e-6)
    assert comparison.mode_error(density, lambda x: -density.log_prob(x), 120, "cpu").value == pytest.approx(
        0.0, abs=1e-9
    )


def test_metropolis_is_a_reversible_transition_matrix() -> None:
    log_p = np.log(bias.skewed(LINE))
    kernel, p = bias.metropolis(log_p, LINE, 0.7), np.exp(log_p)
    assert (kernel >= 0).all()
    np.testing.assert_allclose(kernel.sum(1), 1, rtol=1e-12)
    flow = p[:, None] * kernel
    np.testing.assert_allclose(flow, flow.T, atol=1e-15)


def test_the_fixed_point_of_many_moves_is_maximum_likelihood_and_of_few_is_not() -> None:
    p = bias.skewed(LINE)

    def negative_log_likelihood(theta: np.ndarray) -> float:
        return float(-(p @ bias.log_mass(theta, LINE)))

    best = minimize(negative_log_likelihood, np.array([0.0, -0.3]), method="BFGS", options={"gtol": 1e-9}).x
    np.testing.assert_allclose(bias.fixed_point(p, LINE, 600, 0.9), best, rtol=1e-5, atol=1e-6)
    lost = [negative_log_likelihood(bias.fixed_point(p, LINE, k, 0.9)) for k in (1, 4, 16)]
    assert lost[0] > lost[1] > lost[2] > negative_log_likelihood(best)


def test_there_is_no_bias_where_the_data_are_the_model() -> None:
    theta = np.array([0.4, -0.6])
    p = np.exp(bias.log_mass(theta, LINE))
    np.testing.assert_allclose(bias.fixed_point(p, LINE, 1, 0.7), theta, atol=1e-7)


def test_the_ica_energy_is_minus_lsd_s_log_density() -> None:
    m, z = (torch.randn(n, 3, dtype=torch.float64, generator=generator(n)) for n in (3, 9))
    model = comparison.IcaModel(m)
    torch.testing.assert_close(model.energy(z).detach(), -Ica(m).log_prob(z))  # normalised where it starts
    assert float(model.log_z().detach()) == 0.0
    model.m.data.mul_(2.0)
    torch.testing.assert_close((-model.energy(z) - model.log_z()).detach(), Ica(2 * m).log_prob(z))


def test_evaluations_are_counted_and_change_nothing() -> None:
    settings = comparison.Settings(flow_steps=1)
    objective = comparison.objective_of("pcd", 2, settings)
    x = torch.randn(256, 2, generator=generator())
    objective.prepare(x, generator(1))
    before = objective.state.clone()

    def energy(x: Tensor) -> Tensor:
        return 0.5 * x.square().sum(1)

    # 5 adjusted moves of two evaluations each, or 10 unadjusted ones of one, then data and chains
    assert comparison.evaluations(objective, energy, x) == 12
    assert torch.equal(objective.state, before)
    short = comparison.objective_of("short-run", 2, settings)
    short.prepare(x, generator(1))
    assert comparison.evaluations(short, energy, x) == 12


@pytest.mark.parametrize("experiment", PAPER.experiments[:4], ids=lambda e: e.name)
def test_experiments_run_repeat_and_measure_what_claims_ask(experiment: Experiment) -> None:
    first, second = run(experiment), run(experiment)
    timeless = [{k: e for k, e in o.estimates.items() if not k.startswith("time_")} for o in (first, second)]
    assert str(timeless[0]) == str(timeless[1])
    assert all(math.isfinite(e.value) for e in first.estimates.values())
    drawn = {plot.name for plot in first.plots}
    claims = [c for c in claims_of(PAPER).claims if c.experiment == experiment.name]
    assert claims
    for claim in claims:
        for measure in filter(None, (claim.measure, claim.minus, claim.over)):
            assert measure in first.estimates, claim.id
        assert set(claim.plots) <= drawn
    assert drawn <= {p for c in claims for p in c.plots}


class Killed(BaseException):
    """Stands for kill -9."""


@pytest.mark.parametrize("variant", ["pcd-jump", "flow-nce"])
@pytest.mark.parametrize("last", [2, 7])
def test_killed_training_resumes_bit_for_bit(variant: str, last: int) -> None:
    """Chains, the noise that was fitted and the learned log Z are all in the checkpoint."""
    settings = {**comparison.PLANE.settings("smoke"), **TINY, "updates": 6, "flow_steps": 4}
    saved: list[bytes] = []

    def study() -> dict[str, float]:
        run = Run(settings, Streams("energies-plane", "song_kingma", 0), torch.device("cpu"))
        data = comparison.crescent().sample(100, run.stream("data"))
        comparison.study_plane(variant, run, comparison.PlaneSettings(**settings), comparison.crescent(), data)
        return {k: e.value for k, e in run.estimates.items() if not k.startswith("time_")}

    def write(state: State) -> None:
        saved.append(pack(state))
        if len(saved) == last:
            raise Killed

    with Journal(write, every=0, shortest=0).active(), pytest.raises(Killed):
        study()
    with Journal(lambda state: None, unpack(saved[-1]), every=0, shortest=0).active():
        again = study()
    assert again == study()


def test_every_consistent_method_has_a_bar() -> None:
    judged = {c.measure for c in claims_of(PAPER).claims if c.experiment == "energies-plane" and not c.minus}
    assert {f"kl:{m}" for m in ("ml", "pcd", "ism", "dsm", "ssm", "nce", "cnce", "ksd", "flow-nce")} <= judged
