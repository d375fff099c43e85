"""The autoregressive baselines against enumeration, quadrature and autograd."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from baselines.autoregressive import (
    CAUSAL_CONV,
    GATED_PIXELCNN,
    Autoregressive,
    CausalConvNet,
    GatedPixelCNN,
    GaussianMixture,
)
from replicate.model import DataInfo

CONTINUOUS = DataInfo(6, "continuous")
LEVELS = DataInfo(6, "levels", 3, (2, 3))
BITS = DataInfo(6, "bits", 2, (3, 2))
TINY = {"width": 8, "layers": 2}


def scrambled(model: Autoregressive, scale: float = 0.4) -> Autoregressive:
    """The model in double precision with every weight redrawn, so that no path through it is silent."""
    g = torch.Generator().manual_seed(1)
    model = model.double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(scale * torch.randn(p.shape, generator=g, dtype=p.dtype))
    return model


def models(dropout: float = 0.0) -> dict[str, tuple[Autoregressive, DataInfo]]:
    """A tiny instance of every model on every domain that it handles."""
    made = {
        "conv-continuous": (
            CausalConvNet(CONTINUOUS, **TINY, kernel=3, components=3, octaves=2, dropout=dropout),
            CONTINUOUS,
        ),
        "conv-levels": (CausalConvNet(LEVELS, **TINY, kernel=3, dropout=dropout), LEVELS),
        "conv-bits": (CausalConvNet(BITS, **TINY, kernel=7, dropout=dropout), BITS),
        "pixelcnn-levels": (GatedPixelCNN(LEVELS, **TINY, dropout=dropout), LEVELS),
        "pixelcnn-bits": (GatedPixelCNN(BITS, **TINY, kernel=5, dropout=dropout), BITS),
    }
    return {name: (scrambled(model), info) for name, (model, info) in made.items()}


NAMES = list(models())
DISCRETE = [n for n in NAMES if "continuous" not in n]


def data(info: DataInfo, n: int, seed: int = 0) -> Tensor:
    """n rows of noise of the right domain, in double precision."""
    g = torch.Generator().manual_seed(seed)
    if info.domain == "continuous":
        return torch.randn(n, info.dim, generator=g, dtype=torch.float64)
    return torch.randint(0, info.levels or 2, (n, info.dim), generator=g).double()


def all_states(info: DataInfo) -> Tensor:
    """Every point of a discrete space, shape (levels^D, D)."""
    return torch.tensor(list(product(range(info.levels or 2), repeat=info.dim)), dtype=torch.float64)


class Watched(torch.nn.Module):
    """An embedding whose output records gradients, so that discrete inputs can be differentiated in their codes."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner, self.size = inner, inner.size
        self.codes = torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        self.codes = self.inner(x).detach().requires_grad_(True)
        return self.codes


@pytest.mark.parametrize("name", NAMES)
def test_parameters_of_dimension_i_have_exactly_zero_gradient_in_dimensions_i_and_later(name: str) -> None:
    model, info = models()[name]
    model.embed = watched = Watched(model.embed)
    parameters = model.conditionals(data(info, 4))
    reaches = torch.zeros(info.dim, info.dim)
    for i in range(info.dim):
        (grad,) = torch.autograd.grad(parameters[:, i].square().sum(), watched.codes, retain_graph=True)
        reaches[i] = grad.flatten(2).abs().sum((0, 1))
    past = torch.ones(info.dim, info.dim).tril(-1).bool()
    assert (reaches[~past] == 0).all()
    # and there is no blind spot: on spaces this small every earlier dimension is seen
    assert (reaches[past] > 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_changing_later_dimensions_leaves_earlier_conditionals_unchanged(name: str) -> None:
    model, info = models()[name]
    x, y = data(info, 16, seed=0), data(info, 16, seed=1)
    for i in range(info.dim):
        mixed = torch.cat([x[:, :i], y[:, i:]], 1)
        torch.testing.assert_close(
            model.conditionals(x)[:, : i + 1], model.conditionals(mixed)[:, : i + 1], atol=1e-12, rtol=0
        )


@pytest.mark.parametrize("name", DISCRETE)
def test_probabilities_of_all_states_sum_to_one(name: str) -> None:
    model, info = models()[name]
    log_p = model.log_prob(all_states(info))
    assert log_p.std() > 0.1
    assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-10)


def test_continuous_density_integrates_to_one() -> None:
    model = scrambled(CausalConvNet(DataInfo(2, "continuous"), **TINY, components=3, octaves=2), scale=0.2)
    axis = torch.linspace(-14, 14, 561, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        mass = torch.cat([model.log_prob(part).exp() for part in grid.split(50_000)]).sum()
    assert mass.item() * (axis[1] - axis[0]).item() ** 2 == pytest.approx(1, abs=1e-4)


def test_mixture_head_is_the_mixture_of_torch_distributions() -> None:
    head = GaussianMixture(4, floor=0.01)
    p = data(DataInfo(head.size, "continuous"), 50)
    x = data(DataInfo(1, "continuous"), 50, seed=3)[:, 0]
    logits, mean, raw = p.chunk(3, -1)
    reference = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(logits=logits),
        torch.distributions.Normal(mean, torch.nn.functional.softplus(raw) + 0.01),
    )
    torch.testing.assert_close(head.log_prob(p, x), reference.log_prob(x))


@pytest.mark.parametrize("name", DISCRETE)
def test_sample_frequencies_agree_with_enumerated_probabilities(name: str) -> None:
    model, info = models()[name]
    n = 20_000
    with torch.no_grad():
        expected = n * model.log_prob(all_states(info)).exp()
    place = torch.tensor([float(info.levels or 2) ** i for i in reversed(range(info.dim))], dtype=torch.float64)
    x = model.sample(n, torch.Generator().manual_seed(0))
    counts = torch.bincount((x @ place).long(), minlength=len(expected)).double()
    common = expected >= 5  # the rare states share one cell
    wanted = torch.cat([expected[common], expected[~common].sum().view(1)])
    observed = torch.cat([counts[common], counts[~common].sum().view(1)])
    filled = wanted > 0
    assert filled.sum() > 10
    assert chisquare(observed[filled], wanted[filled]).pvalue > 1e-3


def test_continuous_samples_have_the_distribution_of_the_density() -> None:
    model = scrambled(CausalConvNet(DataInfo(2, "continuous"), **TINY, components=3, octaves=2), scale=0.2)
    axis = torch.linspace(-14, 14, 561, dtype=torch.float64)
    cuts = torch.tensor([-1.475, -0.475, 0.475, 1.475], dtype=torch.float64)  # half way between grid points
    side = torch.bucketize(axis, cuts)
    with torch.no_grad():
        p = model.log_prob(torch.cartesian_prod(axis, axis)).exp()
    wanted = torch.zeros(25, dtype=torch.float64).index_add_(0, (5 * side[:, None] + side).flatten(), p / p.sum())
    n = 20_000
    where = torch.bucketize(model.sample(n, torch.Generator().manual_seed(0)).contiguous(), cuts)
    observed = torch.bincount(5 * where[:, 0] + where[:, 1], minlength=25).double()
    filled = n * wanted >= 5
    assert filled.sum() > 10
    wanted = wanted[filled] / wanted[filled].sum()
    assert chisquare(observed[filled], wanted * observed[filled].sum()).pvalue > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_cached_sampling_equals_naive_sampling(name: str) -> None:
    model, info = models()[name]
    fast = model.sample(64, torch.Generator().manual_seed(5))
    g = torch.Generator().manual_seed(5)
    x = torch.zeros(64, info.dim, dtype=torch.float64)
    with torch.no_grad():
        for i in range(info.dim):
            x[:, i] = model.head.sample(model.conditionals(x)[:, i], g)
    assert model.nfe == info.dim
    torch.testing.assert_close(fast, x, atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_loss_without_dropout_is_the_mean_negative_log_likelihood(name: str) -> None:
    model, info = models()[name]
    x = data(info, 32)
    loss = model.train().loss(x, torch.Generator().manual_seed(0))
    torch.testing.assert_close(loss, -model.log_prob(x).mean(), atol=0, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_dropout_is_for_training_only_and_draws_from_the_given_generator(name: str) -> None:
    model, info = models(dropout=0.5)[name]
    x = data(info, 32)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    exact = -model.log_prob(x).mean()
    assert torch.equal(model.loss(x, torch.Generator().manual_seed(1)), exact)
    model.train()
    first, again, other = (model.loss(x, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    model.sample(8, torch.Generator().manual_seed(1))
    assert torch.equal(first, again)
    assert first != other
    assert first != exact
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", DISCRETE)
def test_a_surprising_pixel_costs_what_it_is_worth(name: str) -> None:
    model, info = models()[name]
    x = torch.zeros(1, info.dim, dtype=torch.float64)
    with torch.no_grad():
        model.output_bias[1:] -= 500.0
        assert -model.log_prob(x + 1) > 400 * info.dim


def test_score_is_the_gradient_of_log_prob() -> None:
    model, info = models()["conv-continuous"]
    x = data(info, 5)
    step = 1e-5 * torch.eye(info.dim, dtype=torch.float64)
    slope = torch.stack([(model.log_prob(x + s) - model.log_prob(x - s)) / 2e-5 for s in step], 1)
    torch.testing.assert_close(model.score(x), slope, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("entry", [CAUSAL_CONV, GATED_PIXELCNN])
def test_entries_build_with_their_defaults_on_each_of_their_domains(entry) -> None:  # type: ignore[no-untyped-def]
    shapes = {
        "continuous": DataInfo(2, "continuous"),
        "levels": DataInfo(64, "levels", 17, (8, 8)),
        "bits": DataInfo(64, "bits", 2, (8, 8)),
    }
    for domain in entry.domains:
        changed = {k: v for k, v in entry.overrides.get(domain, {}).items() if k in entry.params}
        info = shapes[domain]
        model = entry.build(info, **{**entry.params, **changed})
        assert model.log_prob(data(info, 3).float()).shape == (3,)
        assert model.sample(2, torch.Generator()).shape == (2, info.dim)


def test_pixelcnn_refuses_data_without_rows() -> None:
    with pytest.raises(ValueError, match="causal-conv"):
        GatedPixelCNN(DataInfo(6, "levels", 3))
