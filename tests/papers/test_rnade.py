"""RNADE's tables: claims can be read, and the effect of copies and rounding is measured as the module says."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from baselines.autoregressive import CAUSAL_CONV
from baselines.made import MADE
from baselines.nade import EONADE
from replicate.experiments import Run
from replicate.ledger.claims import claims_of
from replicate.papers.rnade import PAPER, artefacts
from replicate.registry import MODELS
from replicate.runs.seeds import Streams
from replicate.tasks import tables
from replicate.tasks.base import TaskEntry
from replicate.tasks.loading import TASKS, forget_tasks

CPU = torch.device("cpu")
#: a made-up table of four columns, of which the last is a target
MADE_UP = tables.Source("red-wine", "a made-up table", "uci/made-up.csv", ",", False, 4, (0, 1, 2))
#: values that its columns take, each equally often
LEVELS = np.array([1.0, 2.0, 3.0, 4.0])


@pytest.fixture
def lattice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """240 rows of three independent columns of LEVELS, registered as red-wine with a small made; the rows."""
    rows = np.random.default_rng(0).choice(LEVELS, size=(240, 3))
    text = "\n".join(",".join(map(str, [*row, 7])) for row in rows)
    (tmp_path / "uci").mkdir()
    (tmp_path / MADE_UP.file).write_text(text, encoding="ascii")
    monkeypatch.setenv("REPLICATE_DATA", str(tmp_path))
    entry = TaskEntry(MADE_UP.about, lambda fold: tables.load_table(MADE_UP, fold), "data", folds=tables.FOLDS)
    small = {"hidden": 16, "masks": 2, "components": 4, "steps": 200, "lr": 1e-2, "validate_every": 50}
    model = replace(MADE, overrides={"red-wine": small})
    monkeypatch.setitem(TASKS.found, "red-wine", entry)
    monkeypatch.setitem(MODELS.found, "made", model)
    monkeypatch.setitem(artefacts.SOURCES, "red-wine", MADE_UP)
    forget_tasks()
    return rows


def new_run(name: str, seed: int = 3) -> Run:
    """Return a run of an experiment on red-wine with a design seed."""
    return Run({"table": "red-wine", "steps": 200}, Streams(f"design/{name}", "rnade", seed), CPU)


def test_claims_are_read_and_measure_what_the_paper_runs() -> None:
    claims = claims_of(PAPER).claims
    runs = {f"{t}/{m}" for part in PAPER.model_runs["full"] for t in part.tasks for m in part.models}
    of_runs = [c for c in claims if not c.experiment]
    assert {c.measure.rsplit("/", 1)[0] for c in of_runs} == runs
    for claim in of_runs:
        assert isinstance(claim.published, float)
        assert claim.target == -claim.published  # the paper prints log-likelihoods
        assert claim.needs.endswith("in REPLICATE_DATA")


def test_the_models_that_claims_measure_take_real_numbers_and_bits() -> None:
    for entry in (CAUSAL_CONV, EONADE, MADE):
        assert {"continuous", "bits"} <= entry.domains


def test_rounding_steps_are_the_gaps_of_the_lattice() -> None:
    generator = torch.Generator().manual_seed(0)
    lattice = torch.randint(0, 9, (400, 3), generator=generator) * torch.tensor([0.5, 0.01, 3.0])
    torch.testing.assert_close(artefacts.rounding_steps(lattice), torch.tensor([0.5, 0.01, 3.0]))


@pytest.mark.usefixtures("lattice")
def test_noise_fills_the_step_and_is_frozen_on_validation_and_test_rows_alone() -> None:
    task = tables.load_table(MADE_UP, 0)
    steps = torch.tensor([0.1, 0.2, 0.4])
    smooth = artefacts.through_noise(task, steps)
    assert torch.equal(smooth.train, task.train)
    for noised, rows in ((smooth.valid, task.valid), (smooth.test, task.test)):
        u = (noised - rows) / steps
        assert float(u.abs().max()) <= 0.5 + 1e-5
        torch.testing.assert_close(u.var(0), torch.full((3,), 1 / 12), atol=0.06, rtol=0)
    assert torch.equal(artefacts.through_noise(task, steps).test, smooth.test)
    assert smooth.redraw is not None
    generator = torch.Generator().manual_seed(1)
    assert not torch.equal(smooth.redraw(task.train, generator), smooth.redraw(task.train, generator))


@pytest.mark.usefixtures("lattice")
def test_spikes_fall_below_the_entropy_of_rounded_rows_and_noise_does_not() -> None:
    found = artefacts.ROUNDING[0].measure(new_run("rounding")).estimates
    task = tables.load_table(MADE_UP, 3)
    # three independent uniform columns of four levels, a step wide each
    entropy = 3 * math.log(4) + float(artefacts.rounding_steps(task.train).log().sum())
    assert found["nll:as-given"].value < entropy - 0.5
    assert found["nll:through-noise"].value > entropy - 0.05
    assert found["nll:as-given-scored-through-noise"].value > found["nll:through-noise"].value
    assert found["spikes"].value == found["nll:through-noise"].value - found["nll:as-given"].value


def test_copies_count_where_rows_are_cut_at_random(lattice: np.ndarray) -> None:
    # 240 rows of 64 kinds: together, a kind is on one side; at random, nearly every test row was trained on
    outcome = artefacts.COPIES[0].measure(new_run("copies"))
    together, random = (outcome.estimates[f"nll:{name}"] for name in ("together", "random"))
    assert outcome.estimates["cost"].value == together.value - random.value
    parts = tables.parts_of(lattice, tables.FOLDS, tables.FOLD_SEED)
    assert together.n == int((parts == 3).sum())
    assert random.n == 24
    again = artefacts.COPIES[0].measure(new_run("copies"))
    assert {k: e.value for k, e in again.estimates.items()} == {k: e.value for k, e in outcome.estimates.items()}
