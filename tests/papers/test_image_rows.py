"""Rows on binarised MNIST and their like: readers, models and training on tiny data, and the claims' files."""

import importlib
import itertools
import math
from pathlib import Path

import pytest
import torch
from helpers.image_data import bits, small_images
from scipy import stats
from torch.utils.flop_counter import FlopCounterMode

from replicate.experiments import Experiment, Paper, Run
from replicate.ledger.claims import claims_of
from replicate.likelihood.importance import iw_bound
from replicate.papers import burda, mixture
from replicate.papers.burda import rows
from replicate.papers.burda.autoencoder import ImportanceWeightedAutoencoder, glorot
from replicate.papers.pixelcnn import PixelCNN
from replicate.runs.seeds import Streams

__all__ = ["small_images"]
KEYS = ("burda", "mixture", "pixelcnn", "realnvp", "maf")
TINY = {
    "stages": 2,
    "samples": 20,
    "rows": 40,
    "steps": 2,
    "validate_every": 1,
    "batch_size": 20,
    "iterations": 3,
    "width": 2,
    "layers": 1,
}


def paper(key: str) -> Paper:
    found: Paper = importlib.import_module(f"replicate.papers.{key}").PAPER
    return found


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def new_run(experiment: Experiment, seed: int = 0, **changes: object) -> Run:
    tiny = {k: v for k, v in TINY.items() if k in experiment.params}
    if "stages" in tiny:
        tiny.pop("layers", None)
    return Run({**experiment.params, **tiny, **changes}, Streams(experiment.name, "t", seed), torch.device("cpu"))


def test_idx_intensities_and_dynamic_bits(small_images: Path) -> None:
    x = rows.training_and_test(True)[0]
    assert x.shape == (460 - rows.HELD_OUT, 784)
    assert float(x.min()) >= 0
    assert float(x.max()) <= 1
    train, test = rows.training_and_test(True)
    assert len(train) == 460 - rows.HELD_OUT
    assert torch.equal(test, rows.training_and_test(True)[1])


def tiny_autoencoder(layers: int) -> ImportanceWeightedAutoencoder:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {1: ((2,), (6,)), 2: ((3, 2), (6, 5))}[layers]
        model = ImportanceWeightedAutoencoder(4, *sizes, draws=5, weighted=True)
        for p in model.parameters():  # a posterior near the prior, whose weights have light tails
            p.data *= 0.5
    return model.double()


@pytest.mark.parametrize("layers", [1, 2])
def test_weights_average_to_a_normalised_distribution(layers: int) -> None:
    """sum over all 16 rows of bits of the estimated p(x) is 1, and the bound grows from ELBO to IW."""
    model = tiny_autoencoder(layers)
    every = torch.tensor(list(itertools.product([0.0, 1.0], repeat=4)), dtype=torch.float64)
    bound = iw_bound(model, every, 20_000, generator())
    assert float(bound.values.exp().sum()) == pytest.approx(1, abs=0.02)
    assert bound.details["elbo"].value < float(bound.values.mean())


def test_objectives_are_those_of_the_paper() -> None:
    model, x = tiny_autoencoder(1), bits(7, 4).double()
    log_w = model.log_weights(x, 5, generator())
    assert torch.allclose(model.loss(x, generator()), -(log_w.exp().mean(1).log()).sum())
    model.weighted = False
    assert torch.allclose(model.loss(x, generator()), -log_w.mean(1).sum())


def gradients(model: ImportanceWeightedAutoencoder, x: torch.Tensor, seed: int) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model.loss(x, generator(seed)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_doubly_reparameterised_gradients_have_the_same_mean_and_less_variance() -> None:
    model, x = tiny_autoencoder(1), bits(1, 4).double()
    plain, doubly = {}, {}
    for switched, found in ((False, plain), (True, doubly)):
        model.doubly = switched
        draws = [gradients(model, x, seed) for seed in range(1500)]
        for name in draws[0]:
            found[name] = torch.stack([d[name].flatten() for d in draws])
    assert plain.keys() == doubly.keys()
    for name in (n for n in plain if n.startswith("output")):  # the decoder's are the very same
        assert torch.allclose(plain[name], doubly[name], rtol=1e-9, atol=1e-12)
    encoder = [n for n in plain if n.startswith("q")]
    a, b = (torch.cat([found[n] for n in encoder], 1) for found in (plain, doubly))
    z = (a.mean(0) - b.mean(0)) / ((a.var(0) + b.var(0)) / len(a)).sqrt()
    assert float(z[a.var(0) > 0].abs().max()) < 5
    assert float(b.var(0).sum()) < 0.7 * float(a.var(0).sum())


def test_doubly_reparameterised_gradients_are_for_one_weighted_layer() -> None:
    for latents, weighted in (((3, 2), True), ((2,), False)):
        with pytest.raises(ValueError, match="one stochastic layer"):
            ImportanceWeightedAutoencoder(4, latents, (6, 5)[: len(latents)], 5, weighted, doubly=True)


def test_schedule_and_optimizer_are_the_codes() -> None:
    stages = list(rows.schedule(rows.STAGES))
    assert sum(n for n, _ in stages) == 3280
    short = list(rows.schedule(rows.STAGES, rows.SHORTENED))
    assert [lr for _, lr in short] == [lr for _, lr in stages]
    assert [n for n, _ in short] == [1, 1, 1, 1, 1, 3, 9, 27]
    assert stages[0][1] == pytest.approx(1e-3)
    assert stages[-1][1] == pytest.approx(1e-4)
    assert [lr for _, lr in stages] == pytest.approx([1e-3 * 10 ** (-i / 7) for i in range(8)], rel=0.03)
    p = torch.tensor([1.0], dtype=torch.float64, requires_grad=True)
    p.grad = torch.tensor([2.0], dtype=torch.float64)
    rows.code_adam_step([p], [torch.zeros_like(p)], [torch.ones_like(p)], 1, 0.1)
    first, second = 0.01 * 2.0, 0.999 * 1.0 + 0.001 * 4.0
    rate = 0.1 * math.sqrt(1 - 0.999) / (1 - 0.99)
    assert float(p.detach()) == pytest.approx(1 - rate * first / (math.sqrt(second) + 1e-4), rel=1e-12)


def test_the_papers_schedule_is_more_than_an_hour_of_float32_arithmetic() -> None:
    """All rows, three seeds: over 60 minutes at 67 TFLOP/s, the float32 peak that is printed for H100 and H200 SXM."""
    operations = 0
    on_gpu = [experiment for experiment in rows.ROWS if experiment.cuda_minutes]
    for p in (experiment.params for experiment in on_gpu):
        sizes = rows.LATENTS[p["layers"]], rows.HIDDEN[p["layers"]]
        model = ImportanceWeightedAutoencoder(784, *sizes, p["draws"], p["weighted"], p["doubly"])
        with FlopCounterMode(display=False) as counter:
            model.loss(torch.zeros(p["batch_size"], 784), generator()).backward()
        batches = (60_000 - rows.HELD_OUT if p["dynamic"] else 50_000) // p["batch_size"]
        operations += 3 * 3280 * batches * counter.get_total_flops()
    assert len(on_gpu) == 16
    assert 60 < operations / 67e12 / 60 < 80


def test_glorot_start_and_output_bias() -> None:
    layer = glorot(30, 10)
    assert float(layer.weight.detach().abs().max()) <= math.sqrt(6 / 40)
    assert not layer.bias.any()
    model = tiny_autoencoder(1)
    x = bits(50, 4).double()
    model.initialise(x, generator())
    assert torch.allclose(model.output.bias.sigmoid(), x.mean(0).clamp(0.001, 0.999))


def test_masked_stack_is_causal_and_normalised() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = PixelCNN((2, 3), 8, 2)
    every = torch.tensor(list(itertools.product([0.0, 1.0], repeat=6)))
    assert float(model.log_prob(every).exp().sum().detach()) == pytest.approx(1, abs=1e-5)
    x = bits(1, 6)
    jacobian = torch.autograd.functional.jacobian(model.logits, x).view(6, 6)
    assert not torch.triu(jacobian).any()
    assert torch.tril(jacobian, -1).any()


def test_mixture_of_one_component_is_the_marginals(small_images: Path) -> None:
    """K = 1: EM's answer in closed form, with the prior's pseudo-counts."""
    experiment = mixture.PAPER.experiments[0]
    found = experiment.measure(new_run(experiment, components=1)).estimates["nll"]
    train, test = bits(40, seed=0).double(), bits(40, seed=2).double()
    centre = (train.sum(0) + 0.5) / 41
    p = (train.sum(0) + 2.0 * centre) / 42
    exact = -stats.bernoulli.logpmf(test.numpy(), p.numpy()).sum(1).mean()
    assert found.value == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("key", KEYS)
def test_claims_read(key: str) -> None:
    claims = claims_of(paper(key))
    images = [c for c in claims.claims if c.experiment != "burda-bounds"]  # that one needs no data
    assert all(c.profile == "full" for c in images)
    assert all(c.needs for c in images)


@pytest.mark.parametrize("key", ["burda", "mixture", "pixelcnn"])
def test_experiments_run_small_and_measure_what_claims_name(key: str, small_images: Path) -> None:
    measured: dict[str, set[str]] = {}
    for experiment in (e for e in paper(key).experiments if e.files):
        assert experiment.profiles == ("full",)
        outcome = experiment.measure(new_run(experiment))
        assert all(math.isfinite(e.value) for e in outcome.estimates.values())
        (log_p,) = outcome.examples.values()
        assert -float(log_p.values.mean()) == pytest.approx(outcome.estimates["nll"].value)
        measured[experiment.name] = set(outcome.estimates)
        named = {p.name for p in outcome.plots}
        for claim in claims_of(paper(key)).claims:
            if claim.experiment == experiment.name:
                assert claim.measure in outcome.estimates
                assert set(claim.plots) <= named
    for claim in claims_of(paper(key)).claims:
        for measure in (claim.measure, claim.minus):
            task, _, metric = ("", "", measure) if "/" not in measure else measure.split("/")
            assert task not in measured or metric in measured[task]
            if "/" in claim.minus:
                assert claim.minus.split("/")[0] in measured


def test_training_is_reproducible(small_images: Path) -> None:
    experiment = burda.PAPER.experiments[-1]
    first, again = (experiment.measure(new_run(experiment)).estimates["nll"].value for _ in range(2))
    other = experiment.measure(new_run(experiment, seed=1)).estimates["nll"].value
    assert first == again != other


def test_experiments_know_when_their_files_are_absent(
    small_images: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    every = [e for key in ("burda", "mixture", "pixelcnn") for e in paper(key).experiments if e.files]
    assert not any(e.absent("cuda") for e in every)
    assert all("needs a CUDA device" in e.absent() for e in every if e.cuda_minutes)
    monkeypatch.setenv("REPLICATE_DATA", str(tmp_path_factory.mktemp("empty")))
    assert all("which is not there" in e.absent("cuda") for e in every)
