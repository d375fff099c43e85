"""An experiment that is killed twice and called again ends with the bits of the undisturbed one and repeats no step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.sessions import Sitting, found
from hypothesis import given
from hypothesis import strategies as st

from replicate.experiments.batches import Minibatches
from replicate.experiments.rbm import BinaryRows, binary_rows
from replicate.model import DataInfo
from replicate.papers import pixelcnn
from replicate.papers.burda import rows as burda
from replicate.papers.nce import gaussian as nce
from replicate.papers.salakhutdinov import annealing
from replicate.papers.ssm import kernel, tables
from replicate.runs.checkpoint import pack, unpack
from replicate.runs.experiment import Outcome, Run
from replicate.runs.paper import find_experiment
from replicate.runs.seeds import Streams
from replicate.tasks.base import Task


@dataclass(frozen=True)
class Case:
    """An experiment at smoke settings with some of them `changed`; `variant` tells apart two of one experiment."""

    paper: str
    name: str
    changed: Mapping[str, Any] = field(default_factory=dict)
    variant: str = ""

    @property
    def label(self) -> str:
        """For pytest."""
        return self.name + self.variant

    def __call__(self) -> Outcome:
        """Run it as a fresh process would."""
        what = find_experiment(self.paper, self.name)
        params = {**what.settings("smoke"), **self.changed}
        return what.measure(Run(params, Streams(what.name, self.paper, 0), torch.device("cpu")))


#: of all steps, after which a sitting is killed; no simple fraction, so that two or three like loops are cut inside
SHARE = 0.35
SMALL_NET = {"max_epochs": 8, "hidden": 8, "draws": 2}
PERSISTENT = {"gibbs": 12, "ramp": True, "epochs": 11, "batch": 20, "hidden": 4, "chains": 10, "thinning": 1000}
RING = {
    "samples": 40,
    "grid": 20,
    "long_run": 8,
    "convergent_updates": 30,
    "convergent_steps": 3,
    "nonconvergent_updates": 30,
    "nonconvergent_steps": 3,
}
KERNELS = {
    "steps": 24,
    "batch": 20,
    "lr": 0.1,
    "validate_every": 2,
    "inducing": 10,
    "hidden": 4,
    "chains": 10,
    "temperatures": 8,
}
CASES = (
    Case("anatomy", "anatomy-learning", RING),
    Case("burda", "burda-iwae-2-k5-dynamic", {"stages": 2, "samples": 10}),
    Case("lsd", "lsd-ica-2", {"examples": 50, "test_examples": 100, "cd_updates": 9}),
    Case("nce", "nce-gaussian", {"repetitions": 3, "smallest": 100}),
    Case("nce", "nce-noise-ratio", {"repetitions": 3, "chunk": 1, "examples": 20}),
    Case("nce", "nce-ica", {"dim": 2, "smallest": 50, "repetitions": 5}),
    Case("ncsn", "ncsn-langevin", {"steps": 20, "long_steps": 60}),
    Case("ncsn", "ncsn-manifold", {"steps": 40, "block": 2}),
    Case("ncsn", "ncsn-noise-levels"),
    Case("ncsn", "ncsn-score-error"),
    Case("pixelcnn", "pixelcnn-gated", {"steps": 9, "batch_size": 4, "width": 8, "layers": 1, "validate_every": 3}),
    Case("salakhutdinov", "ais-against-enumeration", {"sizes": "4 5", "thinning": 1000}),
    Case("salakhutdinov", "static-rbm-pcd25", PERSISTENT),
    Case("score_sde", "score-sde-digits", {"samples": 40, "test_images": 20}),
    Case("score_sde", "score-sde-mixture", {"nfe": 8}),
    Case("scoreflow", "scoreflow-digits", {"steps": 3, "samples": 40, "test_images": 10}),
    Case("ssm", "ssm-covariance", {"datasets": 45, "examples": 100}),
    Case("ssm", "ssm-dkef-red-wine", {**KERNELS, "patience": 4}, "-stopped-early"),
    Case("ssm", "ssm-dkef-red-wine", {**KERNELS, "patience": 24}),
    Case("ssm", "ssm-nice-learning-rate", {"epochs": 3, "validate_every": 2, "hidden": 8, "test_images": 150}),
    Case(
        "textbook",
        "textbook-dequantisation",
        {"lr": 0.5, "max_epochs": 7, "patience": 0, "draws": 20},
        "-stopped-early",
    ),
    Case("textbook", "textbook-realnvp", {**SMALL_NET, "couplings": 2}),
    Case("textbook", "textbook-vae", SMALL_NET),
    Case("tieleman", "pcd-equal-time", {"updates": 60}),
)


@pytest.fixture
def small_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random data in place of the files that four papers read; fewer objectives and draws where these are many."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(2, (90, 16), generator=generator).float()
    rows = torch.randn(90, 3, generator=generator, dtype=torch.float64)
    task = Task("bits", "random bits", DataInfo(16, "bits", 2, (4, 4)), bits[:50], bits[50:70], bits[70:])
    table = tables.Table(rows[:50], rows[50:70], rows[70:])
    monkeypatch.setattr(burda, "training_and_test", lambda dynamic: (0.5 * bits[:50], bits[50:]))
    monkeypatch.setattr(pixelcnn, "task_entry", lambda name: SimpleNamespace(load=lambda: task))
    static = BinaryRows(task.train, task.valid, task.test)
    monkeypatch.setattr(
        annealing, "binary_rows", lambda name, device: static if name == "mnist-static" else binary_rows(name, device)
    )
    monkeypatch.setattr(tables, "load_table", lambda name, draws: table)
    two = {"ssm": kernel.sliced, "dsm": kernel.denoising(0.2)}
    monkeypatch.setattr(tables, "objectives", lambda sigma: two)
    monkeypatch.setattr(nce, "THEORY_DRAWS", 1000)


#: of every paper's loops one, in every run of the tests; the others in `make chaos`
FIRST = ("anatomy-learning", "nce-ica", "ncsn-manifold", "scoreflow-digits", "ssm-nice-learning-rate", "textbook-vae")
MARKED = [pytest.param(c, id=c.label, marks=() if c.label in FIRST else pytest.mark.slow) for c in CASES]


@pytest.mark.usefixtures("small_data")
@pytest.mark.parametrize("case", MARKED)
def test_an_experiment_killed_twice_ends_with_the_same_bits_and_repeats_no_step(case: Case) -> None:
    undisturbed = Sitting()
    want = undisturbed.outcome(case)
    part = math.ceil(SHARE * undisturbed.count)
    first = Sitting(last=part)
    assert first.outcome(case) is None
    second = Sitting(first.kept, last=part)
    assert second.outcome(case) is None
    rest = Sitting(second.kept)
    outcome = rest.outcome(case)
    assert want is not None
    assert outcome is not None
    assert found(outcome) == found(want)
    assert first.count + second.count + rest.count == undisturbed.count


def test_seconds_of_learning_are_those_of_every_sitting() -> None:
    case = Case("tieleman", "pcd-equal-time", {"updates": 20})
    first = Sitting(last=5)
    assert first.outcome(case) is None
    assert first.kept is not None
    saved = unpack(first.kept)
    saved["cut"]["state"]["watch"]["seconds"] += 1000
    outcome = Sitting(pack(saved)).outcome(case)
    assert outcome is not None
    assert 1000 < outcome.estimates["train_seconds:pcd"].value < 2000
    assert outcome.estimates["train_seconds:cd1"].value < 1000


def drawn(batches: Minibatches, count: int) -> list[list[int]]:
    return [next(batches).tolist() for _ in range(count)]


@given(n=st.integers(1, 9), size=st.integers(1, 10), whole=st.booleans(), passes=st.integers(1, 3))
def test_a_pass_of_minibatches_has_every_row_once(n: int, size: int, whole: bool, passes: int) -> None:
    whole = whole and size <= n
    batches = Minibatches(torch.arange(n), size, torch.Generator().manual_seed(n), whole)
    for _ in range(passes):
        parts = drawn(batches, len(batches))
        rows = [row for part in parts for row in part]
        assert len(set(rows)) == len(rows) == (n - n % size if whole else n)
        assert all(len(part) == size for part in (parts if whole else parts[:-1]))


@given(cut=st.integers(0, 12), whole=st.booleans())
def test_minibatches_go_on_where_they_were(cut: int, whole: bool) -> None:
    def fresh(seed: int) -> Minibatches:
        return Minibatches(torch.arange(7), 3, torch.Generator().manual_seed(seed), whole)

    want = drawn(fresh(1), cut + 5)
    before, after = fresh(1), fresh(2)
    assert drawn(before, cut) == want[:cut]
    after.load_state_dict(unpack(pack(before.state_dict())))
    assert drawn(after, 5) == want[cut:]
