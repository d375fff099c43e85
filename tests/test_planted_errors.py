"""The ledger catches what public code got wrong: with an error planted, the claim that guards against it fails.

Each test first shows the claim reproduced at the same small size, so that it is the planted error that fails it.
"""

from collections.abc import Callable, Mapping
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor

from replicate.ledger.claims import claims_of
from replicate.likelihood import importance
from replicate.papers.burda.bounds import LinearGaussian
from replicate.papers.ncsn import langevin
from replicate.papers.salakhutdinov import annealing
from replicate.papers.textbook.notebooks import RealNVP
from replicate.report.ledger import criterion_of
from replicate.report.records import MEASUREMENT_COLUMNS
from replicate.report.verdicts import Judgement, Measured, judge
from replicate.runs.experiment import Run
from replicate.runs.paper import find_experiment, papers
from replicate.runs.seeds import Streams


def verdict(paper: str, claim_id: str, seeds: int = 3, **settings: Any) -> Judgement:
    """Run a claim's experiment over seeds, at other settings where given, and judge the claim on it alone."""
    claim = next(c for c in claims_of(papers()[paper]).claims if c.id == claim_id)
    experiment = find_experiment(paper, claim.experiment)
    params: Mapping[str, Any] = {**experiment.settings("standard"), **settings}
    rows = []
    for seed in range(1 if experiment.seeds == 1 else seeds):
        outcome = experiment.measure(Run(params, Streams(experiment.name, paper, seed), torch.device("cpu")))
        for metric, e in outcome.estimates.items():
            head = (str(seed), experiment.name, paper, experiment.family, seed, "test", metric)
            rows.append((*head, e.value, e.stderr, e.kind, e.unit, e.n, "ok", "cpu", ""))
    frame = pd.DataFrame(rows, columns=list(MEASUREMENT_COLUMNS))
    return judge(criterion_of(claim, paper), Measured(frame), "standard")


def caught(claim: Callable[[], Judgement], plant: Callable[[], None]) -> None:
    """The claim holds, and with the error planted it does not."""
    assert claim().verdict == "reproduced"
    plant()
    assert claim().verdict == "not reproduced"


def test_sigma_that_is_added_where_it_should_replace_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    meanings = {**langevin.MEANINGS, "replaced": langevin.MEANINGS["added"]}
    caught(
        lambda: verdict("ncsn", "N4-spread-replaced", chains=200, steps=50),
        lambda: monkeypatch.setattr(langevin, "MEANINGS", meanings),
    )


def test_importance_weights_with_the_wrong_sign_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    right = LinearGaussian.log_weights
    caught(
        lambda: verdict("burda", "IW-limit"),
        lambda: monkeypatch.setattr(LinearGaussian, "log_weights", lambda *a: -right(*a)),
    )


def test_an_importance_weighted_bound_that_divides_by_the_wrong_count_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = importance.iw_bound

    def one_too_few(model: Any, x: Tensor, k: int, generator: torch.Generator) -> Any:
        bound = right(model, x, k, generator)
        return type(bound)(bound.values + torch.log(torch.tensor(k / max(k - 30, 1))), bound.kind, bound.draws)

    caught(
        lambda: verdict("burda", "IW-limit"),
        lambda: monkeypatch.setattr("replicate.papers.burda.bounds.iw_bound", one_too_few),
    )


def test_noise_over_half_the_cell_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def half(self: RealNVP, x: Tensor, generator: torch.Generator) -> Tensor:
        return 0.5 * torch.rand(x.shape, generator=generator)

    caught(
        lambda: verdict("textbook", "TB-noise-respects-entropy", draws=500, max_epochs=8),
        lambda: monkeypatch.setattr(RealNVP, "noise", half),
    )


def test_inverse_temperatures_accumulated_in_float32_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"sizes": "10", "epochs": 1, "thinning": 50}
    assert verdict("salakhutdinov", "C3.10", **small).verdict == "reproduced"
    right = annealing.paper_betas

    def accumulated(thinning: int = 1) -> Tensor:
        return right(thinning).diff().float().cumsum(0)

    monkeypatch.setattr(annealing, "paper_betas", accumulated)
    with pytest.raises(ValueError, match="must be float64"):  # refused before it can become a number
        verdict("salakhutdinov", "C3.10", **small)
    monkeypatch.setattr(annealing, "paper_betas", lambda thinning=1: accumulated(thinning).double())
    with pytest.raises(ValueError, match="exactly 0 to exactly 1"):
        verdict("salakhutdinov", "C3.10", **small)
