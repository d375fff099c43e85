"""MADE against autograd's Jacobian, enumeration and quadrature."""

from __future__ import annotations

import math
from itertools import pairwise, product

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import chisquare
from torch import Tensor

from baselines import made
from baselines.made import MADE, MaskedAutoencoder, build_masks, draw_degrees
from replicate.likelihood.quadrature import grid
from replicate.model import DataInfo, Training
from replicate.runs.seeds import Streams
from replicate.runs.training import train

BITS, REAL = DataInfo(6, "bits", 2), DataInfo(5, "continuous")
STATES = torch.tensor(list(product([0.0, 1.0], repeat=6)), dtype=torch.float64)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def scrambled(info: DataInfo = BITS, seed: int = 0, **changes: int) -> MaskedAutoencoder:
    """A model in double precision whose weights are all redrawn, so that no path through it is silent."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = MaskedAutoencoder(info, **{"hidden": 12, "layers": 2, "masks": 4, "components": 3, **changes})
    g = generator(1)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.5 * torch.randn(p.shape, generator=g))
    return model.double().eval()


def rows(info: DataInfo, n: int, seed: int = 0) -> Tensor:
    g = generator(seed)
    if info.domain == "bits":
        return torch.randint(2, (n, info.dim), generator=g).double()
    return torch.randn((n, info.dim), generator=g, dtype=torch.float64)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("info", [BITS, REAL], ids=["bits", "continuous"])
def test_an_output_depends_on_the_inputs_of_lower_rank_and_on_no_other(info: DataInfo, layers: int) -> None:
    model = scrambled(info, layers=layers)
    for which, ranks in enumerate(model.ranks):
        jacobian = torch.autograd.functional.jacobian(lambda x, w=which: model.conditionals(x, w), rows(info, 1))
        depends = (jacobian.squeeze((0, 3)) != 0).any(1)
        assert torch.equal(depends, ranks[:, None] > ranks[None, :])


def test_hidden_units_carry_what_the_direct_connection_does() -> None:
    """Without it, paths through hidden units still reach outputs, and only from inputs of lower rank."""
    model = scrambled(hidden=60)
    with torch.no_grad():
        model.direct.weight.zero_()
    for which, ranks in enumerate(model.ranks):
        x = rows(BITS, 40)
        reached = torch.stack(
            [
                torch.autograd.functional.jacobian(lambda z, w=which: model.conditionals(z, w), row).squeeze((0, 2, 3))
                for row in x.split(1)
            ]
        )
        depends = (reached != 0).any(0)
        lower = ranks[:, None] > ranks[None, :]
        assert not bool((depends & ~lower).any())
        assert int((depends & lower).sum()) >= 13  # of 15 pairs


@pytest.mark.parametrize("layers", [1, 2])
def test_every_set_and_their_mean_sum_to_one_over_all_bits(layers: int) -> None:
    model = scrambled(layers=layers)
    with torch.no_grad():
        totals = torch.cat([model.log_prob_by_set(STATES), model.log_prob(STATES)[:, None]], 1).logsumexp(0)
    torch.testing.assert_close(totals, torch.zeros_like(totals), atol=1e-10, rtol=0)


def test_the_continuous_density_integrates_to_one() -> None:
    nodes, log_cell = grid(25.0, 350, 2)
    with torch.no_grad():
        total = scrambled(DataInfo(2, "continuous")).log_prob(nodes.double()).logsumexp(0) + log_cell
    assert float(total) == pytest.approx(0, abs=1e-3)


def test_densities_are_averaged_not_logits() -> None:
    model = scrambled()
    with torch.no_grad():
        logits = torch.stack([model.conditionals(STATES, m).squeeze(2) for m in range(4)])
        each = F.logsigmoid((2 * STATES - 1) * logits).sum(-1)
        torch.testing.assert_close(model.log_prob(STATES), each.T.logsumexp(1) - math.log(4))
        wrong = F.logsigmoid((2 * STATES - 1) * logits.mean(0)).sum(-1)
    assert abs(float(wrong.exp().sum()) - 1) > 0.01


def test_one_layer_is_the_papers_formula() -> None:
    """c + (V * M_V) relu(b + (W * M_W) x) + (A * M_A) x, each mask entry by entry from ranks and degrees."""
    model, x = scrambled(layers=1), rows(BITS, 3)
    weights = {name: p.detach().numpy() for name, p in model.named_parameters()}
    for m in range(4):
        rank, degree = model.ranks[m].tolist(), model.degrees[m, 0].tolist()
        w_m, v_m, a_m = (weights[f"{name}.weight"].copy() for name in ("hidden.0", "output", "direct"))
        for d, e in product(range(6), repeat=2):
            a_m[d, e] *= rank[e] < rank[d]
        for k, d in product(range(12), range(6)):
            w_m[k, d] *= rank[d] <= degree[k]
            v_m[d, k] *= degree[k] < rank[d]
        h = (x.numpy() @ w_m.T + weights["hidden.0.bias"]).clip(min=0)
        logits = h @ v_m.T + weights["output.bias"] + x.numpy() @ a_m.T
        torch.testing.assert_close(model.conditionals(x, m)[..., 0].detach(), torch.from_numpy(logits))


def test_degrees_leave_no_unit_unused() -> None:
    """A unit of degree D - 1 would reach no output, one below the least degree beneath it no input."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        degrees = draw_degrees(9, 500, 3)
    assert int(degrees.min()) == 0
    assert int(degrees.max()) == 7
    assert all(int(b.min()) >= int(a.min()) for a, b in pairwise(degrees))
    assert chisquare(torch.bincount(degrees[0]).numpy()).pvalue > 1e-3


def test_one_dimension_is_a_bias() -> None:
    model = scrambled(DataInfo(1, "bits", 2))
    x = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    assert float(model.log_prob(x).logsumexp(0).detach()) == pytest.approx(0, abs=1e-12)


def test_samples_have_the_enumerated_frequencies() -> None:
    model, n = scrambled(), 20_000
    x = model.sample(n, generator())
    counts = torch.bincount((x * 2 ** torch.arange(5, -1, -1)).sum(1).long(), minlength=64).double()
    expected = n * model.log_prob(STATES).exp().detach()
    rare = expected < 5
    counts, expected = (torch.cat([v[~rare], v[rare].sum().view(1)]) for v in (counts, expected))
    kept = expected > 0
    assert chisquare(counts[kept].numpy(), expected[kept].numpy()).pvalue > 1e-3


def test_masks_are_built_once_and_follow_the_weights_that_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    model, other = scrambled(), scrambled(seed=5)
    x = rows(BITS, 20)
    assert not torch.equal(model.log_prob(x), other.log_prob(x))
    assert not any("mask" in name for name in model.state_dict())
    other.load_state_dict(model.state_dict())
    assert torch.equal(model.log_prob(x), other.log_prob(x))
    for layer, mask in zip(
        [*other.hidden, other.output, other.direct], build_masks(model.ranks, model.degrees, 1), strict=True
    ):
        assert torch.equal(layer.mask, mask)
    monkeypatch.setattr(made, "build_masks", None)  # nothing below may call it
    model.loss(x, generator()).backward()
    model.sample(2, generator())


def test_sets_take_turns_in_training() -> None:
    model = scrambled()
    x = rows(BITS, 10)
    by_set = -model.log_prob_by_set(x).mean(0).detach()
    seen = []
    for _ in range(8):
        seen.append(float(model.loss(x, generator()).detach()))
        model.after_step(generator())
    assert seen == pytest.approx([*by_set.tolist(), *by_set.tolist()], rel=1e-12)


def test_the_score_is_finite_differences_of_log_p() -> None:
    assert torch.autograd.gradcheck(scrambled(REAL).log_prob, (rows(REAL, 2).requires_grad_(),))


def test_the_registered_model_learns_a_correlated_gaussian() -> None:
    """Within 0.05 nats of the true density on test."""
    streams, g = Streams("test", "made", 0), generator()
    root = torch.tensor([[1.0, 0.0, 0.0], [0.8, 0.6, 0.0], [-0.5, 0.5, 0.7]])
    data = torch.randn((6000, 3), generator=g) @ root.T
    with streams.initialisation():
        model = MADE.build(DataInfo(3, "continuous"), **{**MADE.params, "hidden": 32, "masks": 2, "components": 3})
    settings = Training(steps=200, batch_size=200, lr=0.02, warmup=20, grad_clip=5.0, ema=0.95, validate_every=50)
    train(model, data[:3000], data[3000:4000], settings, streams)
    truth = torch.distributions.MultivariateNormal(torch.zeros(3), root @ root.T)
    with torch.no_grad():
        gap = truth.log_prob(data[4000:]).mean() - model.log_prob(data[4000:]).mean()
    assert -0.02 < float(gap) < 0.05
