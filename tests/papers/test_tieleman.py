"""PCD against CD: the update's expectation and the likelihood against enumeration."""

from __future__ import annotations

import itertools

import pytest
import torch
from scipy.special import logsumexp
from torch import Tensor

from replicate.experiments import Run
from replicate.experiments.batches import Minibatches
from replicate.experiments.rbm import Machine, flat
from replicate.ledger.claims import claims_of
from replicate.papers.carreira.divergence import Enumerated
from replicate.papers.tieleman import PAPER
from replicate.papers.tieleman.persistence import METHODS, Method, learn, nll, on_digits, single
from replicate.runs.seeds import Streams

DIM, HIDDEN = 4, 3


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows(n: int = 40) -> Tensor:
    return torch.randint(2, (n, DIM), generator=seeded(0)).float()


def new_run() -> Run:
    return Run(on_digits.settings("smoke"), Streams("pcd-equal-time", "tieleman", 0), torch.device("cpu"))


def learnt(method: Method, rates: list[float], updates: int, batch: int = 10) -> Machine:
    """The machines, side by side, after all updates on `rows()`."""
    return learn(method, rows(), rates, updates, HIDDEN, batch, new_run())[0][-1]


def test_nll_is_that_of_enumerated_visible_states() -> None:
    g = seeded(1)
    m = Machine(*(torch.randn(s, generator=g, dtype=torch.float64) for s in ((DIM, HIDDEN), DIM, HIDDEN)))
    w, b, c = (part.numpy() for part in m)
    hidden = list(itertools.product((0, 1), repeat=HIDDEN))

    def log_f(v: tuple[float, ...]) -> float:
        return float(logsumexp([v @ w @ h + v @ b + c @ h for h in hidden]))

    log_z = logsumexp([log_f(torch.tensor(v).numpy()) for v in itertools.product((0.0, 1.0), repeat=DIM)])
    expected = sum(log_z - log_f(v) for v in rows(10).numpy()) / 10
    assert nll(m, rows(10))[0].value == pytest.approx(expected, abs=1e-6)


def test_minibatches_are_full_and_go_through_all_rows() -> None:
    batches = Minibatches(torch.arange(7.0)[:, None], 3, seeded(0), whole=True)
    first = torch.cat([next(batches), next(batches)]).flatten().tolist()
    assert len(set(first)) == 6
    assert len(next(batches)) == 3


@pytest.mark.parametrize("k", [1, 3])
def test_one_update_is_the_expected_cd_gradient_on_average(k: int) -> None:
    """Many machines side by side take one step each: their mean step is CD-k's enumerated expectation."""
    copies, rate = 6000, 2.0
    before = learnt(Method("cd", k, False), [0.0], 1, batch=40)
    after = learnt(Method("cd", k, False), [rate] * copies, 1, batch=40)
    states, start = Enumerated(DIM, HIDDEN), single(before, 0)
    place = 2.0 ** torch.arange(DIM - 1, -1, -1)
    data = torch.bincount((rows() @ place).long(), minlength=2**DIM).double() / 40
    expected = flat(states.direction(start, data, k))
    steps = torch.stack([(flat(single(after, i)) - flat(start)) / rate for i in range(copies)])
    z = (steps.mean(0) - expected) / (steps.std(0) / copies**0.5 + 1e-5)
    assert float(z.abs().max()) < 4.5


def test_without_sweeps_cd_learns_nothing_and_pcd_keeps_its_negatives() -> None:
    cd, pcd = (learnt(Method(name, 0, name == "pcd"), [1.0], 5) for name in ("cd", "pcd"))
    still = learnt(Method("cd", 0, False), [0.0], 5)
    assert torch.allclose(flat(single(cd, 0)), flat(single(still, 0)))
    assert not torch.allclose(flat(single(pcd, 0)), flat(single(still, 0)))


def test_all_methods_start_alike_and_see_the_same_minibatches() -> None:
    a, b = (learnt(Method(name, 0, False), [0.0], 1) for name in ("pcd", "cd10"))
    assert torch.equal(flat(single(a, 0)), flat(single(b, 0)))


def test_time_is_counted_in_products() -> None:
    assert [m.products for m in METHODS] == [6, 6, 24]


def test_equal_time_small() -> None:
    outcome = on_digits.measure(new_run())
    values = {name: e.value for name, e in outcome.estimates.items()}
    assert values["updates:pcd"] == values["updates:cd1"] == 4 * values["updates:cd10"]
    assert values["nll:pcd"] < 64 * 0.6931  # better than 64 fair coins
    claims = claims_of(PAPER).claims
    assert {c.id for c in claims} >= {"C2.cd1", "C2.cd10"}
    assert all({c.measure, c.minus} <= set(values) for c in claims)
    assert len(outcome.plots[0].lines) == 3
