"""Convolutional energies against finite differences, closed forms, quadrature and the suite's own sampler."""

from __future__ import annotations

import math
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

from baselines.conv_ebm import CONV_EBM, ConvEBM, ConvSettings, TiltedConvEBM, conv_net, langevin
from replicate.likelihood.ais import bracket, schedule
from replicate.likelihood.quadrature import log_z
from replicate.model import DataInfo, Model, Training
from replicate.resume import Journal
from replicate.runs.checkpoint import pack, unpack
from replicate.runs.seeds import Streams
from replicate.runs.training import train
from replicate.sampling.langevin import ula

SMALL = DataInfo(36, "continuous", image=(6, 6))
PLANE = DataInfo(2, "continuous", image=(1, 2))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(n: int, info: DataInfo = SMALL) -> Tensor:
    """Smooth random images between -1 and 1."""
    return torch.tanh(torch.randn(n, info.dim, generator=seeded(7)).cumsum(1) / 3)


def short_run(chains: int = 40, steps: int = 3, **settings: float) -> ConvEBM:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ConvEBM(SMALL, ConvSettings(width=3, layers=2, chains=chains, steps=steps, **settings))


Kind = TypeVar("Kind", bound=Model)


def awake(model: Kind) -> Kind:
    """The model in float64, its last layer no longer at zero."""
    model = model.double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=seeded(1), dtype=p.dtype))
    return model


def tilted(info: DataInfo, **settings: Any) -> TiltedConvEBM:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return TiltedConvEBM(info, width=4, layers=2, **settings)


@pytest.mark.parametrize("kind", ["short run", "tilted"])
def test_the_score_is_minus_the_energys_slope(kind: str) -> None:
    model = awake(short_run() if kind == "short run" else tilted(SMALL))
    x, step = images(3).double(), 1e-5
    score = model.score(x)
    for pixel in (0, 17, 35):
        shift = torch.zeros(36, dtype=torch.float64)
        shift[pixel] = step
        with torch.no_grad():
            slope = (model.energy(x + shift) - model.energy(x - shift)) / (2 * step)
        torch.testing.assert_close(score[:, pixel], -slope, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_chains_at_a_temperature_have_the_variance_of_the_closed_form(temperature: float) -> None:
    variance, eps = 0.5, 0.4
    x = langevin(
        lambda x: x.square().sum(1) / (2 * variance),
        torch.zeros(20_000, 2, dtype=torch.float64),
        60,
        eps,
        seeded(),
        temperature,
    )
    expected = temperature * variance / (1 - eps / (4 * temperature * variance))
    assert float(x.square().mean()) == pytest.approx(expected, rel=5 * math.sqrt(2 / 40_000))


def test_the_chain_is_the_suites_own() -> None:
    model, x = awake(short_run()), images(5).double()
    ours = langevin(model.energy, x, 4, 0.01, seeded(3), 1.5)
    assert torch.equal(ours, ula(model.score, x, 4, 0.01, seeded(3), 1.5).samples)


def test_one_step_is_that_of_the_released_code_for_the_network() -> None:
    """x + grad f + 0.01 z with f = -u: the folded energy moves by its own slope, at temperature 1 of U."""
    model = awake(short_run(langevin_sd=0.01))
    x = images(4).double().requires_grad_(True)
    (slope,) = torch.autograd.grad(model.folded(x).sum(), x)
    z = torch.randn(x.shape, generator=seeded(2), dtype=x.dtype)
    torch.testing.assert_close(model.run(x, 1, seeded(2)), x.detach() - slope + 0.01 * z)


def after_a_loss(restart: float, steps: int = 0) -> tuple[ConvEBM, Tensor]:
    model = short_run(restart=restart, steps=steps, chains=4000)
    model.initialise(images(100), seeded())
    before = model.replay.clone()
    model.loss(images(1500), seeded(1))
    return model, (model.replay != before).any(1)


def test_a_share_of_the_batchs_chains_starts_again_and_the_others_go_on() -> None:
    """Without Langevin steps a chain changes only where it starts again."""
    _, changed = after_a_loss(restart=0.2)
    assert abs(int(changed.sum()) - 300) < 5 * math.sqrt(1500 * 0.2 * 0.8)
    model, changed = after_a_loss(restart=1.0)
    assert int(changed.sum()) == 1500
    assert model.nfe == 0
    _, changed = after_a_loss(restart=1e-9, steps=1)
    assert int(changed.sum()) == 1500


def test_noise_starts_uniform_over_the_datas_range() -> None:
    model, data = short_run(), 3 * images(200) + 1
    model.initialise(data, seeded())
    low, high = float(data.min()), float(data.max())
    start = model.start(5000, seeded(1))
    assert low <= float(start.min())
    assert float(start.max()) <= high
    assert float(start.mean()) == pytest.approx((low + high) / 2, abs=0.01 * (high - low))
    assert float(start.std()) == pytest.approx((high - low) / math.sqrt(12), rel=0.01)


def test_the_update_is_the_difference_of_mean_slopes_and_does_not_pass_through_the_chains() -> None:
    model = awake(short_run(penalty=0.0, noise=0.0, chains=8))
    model.initialise(images(20).double(), seeded())
    batch = images(8).double()
    parameters = list(model.parameters())
    found = torch.autograd.grad(model.loss(batch, seeded(1)), parameters)
    gap = model.folded(batch).mean() - model.folded(model.replay).mean()
    for a, b in zip(found, torch.autograd.grad(gap, parameters), strict=True):
        torch.testing.assert_close(a, b)


def learned(saved: bytes | None = None, last: int = 0) -> tuple[dict[str, Tensor], bytes]:
    """The state after training under a journal that saves every step and dies after save `last`; what was saved."""
    kept, count = saved or b"", 0

    class Killed(BaseException):
        """Stands for kill -9."""

    def write(state: dict[str, object]) -> None:
        nonlocal kept, count
        count += 1
        if count == last:
            kept = pack(state)
            raise Killed

    model = short_run(restart=0.3)
    settings = Training(steps=12, batch_size=8, lr=1e-2, ema=0.9, weight_decay=0.1)
    journal = Journal(write, unpack(saved) if saved else None, every=0, shortest=0)
    with journal.active():
        try:
            train(model, images(50), images(10), settings, Streams("t", "conv-ebm", 0))
        except Killed:
            return {}, kept
    return model.state_dict(), kept


def test_training_killed_twice_ends_with_the_same_bits_and_the_same_chains() -> None:
    want, _ = learned()
    _, first = learned(last=5)
    _, second = learned(first, last=3)
    again, _ = learned(second)
    assert "replay" in want
    assert want.keys() == again.keys()
    assert all(torch.equal(value, again[key]) for key, value in want.items())


def test_an_untrained_tilt_is_the_gaussian_itself() -> None:
    model = tilted(SMALL, chains=16)
    model.initialise(images(200), seeded())
    x = images(5)
    torch.testing.assert_close(model.energy(x), -model.base.log_prob(x))
    both = bracket(model, 10, schedule(5), seeded(1), start=model.base_sample(10, seeded(2)))
    assert both.log_z.value == pytest.approx(0, abs=1e-6)


def test_annealing_brackets_the_log_z_of_quadrature() -> None:
    model = tilted(PLANE, chains=16, moves=3, sweeps=(30, 20))
    model.initialise(torch.randn(400, 2, generator=seeded()), seeded())
    with torch.no_grad():
        for p in model.g.parameters():
            p.add_(0.7 * torch.randn(p.shape, generator=seeded(1)))
    truth = log_z(lambda x: -model.energy(x), 9.0, 200).value
    both = bracket(model, 200, schedule(40), seeded(2))
    assert abs(truth) > 0.1
    assert both.forward.log_z.value == pytest.approx(truth, abs=5 * both.forward.log_z.stderr + 0.01)
    assert both.reverse.log_z.value == pytest.approx(truth, abs=5 * both.reverse.log_z.stderr + 0.05)


@pytest.mark.parametrize("image", [(28, 28), (8, 8), (2, 2), (1, 2)])
def test_any_image_has_a_network_that_starts_at_zero_and_sees_every_pixel(image: tuple[int, int]) -> None:
    network = conv_net(image, 4, 3)
    dim = image[0] * image[1]
    x = torch.randn(2, dim, generator=seeded(), requires_grad=True)
    out = network(x)
    assert out.shape == (2, 1)
    assert not out.any()
    head = network[-1]
    assert isinstance(head, torch.nn.Linear)
    torch.nn.init.normal_(head.weight, generator=seeded(1))
    (slope,) = torch.autograd.grad(network(x).sum(), x)
    assert bool((slope != 0).all())


def test_the_entry_builds_on_images_and_says_what_it_needs_elsewhere() -> None:
    model = CONV_EBM.build(SMALL, **CONV_EBM.params)
    assert model.capabilities >= {"energy", "annealing", "sample"}
    with pytest.raises(ValueError, match="needs images"):
        CONV_EBM.build(DataInfo(2, "continuous"), **CONV_EBM.params)
    with pytest.raises(ValueError, match="restart"):
        short_run(restart=0.0)
