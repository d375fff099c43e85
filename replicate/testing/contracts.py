"""The contract tests of a model: `pytest --pyargs replicate.testing.contracts` runs them on every registered model.

With `-k NAME` they run on one, such as a plug-in's. Each model is trained for a few steps on a small task in the plane
or on tiny images, and then every capability that it declares is tested. pytest must be installed.
"""

import copy
import math
from dataclasses import replace
from functools import cache

import pytest
import torch

from replicate.likelihood.dequantisation import Preprocessed
from replicate.likelihood.quadrature import grid
from replicate.model import CAPABILITIES, FAMILIES, DataInfo, Model
from replicate.registry import models
from replicate.runs.seeds import Streams
from replicate.runs.spec import RunSpec, make_spec
from replicate.runs.subjects import build_model
from replicate.runs.training import train
from replicate.tasks.base import Task
from replicate.tasks.loading import load_task, unsupported

PLANE = "two-moons"
DISCRETE = ("levels", "bits")
#: a task of each domain
TASKS = {"continuous": PLANE, "levels": "digits", "bits": "digits-binary"}
STEPS = 60


@cache
def tiny_levels(levels: int) -> Task:
    """Make 2 x 2 images whose pixels mostly copy their left neighbour: 4 dimensions, enumerable."""
    g = torch.Generator().manual_seed(levels)
    first = torch.randint(levels, (400, 2), generator=g)
    other = torch.randint(levels, (400, 2), generator=g)
    second = torch.where(torch.rand((400, 2), generator=g) < 0.7, first, other)
    x = torch.stack([first[:, 0], second[:, 0], first[:, 1], second[:, 1]], 1).float()
    info = DataInfo(4, "bits" if levels == 2 else "levels", levels, (2, 2))
    return Task("tiny", "", info, x[:300], x[300:350], x[350:])


def built(name: str, domain: str) -> tuple[Model, Task, RunSpec, Streams]:
    """Build a model for the plane, or for tiny images with the parameters that its entry gives for the domain."""
    spec, streams = make_spec(name, TASKS[domain], 0, "smoke"), Streams("contract", name, 0)
    task = load_task(PLANE) if domain == "continuous" else tiny_levels({"levels": 3, "bits": 2}[domain])
    return build_model(spec, task, streams), task, spec, streams


@cache
def trained(name: str, domain: str) -> tuple[Model, Task]:
    """Train a model for a few steps."""
    model, task, spec, streams = built(name, domain)
    training = replace(spec.training, steps=min(STEPS, spec.training.steps), batch_size=64, validate_every=0)
    train(model, task.train[:1000], task.valid[:200], training, streams)
    return model, task


def supporting(domain: str) -> list[str]:
    """Return the names of the models that run on the domain."""
    task = load_task(TASKS[domain])
    return [n for n, e in sorted(models().items()) if unsupported(e, task) is None]


@cache
def capabilities(name: str, domain: str) -> frozenset[str]:
    """Return the capabilities that a model declares on the domain."""
    return built(name, domain)[0].capabilities


def having(domain: str, capability: str) -> list[str]:
    """Return the names of the models that declare the capability on the domain."""
    return [name for name in supporting(domain) if capability in capabilities(name, domain)]


def having_both(*both: str) -> list[str]:
    """Return the names of the models that declare both capabilities in the plane."""
    return [name for name in supporting("continuous") if capabilities(name, "continuous").issuperset(both)]


def gen(seed: int = 0) -> torch.Generator:
    """Return a generator of this seed."""
    return torch.Generator().manual_seed(seed)


@cache
def drawn(name: str) -> torch.Tensor:
    """Draw thirty samples of a model in the plane."""
    model, _ = trained(name, "continuous")
    return model.sample(30, gen())


@pytest.mark.parametrize("name", sorted(models()))
def test_entry_names_a_family_and_a_paper(name: str) -> None:
    entry = models()[name]
    assert entry.family in FAMILIES
    assert entry.about
    assert entry.paper


@pytest.mark.parametrize(("name", "domain"), [(n, d) for d in TASKS for n in supporting(d)])
def test_declared_capabilities_are_known_and_the_model_trains(name: str, domain: str) -> None:
    model, _ = trained(name, domain)
    assert model.capabilities <= set(CAPABILITIES)
    assert model.family == models()[name].family


@pytest.mark.parametrize("name", having("continuous", "log_prob"))
def test_exact_density_integrates_to_one(name: str) -> None:
    model, task = trained(name, "continuous")
    assert task.density is not None
    nodes, log_cell = grid(3 * task.density.half_width, 400, 2)
    with torch.no_grad():
        parts = [model.log_prob(p).double().logsumexp(0) for p in nodes.split(65536)]
    total = torch.stack(parts).logsumexp(0) + log_cell
    assert abs(float(total)) < 5e-3


@pytest.mark.parametrize(("name", "domain"), [(n, d) for d in DISCRETE for n in having(d, "log_prob")])
def test_exact_masses_sum_to_one(name: str, domain: str) -> None:
    model, task = trained(name, domain)
    levels = task.info.levels
    assert levels is not None
    states = torch.cartesian_prod(*[torch.arange(levels).float()] * 4)
    with torch.no_grad():
        total = float(model.log_prob(states).double().logsumexp(0))
    assert abs(total) < 1e-4


@pytest.mark.parametrize("name", having_both("log_prob", "sample"))
def test_samples_agree_with_the_density(name: str) -> None:
    """Compare counts of samples in coarse cells with the cells' probabilities by quadrature (chi-square)."""
    model, task = trained(name, "continuous")
    half, cells, fine = 2 * float(task.train.abs().max()), 10, 30
    nodes, log_cell = grid(half, cells * fine, 2)
    with torch.no_grad():
        p = torch.cat([model.log_prob(part).double() for part in nodes.split(65536)]).add(log_cell).exp()
    p = p.view(cells, fine, cells, fine).sum((1, 3))
    n = 4000
    x = model.sample(n, gen()).detach()
    index = ((x + half) / (2 * half) * cells).floor().long()
    inside = ((index >= 0) & (index < cells)).all(1)
    counts = torch.zeros(cells, cells, dtype=torch.float64)
    counts.index_put_((index[inside, 0], index[inside, 1]), torch.ones((), dtype=torch.float64), accumulate=True)
    expected = n * p
    busy = expected >= 5
    chi2 = float(((counts - expected)[busy] ** 2 / expected[busy]).sum())
    rest = float(counts[~busy].sum() + (n - counts.sum()))
    rest_expected = n - float(expected[busy].sum())
    degrees = int(busy.sum())
    assert chi2 < degrees + 4.5 * math.sqrt(2 * degrees)
    assert abs(rest - rest_expected) < 5 * math.sqrt(max(rest_expected, 0) + 1) + 0.003 * n


@pytest.mark.parametrize(("name", "of"), [(n, of) for of in ("log_prob", "energy") for n in having_both("score", of)])
def test_score_is_the_gradient_of_log_p_and_minus_that_of_the_energy(name: str, of: str) -> None:
    model, task = trained(name, "continuous")
    x = task.test[:50].clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad((model.log_prob(x) if of == "log_prob" else -model.energy(x)).sum(), x)
    torch.testing.assert_close(model.score(x.detach()).detach(), gradient, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", supporting("continuous"))
def test_same_generators_give_the_same_bits_and_the_global_one_is_untouched(name: str) -> None:
    model, task = trained(name, "continuous")
    before = torch.get_rng_state()
    if "sample" in model.capabilities:
        first = drawn(name)
        assert torch.equal(model.sample(30, gen()), first)
        assert not torch.equal(model.sample(30, gen(4)), first)
    if models()[name].training.steps:
        # a copy each: persistent chains move with every call
        a, b = (float(copy.deepcopy(model).train().loss(task.train[:64], gen(5)).detach()) for _ in range(2))
        assert a == b
        assert math.isfinite(a)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("name", "domain"), [(n, d) for d in DISCRETE for n in having(d, "sample")])
def test_discrete_samples_are_levels(name: str, domain: str) -> None:
    model, task = trained(name, domain)
    x = model.sample(50, gen()).detach()
    assert x.shape == (50, 4)
    assert set(x.flatten().tolist()) <= set(range(task.info.levels or 0))


@pytest.mark.parametrize("name", having("continuous", "sample"))
def test_continuous_samples_have_shape_and_are_finite(name: str) -> None:
    model, _ = trained(name, "continuous")
    x = drawn(name)
    assert x.shape == (30, 2)
    assert bool(torch.isfinite(x).all())
    assert model.nfe >= 1


@pytest.mark.parametrize("name", supporting("continuous"))
def test_weights_survive_their_state_dictionary(name: str) -> None:
    """Rebuild a model from its spec and its state dictionary: it is the same model."""
    model, task = trained(name, "continuous")
    spec = make_spec(name, PLANE, 0, "smoke")
    again = build_model(spec, task, Streams("contract", name, 99))
    if isinstance(model, Preprocessed) or "log_prob" in model.capabilities:
        for key, value in model.state_dict().items():
            target = dict(again.named_buffers()) | dict(again.named_parameters())
            if key in target and target[key].shape != value.shape:
                pytest.skip("its buffers take their size from the data")
    again.load_state_dict(model.state_dict())
    again.eval()
    x = task.test[:20]
    if "log_prob" in model.capabilities:
        torch.testing.assert_close(again.log_prob(x), model.log_prob(x))
    elif "score" in model.capabilities:
        torch.testing.assert_close(again.score(x), model.score(x))
