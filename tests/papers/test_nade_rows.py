"""Rows of NADE, order-agnostic NADE and MADE on static bits: on a few made-up images, killed and resumed."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers.image_data import STATIC, bits, small_images
from helpers.sessions import Sitting, found
from scipy.special import logsumexp

from baselines.made import MaskedAutoencoder
from replicate.experiments import Experiment, Paper, Run, image_rows
from replicate.ledger.claims import claims_of
from replicate.model import DataInfo, Estimate
from replicate.papers import germain, larochelle, uria
from replicate.papers.uria.ensembles import ensembles
from replicate.runs.experiment import Outcome
from replicate.runs.seeds import Streams
from replicate.tasks.images import mnist_static

__all__ = ["small_images"]
PAPERS: tuple[Paper, ...] = (larochelle.PAPER, uria.PAPER, germain.PAPER)
EXPERIMENTS = [(paper, experiment) for paper in PAPERS for experiment in paper.experiments]
LABELS = [experiment.name for _, experiment in EXPERIMENTS]
#: what each experiment shrinks to, where it has the setting
TINY: dict[str, Any] = {
    "hidden": 4,
    "masks": 2,
    "orderings": 4,
    "steps": 6,
    "batch_size": 20,
    "validate_every": 2,
    "warmup": 0,
    "epochs": 3,
    "patience": 2,
}


def new_run(experiment: Experiment, seed: int = 0, **changes: object) -> Run:
    params = {k: TINY.get(k, v) for k, v in experiment.params.items()} | changes
    return Run(params, Streams(experiment.name, "t", seed), torch.device("cpu"))


def larger_ensembles(experiment: Experiment) -> set[str]:
    """Metrics that an experiment has at full size and not here."""
    return {f"nll:{2**i}" for i in range(20) if TINY["orderings"] < 2**i <= experiment.params.get("orderings", 0)}


@pytest.mark.usefixtures("small_images")
@pytest.mark.parametrize(("paper", "experiment"), EXPERIMENTS, ids=LABELS)
def test_a_row_is_measured_as_its_claims_name_it_and_killed_twice_ends_with_the_same_bits(
    paper: Paper, experiment: Experiment
) -> None:
    def run() -> Outcome:
        return experiment.measure(new_run(experiment))

    undisturbed = Sitting()
    want = undisturbed.outcome(run)
    assert want is not None
    part = math.ceil(0.35 * undisturbed.count)
    first = Sitting(last=part)
    assert first.outcome(run) is None
    second = Sitting(first.kept, last=part)
    assert second.outcome(run) is None
    rest = Sitting(second.kept)
    outcome = rest.outcome(run)
    assert outcome is not None
    assert found(outcome) == found(want)
    assert torch.equal(outcome.examples["mnist-static"].values, want.examples["mnist-static"].values)
    assert first.count + second.count + rest.count == undisturbed.count
    # exact, of every test image, and near 784 bits of which a fifth is 1
    exact = want.examples["mnist-static"]
    assert exact.kind == "exact"
    assert exact.values.shape == (STATIC,)
    for claim in claims_of(paper).claims:
        if claim.experiment == experiment.name:
            assert {claim.measure, claim.minus} <= {"", *want.estimates, *larger_ensembles(experiment)}
            assert set(claim.plots) <= {plot.name for plot in want.plots}
    entropy = -784 * (0.2 * math.log(0.2) + 0.8 * math.log(0.8))
    for estimate in want.estimates.values():
        assert estimate.kind == "exact"
        assert estimate.value == pytest.approx(entropy, rel=0.2)
    assert -float(exact.mean().value) == min(e.value for e in want.estimates.values())


@pytest.mark.parametrize("paper", PAPERS, ids=lambda p: p.key)
def test_claims_read_and_name_what_the_experiments_have(paper: Paper) -> None:
    names = {e.name for e in paper.experiments}
    for claim in claims_of(paper).claims:
        assert claim.profile == "full"
        assert claim.needs
        for measure in filter(None, (claim.measure, claim.minus)):
            assert "/" not in measure or measure.split("/")[0] in names
    assert names == {c.experiment for c in claims_of(paper).claims if c.experiment}


def test_rows_at_the_papers_size_require_a_gpu_and_the_short_one_does_not() -> None:
    for _, experiment in EXPERIMENTS:
        assert experiment.profiles == ("full",)
        assert experiment.seeds == 3
        assert bool(experiment.cuda_minutes) == (experiment is not germain.train_short)


@pytest.mark.usefixtures("small_images")
def test_rows_limits_every_part() -> None:
    fit, valid, test = image_rows.splits(mnist_static(), 7, torch.device("cpu"))
    assert len(fit) == len(valid) == len(test) == 7
    assert torch.equal(fit, bits(STATIC)[:7])


def test_ensembles_are_means_of_densities_of_disjoint_groups() -> None:
    log_p = torch.randn(5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    got = ensembles(log_p)
    assert list(got) == [1, 2, 4, 8]
    torch.testing.assert_close(got[1], log_p.mean(1))
    for k in (2, 8):
        groups = [logsumexp(log_p[:, i : i + k].numpy(), axis=1) - math.log(k) for i in range(0, 8, k)]
        torch.testing.assert_close(got[k], torch.from_numpy(sum(groups) / len(groups)))


def test_adagrad_is_the_released_codes() -> None:
    p = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    sums, want, squares = [torch.zeros_like(p)], [1.0, 2.0], [0.0, 0.0]
    for gradient in ([3.0, -0.5], [1.0, 0.0], [-2.0, 1e-4]):
        p.grad = torch.tensor(gradient, dtype=torch.float64)
        germain.adagrad_step([p], sums, 0.1)
        for i, g in enumerate(gradient):
            squares[i] += g * g
            want[i] -= 0.1 * g / math.sqrt(squares[i] + 1e-6)
    assert p.tolist() == pytest.approx(want, rel=1e-12)


def test_training_ends_when_patience_does_and_leaves_the_best_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Validation NLLs are made up: the third epoch is best, and two after it are no better."""
    nll = iter([9.0, 8.0, 7.0, 7.5, 7.0])
    kept: list[dict[str, torch.Tensor]] = []

    def made_up(model: MaskedAutoencoder, x: torch.Tensor, chunk: int) -> torch.Tensor:
        kept.append({k: v.clone() for k, v in model.state_dict().items()})
        return torch.tensor([-next(nll)])

    monkeypatch.setattr(germain, "log_prob", made_up)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MaskedAutoencoder(DataInfo(6, "bits", 2), 5, masks=3)
    what = new_run(germain.ROWS[0], epochs=50, batch_size=20)
    curve = germain.fit(model, bits(40, 6), bits(10, 6, 1), what, germain.Settings(**what.settings))
    assert curve == [(1, 9.0), (2, 8.0), (3, 7.0), (4, 7.5), (5, 7.0)]
    assert all(torch.equal(v, kept[2][k]) for k, v in model.state_dict().items())
    assert not torch.equal(kept[2]["output.weight"], kept[4]["output.weight"])


@pytest.mark.usefixtures("small_images")
def test_the_same_seed_gives_the_same_bits_and_another_others() -> None:
    def nll(seed: int) -> Estimate:
        return germain.train_short.measure(new_run(germain.train_short, seed)).estimates["nll"]

    assert nll(0) == nll(0)
    assert nll(0) != nll(1)
