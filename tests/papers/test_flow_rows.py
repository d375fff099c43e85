"""Rows of flows of dequantised images: on a few made-up images, killed and resumed, and compared with their entropy."""

from __future__ import annotations

import importlib
import itertools
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.sessions import Sitting, found
from torch import Tensor

from baselines.image_flow import GLOW, IMAGE_SPLINE_FLOW
from baselines.maf import MAF, build_maf
from replicate.experiments import Experiment, Paper, Run, image_flows
from replicate.experiments import image_rows as rows
from replicate.ledger.claims import claims_of
from replicate.likelihood.dequantisation import Preprocessed
from replicate.model import DataInfo, LogLikelihood
from replicate.papers.realnvp import couplings
from replicate.runs.experiment import MAX_PIXELS, Outcome
from replicate.runs.seeds import Streams
from replicate.tasks import images
from replicate.tasks.base import Task

PAPERS: tuple[Paper, ...] = tuple(
    importlib.import_module(f"replicate.papers.{key}").PAPER for key in ("realnvp", "glow", "maf")
)
EXPERIMENTS = [(paper, experiment) for paper in PAPERS for experiment in paper.experiments]
LABELS = [experiment.name for _, experiment in EXPERIMENTS]
TRANSFORMS = ("logit", "pooled-logit", "gaussianise")
#: what each experiment shrinks to, where it has the setting
TINY: dict[str, Any] = {
    "depth": 2,
    "hidden": 4,
    "layers": 1,
    "bins": 4,
    "steps": 6,
    "warmup": 2,
    "batch_size": 10,
    "validate_every": 2,
    "draws": 4,
}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images_of(levels: int, sides: tuple[int, int], sizes: tuple[int, int, int]) -> Task:
    """Pixels without any structure: the entropy of an image is D log(levels), whatever has been learned."""
    dim = sides[0] * sides[1]
    return Task("mnist", "made up", DataInfo(dim, "levels", levels, sides), *fair(levels, dim, sizes))


def fair(levels: int, dim: int, sizes: tuple[int, int, int]) -> tuple[Tensor, ...]:
    return torch.randint(levels, (sum(sizes), dim), generator=generator()).float().split(sizes)


def new_run(experiment: Experiment, seed: int = 0, **changes: object) -> Run:
    params = {k: TINY.get(k, v) for k, v in experiment.params.items()} | changes
    return Run(params, Streams(experiment.name, "t", seed), torch.device("cpu"))


@pytest.fixture
def small_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """30 + 20 + 12 images of 4 x 4 pixels, or of three colours at 2 x 2, with two levels."""
    task = images_of(2, (4, 4), (30, 20, 12))
    colour = Task("cifar-10", "made up", DataInfo(12, "levels", 2), *fair(2, 12, (30, 20, 12)))
    for module in (images, rows):
        monkeypatch.setattr(module, "COLOUR_SHAPE", (3, 2, 2))
    loads = {"mnist": lambda: task, "fashion-mnist": lambda: task, "cifar-10": lambda: colour}
    monkeypatch.setattr(image_flows, "task_entry", lambda name: SimpleNamespace(load=loads[name]))


@pytest.mark.usefixtures("small_images")
@pytest.mark.parametrize(("paper", "experiment"), EXPERIMENTS, ids=LABELS)
def test_a_row_is_measured_as_its_claims_name_it_and_killed_twice_ends_with_the_same_bits(
    paper: Paper, experiment: Experiment
) -> None:
    def run() -> Outcome:
        return experiment.measure(new_run(experiment))

    undisturbed = Sitting()
    want = undisturbed.outcome(run)
    assert want is not None
    part = math.ceil(0.35 * undisturbed.count)
    first = Sitting(last=part)
    assert first.outcome(run) is None
    second = Sitting(first.kept, last=part)
    assert second.outcome(run) is None
    rest = Sitting(second.kept)
    outcome = rest.outcome(run)
    assert outcome is not None
    assert found(outcome) == found(want)
    (data,) = want.examples
    assert torch.equal(outcome.examples[data].values, want.examples[data].values)
    assert first.count + second.count + rest.count == undisturbed.count
    check(want, data, 12 if data == "cifar-10" else 16)
    for claim in claims_of(paper).claims:
        if claim.experiment == experiment.name:
            assert claim.measure in want.estimates
            assert set(claim.plots) <= {plot.name for plot in want.plots}


def check(outcome: Outcome, data: str, dim: int) -> None:
    """Bounds of every test image, in nats and in bits per dimension; an image row a record can hold."""
    log_p = outcome.examples[data]
    assert (log_p.kind, log_p.draws, log_p.values.shape) == ("lower_bound", 4, (12,))
    for variant in ("", ":iw_bound"):
        nll, bits = outcome.estimates[f"nll{variant}"], outcome.estimates[f"bits_per_dim{variant}"]
        assert (nll.kind, bits.kind, bits.unit, bits.n) == ("upper_bound", "upper_bound", "bits/dim", 12)
        assert bits.value == pytest.approx(nll.value / (dim * math.log(2)))
    assert -log_p.mean().value == outcome.estimates["nll"].value
    assert outcome.estimates["nll:iw_bound"].value <= outcome.estimates["nll"].value
    curve, sheet = outcome.plots
    assert list(curve.lines[0].x) == [2, 4, 6]
    assert all(math.isfinite(v) for v in curve.lines[0].y)
    assert [line.label for line in sheet.lines] == ["data", "samples"]
    mean_of_colours = {0.0, 1 / 3, 2 / 3, 1.0}
    shown = {round(value, 6) for line in sheet.lines for value in line.y}
    assert shown <= ({0.0, 1.0} if dim == 16 else {round(value, 6) for value in mean_of_colours})
    assert rows.IN_A_ROW * 28 * 28 <= MAX_PIXELS


@pytest.mark.usefixtures("small_images")
@pytest.mark.parametrize("name", ["realnvp-mnist", "glow-spline-mnist", "maf-mnist"])  # each way to dequantise
def test_no_flow_beats_the_entropy_of_made_up_images(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """PITFALLS 1: trained on fair coins a flow needs a bit a pixel or more. Noise on half a bin would need none."""
    task = images_of(2, (4, 4), (400, 50, 200))
    monkeypatch.setattr(image_flows, "task_entry", lambda name: SimpleNamespace(load=lambda: task))
    experiment = EXPERIMENTS[LABELS.index(name)][1]
    layers: dict[str, Any] = {"depth": 1} if "depth" in experiment.params else {}
    what = new_run(experiment, steps=30, batch_size=50, validate_every=15, lr=5e-3, hidden=8, **layers)
    estimates = experiment.measure(what).estimates
    for metric in ("bits_per_dim", "bits_per_dim:iw_bound"):
        assert 1 - 2 * estimates[metric].stderr < estimates[metric].value < 2.5


def untrained(transform: str, entry: Any = GLOW, levels: int = 2) -> tuple[Preprocessed, Tensor]:
    """A flow of 2 x 2 pixels with random weights behind a fitted transform, and all levels ** 4 images."""
    task = images_of(levels, (2, 2), (200, 1, 1))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        small = {"depth": 1, "hidden": 4, "dropout": 0.0} if entry is not MAF else {"hidden": 8}
        inner = entry.build(task.info, **small)
        model = image_flows.preprocessed(inner, task.info, transform, 1e-3)
        model.initialise(task.train, generator())
        for p in inner.parameters():
            p.data += 0.1 * torch.randn(p.shape)
    every = torch.tensor(list(itertools.product(range(levels), repeat=4))).float()
    return model, every


def many_draws(model: Preprocessed, x: Tensor, draws: int) -> Tensor:
    """As `by_draw`, 500 draws of an image at a time."""
    return image_flows.by_draw(model, x.repeat_interleave(500, 0), draws // 500, generator(1)).view(len(x), draws)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("entry", [GLOW, IMAGE_SPLINE_FLOW, MAF], ids=["glow", "splines", "maf"])
def test_probabilities_of_all_images_sum_to_one(transform: str, entry: Any) -> None:
    """The mean over the noise of density times volume is P(x): every log-determinant is accounted for, once."""
    model, every = untrained(transform, entry)
    p = many_draws(model, every, 1500).exp()
    stderr = float(p.std(1).square().sum().sqrt()) / math.sqrt(1500)
    assert stderr < 0.05
    assert float(p.mean(1).sum()) == pytest.approx(1.0, abs=4 * stderr)


def test_the_mean_over_draws_is_below_the_log_of_the_mean_density_and_both_below_log_p() -> None:
    model, every = untrained("logit", levels=3)
    plain, tight = image_flows.bounds(image_flows.by_draw(model, every, 50, generator(2)))
    truth = many_draws(model, every, 2000).logsumexp(1) - math.log(2000)
    assert (plain.values <= tight.values).all()
    assert float((truth - tight.values).mean()) > 0
    assert (plain.kind, tight.kind, tight.draws) == ("lower_bound", "lower_bound", 50)
    assert isinstance(plain, LogLikelihood)


def test_pooled_logits_have_one_mean_and_one_deviation_and_keep_the_volume() -> None:
    x = images_of(4, (4, 4), (300, 1, 1)).train
    transform = image_flows.PooledLogit(16, 4, alpha=0.05)
    transform.fit(x, generator())
    z, _ = transform(x, generator())
    assert float(z.mean()) == pytest.approx(0, abs=1e-5)
    assert float(z.std()) == pytest.approx(1, abs=1e-5)
    assert len(transform.mean.unique()) == len(transform.std.unique()) == 1
    assert torch.equal(transform.inverse(z), x)


@pytest.mark.usefixtures("small_images")
def test_noise_drawn_once_stays_and_noise_drawn_afresh_does_not() -> None:
    """The training images that the flow itself sees."""
    experiment = couplings
    for once in (True, False):
        what = new_run(experiment, noise_once=once)
        task, seen = image_flows.task_entry("mnist").load(), list[Tensor]()
        with what.streams.initialisation():
            inner = build_maf(task.info, blocks=1, hidden=4)
        model = image_flows.preprocessed(inner, task.info, "logit", 1e-6)
        inner.layers[0].register_forward_hook(lambda m, args, out, seen=seen: seen.append(args[0]))
        settings = image_flows.CouplingSettings(**{**what.settings, "steps": 9, "validate_every": 0})
        image_flows.fitted(model, task.train, task.valid, settings, what.streams)
        rows = torch.cat(seen[1:])  # the first is what the actnorm was initialised from
        assert len(rows) == 90  # three passes over 30 images
        assert len(rows.unique(dim=0)) == (30 if once else 90)


@pytest.mark.usefixtures("small_images")
def test_rows_limits_every_part_and_the_seed_decides() -> None:
    experiment = couplings
    seven = experiment.measure(new_run(experiment, rows=7, batch_size=7))
    assert seven.estimates["nll"].n == 7
    again, other = (experiment.measure(new_run(experiment, seed, rows=7, batch_size=7)) for seed in (0, 1))
    assert found(again) == found(seven) != found(other)


def test_rows_are_of_the_full_profile_on_a_gpu_for_ten_minutes_at_most() -> None:
    for _, experiment in EXPERIMENTS:
        assert experiment.profiles == ("full",)
        assert experiment.seeds == 3
        assert experiment.params["rows"] == 0
        assert 0 < experiment.cuda_minutes <= 10


@pytest.mark.parametrize("paper", PAPERS, ids=lambda p: p.key)
def test_claims_read_and_name_what_the_experiments_have(paper: Paper) -> None:
    names = {e.name for e in paper.experiments}
    claims = claims_of(paper).claims
    assert names == {c.experiment for c in claims if c.experiment}
    for claim in claims:
        assert claim.profile == "full"
        assert claim.needs
        if claim.minus:
            assert claim.minus.split("/")[0] in set(LABELS)


def test_a_row_of_colour_images_fits_a_record_and_mirrored_images_are_their_own_mirror() -> None:
    x = torch.arange(6 * 3072).remainder(256).float().view(6, 3072)
    (line,) = rows.sheet("samples", "", {"data": x}, DataInfo(3072, "levels", 256)).lines
    assert len(line.y) == 4 * 32 * 32 <= MAX_PIXELS
    assert line.y[33] == pytest.approx(float(x[0, [33, 1024 + 33, 2048 + 33]].mean()) / 255)
    once = images.mirrored(x)
    assert torch.equal(once[0, :32], x[0, :32].flip(0))
    assert torch.equal(images.mirrored(once), x)
