"""NADE in one order and in all orders, against plain loops, enumeration, quadrature and autograd."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import combinations, permutations, product
from typing import TypeVar

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import chisquare
from torch import Tensor

from baselines import nade
from baselines.nade import EONADE, NADE, FixedOrderNADE, OrderAgnosticNADE, log_mean_density
from replicate.likelihood.quadrature import grid
from replicate.model import DataInfo, Model, ModelEntry, Training
from replicate.runs.seeds import Streams
from replicate.runs.training import train

BITS, REAL = DataInfo(6, "bits", 2), DataInfo(5, "continuous")
STATES = torch.tensor(list(product([0.0, 1.0], repeat=6)), dtype=torch.float64)
#: more dimensions than one block has
WIDE = 2 * nade.BLOCK + 6


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


M = TypeVar("M", bound=Model)


def made(build: Callable[[], M], scale: float = 0.5) -> M:
    """A model in double precision whose weights are all redrawn, so that no path through it is silent."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build().double().eval()
    g = generator(1)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(scale * torch.randn(p.shape, generator=g, dtype=p.dtype))
    return model


def fixed(order: list[int] | None = None, info: DataInfo = BITS) -> FixedOrderNADE:
    return made(lambda: FixedOrderNADE(info, 7, order), scale=1.0)


def agnostic(info: DataInfo = BITS, scale: float = 0.5, **changes: int) -> OrderAgnosticNADE:
    sizes = {"hidden": 8, "layers": 2, "orderings": 5, "components": 3, **changes}
    return made(lambda: OrderAgnosticNADE(info, **sizes), scale)


def some_bits(n: int, dim: int, seed: int = 0) -> Tensor:
    return torch.randint(2, (n, dim), generator=generator(seed)).double()


def copies(n: int, seed: int) -> Tensor:
    """Three pairs of bits (n, 6), the second of a pair nine times out of ten the first."""
    g = generator(seed)
    first = torch.randint(2, (n, 3), generator=g).float()
    flip = (torch.rand((n, 3), generator=g) < 0.1).float()
    return torch.cat([first, (first - flip).abs()], 1)


ENTROPY = 3 * (math.log(2) - 0.9 * math.log(0.9) - 0.1 * math.log(0.1))


def trained(entry: ModelEntry) -> Model:
    """A small model of the entry trained on copies."""
    streams = Streams("test", "nade", 0)
    with streams.initialisation():
        model = entry.build(BITS, **{**entry.params, "hidden": 32})
    settings = Training(steps=200, batch_size=100, lr=0.02, ema=0.97, validate_every=50)
    train(model, copies(4000, 0), copies(500, 1), settings, streams)
    return model


# -- one order


@pytest.mark.parametrize("reverse", [False, True])
def test_nade_is_the_papers_loop_over_dimensions(reverse: bool) -> None:
    order = list(range(WIDE))[:: -1 if reverse else 1]
    model, x = fixed(order, DataInfo(WIDE, "bits", 2)), some_bits(4, WIDE)
    a, log_p = model.bias.expand(4, -1), torch.zeros(4, dtype=torch.float64)
    for d, i in enumerate(order):
        p = torch.sigmoid(a.sigmoid() @ model.output[d] + model.output_bias[d])
        log_p = log_p + torch.where(x[:, i] == 1, p, 1 - p).log()
        a = a + x[:, i : i + 1] * model.weight[d]
    torch.testing.assert_close(model.log_prob(x), log_p)


@pytest.mark.parametrize("order", [None, [3, 1, 5, 0, 2, 4]])
def test_nade_sums_to_one_over_all_bits(order: list[int] | None) -> None:
    assert float(fixed(order).log_prob(STATES).logsumexp(0).detach()) == pytest.approx(0, abs=1e-10)


def test_a_logit_depends_on_the_bits_before_it_in_the_order_and_on_all_of_them() -> None:
    order = [3, 1, 5, 0, 2, 4]
    model, x = fixed(order), some_bits(1, 6)
    jacobian = torch.autograd.functional.jacobian(model.logits, x).view(6, 6)[:, order]
    assert not torch.triu(jacobian).any()
    assert bool((torch.tril(jacobian, -1) != 0).sum() == 15)


def test_an_order_that_is_no_permutation_is_refused() -> None:
    with pytest.raises(ValueError, match=r"0\.\.5 once"):
        FixedOrderNADE(BITS, 4, [0, 1, 2, 3, 4, 4])


# -- samples


@pytest.mark.parametrize("build", [lambda: fixed([3, 1, 5, 0, 2, 4]), agnostic], ids=["nade", "eonade"])
def test_samples_of_bits_have_the_enumerated_frequencies(build: Callable[[], Model]) -> None:
    model, n = build(), 20_000
    x = model.sample(n, generator())
    index = (x * 2 ** torch.arange(5, -1, -1)).sum(1).long()
    expected = n * model.log_prob(STATES).exp().detach()
    counts = torch.bincount(index, minlength=64).double()
    rare = expected < 5
    counts, expected = (torch.cat([v[~rare], v[rare].sum().view(1)]) for v in (counts, expected))
    kept = expected > 0
    assert chisquare(counts[kept].numpy(), expected[kept].numpy()).pvalue > 1e-3


def test_continuous_samples_follow_the_density() -> None:
    """Counts in coarse cells of the plane against their probabilities by quadrature."""
    model = agnostic(DataInfo(2, "continuous"))
    half, cells, fine, n = 6.0, 8, 25, 8000
    nodes, log_cell = grid(half, cells * fine, 2)
    with torch.no_grad():
        p = (model.log_prob(nodes.double()) + log_cell).exp().view(cells, fine, cells, fine).sum((1, 3)).flatten()
    x = model.sample(n, generator())
    inside = (x.abs() < half).all(1)
    index = ((x[inside] + half) / (2 * half) * cells).floor().long()
    counts = torch.bincount(index[:, 0] * cells + index[:, 1], minlength=cells**2).double()
    busy = n * p > 5
    seen, expected = counts[busy], n * p[busy]
    seen = torch.cat([seen, (n - seen.sum())[None]])
    expected = torch.cat([expected, (n - expected.sum())[None]])
    assert chisquare(seen.numpy(), expected.numpy()).pvalue > 1e-3


# -- all orders


def one_by_one(model: OrderAgnosticNADE, x: Tensor, order: list[int]) -> Tensor:
    """log p_o(x) by a whole pass of the network at every dimension, with the mask of those before it."""
    total = torch.zeros(len(x), dtype=x.dtype)
    for d, i in enumerate(order):
        mask = torch.zeros_like(x)
        mask[:, order[:d]] = 1
        total = total + model._conditionals(x, mask)[:, i]
    return total


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("domain", ["bits", "continuous"])
def test_one_pass_over_an_order_is_the_network_called_at_every_mask(domain: str, layers: int) -> None:
    info = DataInfo(WIDE, "bits", 2) if domain == "bits" else REAL
    model = agnostic(info, layers=layers)
    x = some_bits(3, WIDE) if domain == "bits" else torch.randn(3, 5, generator=generator(), dtype=torch.float64)
    for order in model.orderings[:2]:
        torch.testing.assert_close(model.log_prob_in(x, order), one_by_one(model, x, order.tolist()))


@pytest.mark.parametrize("layers", [1, 2])
def test_every_order_and_the_ensemble_sum_to_one(layers: int) -> None:
    model = agnostic(layers=layers)
    totals = model.log_prob_by_order(STATES, model.orderings).logsumexp(0)
    torch.testing.assert_close(totals, torch.zeros_like(totals), atol=1e-10, rtol=0)
    assert float(model.log_prob(STATES).logsumexp(0).detach()) == pytest.approx(0, abs=1e-10)


def test_the_continuous_ensemble_integrates_to_one() -> None:
    nodes, log_cell = grid(25.0, 250, 2)
    with torch.no_grad():
        total = agnostic(DataInfo(2, "continuous")).log_prob(nodes.double()).logsumexp(0) + log_cell
    assert float(total) == pytest.approx(0, abs=1e-3)


def logits_in(model: OrderAgnosticNADE, x: Tensor, order: list[int]) -> Tensor:
    """Logit of each bit of x (n, D) given those before it in the order."""
    columns = [torch.empty(0)] * x.shape[1]
    for d, i in enumerate(order):
        mask, one, zero = torch.zeros_like(x), x.clone(), x.clone()
        mask[:, order[:d]] = 1
        one[:, i], zero[:, i] = 1, 0
        columns[i] = model._conditionals(one, mask)[:, i] - model._conditionals(zero, mask)[:, i]
    return torch.stack(columns, 1)


def test_averaging_logits_over_orders_is_no_distribution_and_averaging_densities_is() -> None:
    """On bits that copy each other: with averaged logits each of a pair sees the other, and sums exceed one by far."""
    model = trained(EONADE).double()
    assert isinstance(model, OrderAgnosticNADE)
    with torch.no_grad():
        each = torch.stack([logits_in(model, STATES, order.tolist()) for order in model.orderings])

        def log_p(logits: Tensor) -> Tensor:
            return F.logsigmoid((2 * STATES - 1) * logits).sum(-1)

        densities = log_p(each).T.logsumexp(1) - math.log(len(each))
        torch.testing.assert_close(model.log_prob(STATES), densities)
    assert float(densities.exp().sum()) == pytest.approx(1, abs=1e-6)
    assert float(log_p(each.mean(0)).exp().sum()) > 1.5
    # what a table would show: an "NLL" below the entropy, which no distribution has
    truth = 0.5**3 * torch.where(STATES[:, :3] == STATES[:, 3:], 0.9, 0.1).prod(1)
    assert float(-(truth * log_p(each.mean(0))).sum()) < ENTROPY - 0.2
    assert float(-(truth * densities).sum()) > ENTROPY


@pytest.mark.parametrize("info", [DataInfo(4, "bits", 2), DataInfo(4, "continuous")], ids=["bits", "continuous"])
def test_the_loss_averages_to_the_mean_over_all_orders(info: DataInfo, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every mask as often as a random order and split point give it, against the 24 orders one by one."""
    model = agnostic(info)
    x = some_bits(1, 4, 3) if info.domain == "bits" else torch.randn(1, 4, generator=generator(), dtype=torch.float64)
    sets = [s for k in range(4) for s in combinations(range(4), k) for _ in range(12 // math.comb(4, k))]
    masks = torch.zeros(len(sets), 4)
    for row, inside in zip(masks, sets, strict=True):
        row[list(inside)] = 1
    monkeypatch.setattr(nade, "spread_splits", lambda n, dim, g: masks.sum(1, keepdim=True).long())
    monkeypatch.setattr(nade, "random_masks", lambda observed, dim, g: masks)
    orders = [model.log_prob_in(x, torch.tensor(o)) for o in permutations(range(4))]
    torch.testing.assert_close(model.loss(x.expand(48, -1), generator()), -torch.stack(orders).mean())


def test_masks_are_uniform_and_split_points_spread() -> None:
    g = generator()
    splits = torch.stack([nade.spread_splits(7, 5, g).squeeze(1) for _ in range(2000)])
    for column in splits.T:  # each example's own split point is uniform
        assert chisquare(torch.bincount(column, minlength=5).numpy()).pvalue > 1e-3
    counts = torch.stack([torch.bincount(row, minlength=5) for row in splits])
    assert int(counts.min()) == 1
    assert int(counts.max()) == 2
    masks = nade.random_masks(torch.full((12_000, 1), 2), 4, g)
    assert bool((masks.sum(1) == 2).all())
    index = (masks * 2 ** torch.arange(4)).sum(1).long()
    assert chisquare(torch.bincount(index)[[3, 5, 6, 9, 10, 12]].numpy()).pvalue > 1e-3


def test_a_larger_ensemble_is_never_worse_on_average() -> None:
    log_p = agnostic(orderings=8).log_prob_by_order(STATES, agnostic(orderings=8).orderings).detach()
    nll = [-float(log_mean_density(log_p.unflatten(1, (-1, k))).mean()) for k in (1, 2, 4, 8)]
    assert nll == sorted(nll, reverse=True)


def test_the_score_is_finite_differences_of_log_p() -> None:
    model, x = agnostic(REAL), torch.randn(2, 5, generator=generator(), dtype=torch.float64)
    assert torch.autograd.gradcheck(model.log_prob, (x.requires_grad_(),))


# -- training


@pytest.mark.parametrize("entry", [NADE, EONADE], ids=["nade", "eonade"])
def test_registered_models_learn_what_bits_copy(entry: ModelEntry) -> None:
    """Within 0.05 nats of the entropy; independent bits cost 6 ln 2 = 4.2 nats."""
    model = trained(entry)
    with torch.no_grad():
        assert -float(model.log_prob(copies(4000, 2)).mean()) == pytest.approx(ENTROPY, abs=0.05)


def test_the_deep_estimator_learns_a_correlated_gaussian() -> None:
    """Within 0.05 nats of the true density on test."""
    streams = Streams("test", "eonade", 0)
    g = generator()
    root = torch.tensor([[1.0, 0.0, 0.0], [0.8, 0.6, 0.0], [-0.5, 0.5, 0.7]])
    rows = torch.randn((6000, 3), generator=g) @ root.T
    with streams.initialisation():
        model = EONADE.build(DataInfo(3, "continuous"), **{**EONADE.params, "hidden": 32, "components": 3})
    settings = Training(steps=300, batch_size=200, lr=0.01, warmup=20, grad_clip=5.0, ema=0.97, validate_every=100)
    train(model, rows[:3000], rows[3000:4000], settings, streams)
    truth = torch.distributions.MultivariateNormal(torch.zeros(3), root @ root.T)
    with torch.no_grad():
        gap = truth.log_prob(rows[4000:]).mean() - model.log_prob(rows[4000:]).mean()
    assert -0.02 < float(gap) < 0.05
