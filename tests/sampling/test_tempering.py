"""Parallel tempering against quadrature, detailed balance, and the Langevin chain that it is at one temperature."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from replicate.errors import Stopped
from replicate.metrics.samples import mode_weight_error
from replicate.resume import Journal, State
from replicate.sampling.langevin import mala
from replicate.sampling.tempering import Rounds, Tempered, exchange, parallel_tempering
from replicate.tasks.densities import GaussianMixture

torch.set_num_threads(1)

PAIR = GaussianMixture(torch.tensor([[-4.0], [4.0]]), torch.eye(1), torch.tensor([1.0, 3.0]))
TEMPERATURES = torch.tensor([1.0, 3.0, 9.0])


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tempered(x: Tensor, rounds: int, generator: torch.Generator, temperatures: Tensor = TEMPERATURES) -> Tempered:
    return parallel_tempering(
        PAIR.log_prob, PAIR.score, x, temperatures, Rounds(rounds, 3, 1.5, record_every=1), generator
    )


def test_one_temperature_equals_mala_bit_for_bit() -> None:
    x = torch.randn(50, 1, generator=rng(1), dtype=torch.float64)
    alone = mala(PAIR.log_prob, PAIR.score, x, 12, 1.5, rng(2), record_every=3)
    one = tempered(x, 4, rng(2), torch.ones(1)).coldest
    assert alone.path is not None
    assert one.path is not None
    assert torch.equal(one.samples, alone.samples)
    assert torch.equal(one.path, alone.path)
    assert one.acceptance == pytest.approx(alone.acceptance)


def test_each_temperature_equals_mala_with_a_step_size_in_proportion() -> None:
    x = torch.randn(50, 1, generator=rng(1), dtype=torch.float64)
    alone = mala(PAIR.log_prob, PAIR.score, x, 12, 1.5 * 4, rng(2), temperature=4.0)
    one = tempered(x, 4, rng(2), torch.tensor([4.0])).coldest
    torch.testing.assert_close(one.samples, alone.samples)


def test_the_stationary_law_is_the_density_by_quadrature() -> None:
    """All chains start in the mode of weight 1/4; every tenth of the mass holds a tenth of the states."""
    chain = tempered(-4 * torch.ones(2000, 1, dtype=torch.float64), 50, rng(3)).coldest
    grid = torch.linspace(-12, 12, 24_001, dtype=torch.float64)
    below = torch.cumulative_trapezoid(PAIR.log_prob(grid[:, None]).exp(), grid)
    edges = grid[1:][torch.searchsorted(below, torch.linspace(0.1, 0.9, 9, dtype=torch.float64))]
    share = torch.bincount(torch.bucketize(chain.samples.flatten(), edges), minlength=10).double() / 2000
    assert float((share - 0.1).abs().max()) < 4 * math.sqrt(0.09 / 2000)


def test_langevin_alone_stays_in_its_first_mode() -> None:
    x = -4 * torch.ones(500, 1, dtype=torch.float64)
    cold = tempered(x, 50, rng(3)).coldest
    alone = mala(PAIR.log_prob, PAIR.score, x, 200, 1.5, rng(4)).samples
    stayed, mixed = (mode_weight_error(PAIR.mode_of(s), PAIR.mode_weights()).value for s in (alone, cold.samples))
    assert stayed > 0.6
    assert mixed < 0.08


def test_the_exchange_is_in_detailed_balance_on_every_pair_of_joint_states() -> None:
    """pi(a) P(a -> b) = pi(b) P(b -> a) for three replicas on four points, P counted over many draws."""
    log_p = torch.tensor([0.0, -1.0, 0.7, -2.5], dtype=torch.float64)
    states = torch.tensor(list(itertools.product(range(4), repeat=3)))
    n, t = 4000, TEMPERATURES.double()
    log_pi = (log_p[states] / t).sum(1)
    for first in (0, 1):
        x = states.T[:, :, None].expand(3, 64, n).reshape(3, -1, 1).double()
        out, accept = exchange(x, log_p[x[..., 0].long()], t, first, rng(first))
        a, b = ((s[..., 0].long() * torch.tensor([16, 4, 1])[:, None]).sum(0) for s in (x, out))
        p = torch.bincount(64 * a + b, minlength=64 * 64).view(64, 64).double() / n
        flow = (log_pi - log_pi.logsumexp(0)).exp()[:, None] * p
        assert accept.shape == (1, 64 * n)
        # the standard error of a probability near 1/2, weighed by the larger of the two
        allowed = 5 * 0.5 / math.sqrt(n) * torch.maximum(flow.sum(1)[:, None], flow.sum(1)) * ((p + p.T) > 0)
        assert bool(((flow - flow.T).abs() <= allowed).all())
        moved = p - p.diagonal().diag()
        assert float(moved.sum()) > 5
        # the pair that is not offered keeps its states
        still = 0 if first else 2
        assert torch.equal(out[still], x[still])


def test_states_are_exchanged_and_never_copied() -> None:
    x = torch.arange(5 * 7, dtype=torch.float64).view(5, 7, 1)
    for first in (0, 1):
        out, accept = exchange(x, torch.zeros(5, 7), torch.arange(1.0, 6.0), first, rng())
        assert bool(accept.all())  # equal log p: the ratio is 1
        assert torch.equal(out.sort(0).values, x)
        assert torch.equal(out[first], x[first + 1])


def test_a_pair_with_a_nan_is_not_exchanged() -> None:
    x = torch.arange(2.0)[:, None, None]
    out, accept = exchange(x, torch.tensor([[0.0], [math.nan]]), torch.tensor([1.0, 2.0]), 0, rng())
    assert not bool(accept.any())
    assert torch.equal(out, x)


def test_evaluations_of_all_temperatures_are_counted() -> None:
    rows = 0

    def counted(x: Tensor) -> Tensor:
        nonlocal rows
        rows += len(x)
        return PAIR.score(x)

    found = parallel_tempering(PAIR.log_prob, counted, torch.zeros(10, 1), TEMPERATURES, Rounds(5, 4, 1.0), rng())
    assert found.coldest.nfe * 10 == rows
    assert found.coldest.path is None
    assert found.swaps.shape == (2,)


def test_an_interrupted_run_resumes_bit_for_bit() -> None:
    x = torch.zeros(20, 1, dtype=torch.float64)
    whole = tempered(x, 6, rng(5))
    kept: list[State] = []
    seen = 0

    def score(y: Tensor) -> Tensor:
        nonlocal seen
        seen += 1
        if seen == 10:  # in the third round
            journal.stopping = True
        return PAIR.score(y)

    def run(score_) -> Tempered:  # type: ignore[no-untyped-def]
        return parallel_tempering(PAIR.log_prob, score_, x, TEMPERATURES, Rounds(6, 3, 1.5, record_every=1), rng(5))

    journal = Journal(kept.append, every=1e9)
    with pytest.raises(Stopped), journal.active():
        run(score)
    with Journal(kept.append, saved=kept[-1], every=1e9).active():
        again = run(PAIR.score)
    assert whole.coldest.path is not None
    assert again.coldest.path is not None
    assert torch.equal(again.coldest.path, whole.coldest.path)
    assert torch.equal(again.swaps, whole.swaps)
    assert again.coldest.acceptance == whole.coldest.acceptance


@pytest.mark.parametrize("values", [[], [2.0, 1.0], [0.0, 1.0], [1.0, 1.0]])
def test_temperatures_that_do_not_increase_are_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match="positive and increasing"):
        tempered(torch.zeros(1, 1), 1, rng(), torch.tensor(values))


def test_a_negative_number_of_rounds_is_refused() -> None:
    with pytest.raises(ValueError, match="rounds >= 0"):
        tempered(torch.zeros(1, 1), -1, rng())
