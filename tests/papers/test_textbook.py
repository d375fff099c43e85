"""The textbook's numbers: what its code computes, what a bound is, and that the claims read."""

import math

import pytest
import torch
from scipy import integrate, stats

from replicate.experiments import Experiment, Run
from replicate.ledger.claims import claims_of
from replicate.likelihood.dequantisation import DequantisedLogit
from replicate.likelihood.importance import iw_bound
from replicate.model import DataInfo
from replicate.papers.textbook import PAPER, notebooks
from replicate.papers.textbook.notebooks import (
    ARM,
    HALF_CELL,
    VAE,
    WHOLE_CELL,
    Loop,
    RealNVP,
    cell_noise,
    clamped_log_probability,
    dequantisation,
    early_stopped,
    level_log_probability,
    uniform_reference,
)
from replicate.runs.seeds import Streams
from replicate.tasks.loading import load_task

TINY = {"max_epochs": 1, "hidden": 8, "draws": 4, "channels": 4, "couplings": 2}


def new_run(experiment: Experiment, **changes: object) -> Run:
    settings = {**experiment.settings("standard"), **changes}
    return Run(settings, Streams(experiment.name, "textbook", 0), torch.device("cpu"))


def tiny(experiment: Experiment) -> Run:
    return new_run(experiment, **{k: v for k, v in TINY.items() if k in experiment.params})


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class HalfCellDensity(RealNVP):
    """The best density there is for noise U(0, 0.5]: P(x) 2^D on the half cells of the data, nothing elsewhere."""

    def __init__(self, p: torch.Tensor, width: float) -> None:
        super().__init__(2, 0, 1, width)
        self.p = p

    def log_prob(self, x: torch.Tensor) -> torch.Tensor:
        cell = (x.ceil() - 1).long().clamp(0, self.p.shape[0] - 1)
        inside = ((x - cell) <= 0.5).all(1)
        mass = self.p[cell[:, 0], cell[:, 1]] * 4
        return torch.where(inside, mass.log(), torch.tensor(-math.inf))


def levels_2d() -> tuple[torch.Tensor, torch.Tensor, float]:
    """A distribution of 3 x 3 levels, its support (9, 2), and its entropy by scipy."""
    p = torch.tensor([[0.3, 0.1, 0.02], [0.05, 0.2, 0.08], [0.05, 0.1, 0.1]])
    support = torch.cartesian_prod(torch.arange(3), torch.arange(3)).float()
    return p, support, float(stats.entropy(p.flatten().numpy()))


def test_the_printed_noise_violates_the_entropy_and_its_proper_weight_does_not() -> None:
    p, x, entropy = levels_2d()
    flow = HalfCellDensity(p, HALF_CELL)
    printed = float((p.flatten() * flow.printed_loss(x, generator())).sum())
    assert printed == pytest.approx(entropy - 2 * math.log(2), abs=1e-5)
    proper = -iw_bound(flow, x, 8, generator()).values
    assert float((p.flatten() * proper).sum()) == pytest.approx(entropy, abs=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_noise_over_the_cell_never_falls_below_the_entropy(seed: int) -> None:
    p, x, entropy = levels_2d()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        flow = RealNVP(2, 4, 16, WHOLE_CELL)
    many = x.repeat_interleave(2000, 0)
    printed = flow.printed_loss(many, generator(seed)).view(9, -1).mean(1)
    assert float((p.flatten() * printed.detach()).sum()) >= entropy


def test_a_trained_flow_falls_below_the_entropy_with_the_printed_noise_only() -> None:
    found = dequantisation.measure(new_run(dequantisation, max_epochs=8, draws=300)).estimates
    assert found["excess_over_entropy:half_cell"].value < 0
    assert found["excess_over_entropy:whole_cell"].value >= 0
    assert found["total_probability:half_cell"].value > 1 >= found["total_probability:whole_cell"].value


def test_realnvp_density_integrates_to_one() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        flow = RealNVP(2, 4, 8, HALF_CELL).double()
    axis = torch.linspace(-9, 9, 301, dtype=torch.float64)
    density = flow.log_prob(torch.cartesian_prod(axis, axis)).exp().detach().view(301, 301).numpy()
    total = integrate.simpson(integrate.simpson(density, axis.numpy()), axis.numpy())
    assert total == pytest.approx(1, abs=1e-4)


def test_bound_is_the_printed_number_plus_64_ln_2_at_the_same_noise() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        flow = RealNVP(64, 2, 8, HALF_CELL).double()
    x = load_task("digits").test[:100].double()
    printed = flow.printed_loss(x, generator(1)).mean()
    bound = -iw_bound(flow, x, 1, generator(1)).details["elbo"]
    assert bound.value - float(printed.detach()) == pytest.approx(64 * math.log(2), abs=1e-8)
    flow.width = WHOLE_CELL
    printed = flow.printed_loss(x, generator(1)).mean()
    bound = -iw_bound(flow, x, 1, generator(1)).details["elbo"]
    assert bound.value == pytest.approx(float(printed.detach()), abs=1e-8)


def test_clamp_changes_only_surprising_pixels() -> None:
    logits = torch.tensor([[0.0, 30.0], [0.0, 1.0]])
    x = torch.tensor([0.0, 1.0])
    printed, exact = clamped_log_probability(logits, x), level_log_probability(logits, x)
    assert printed[0] == pytest.approx(math.log(1e-5))
    assert exact[0] == pytest.approx(-30)
    assert printed[1] == exact[1] == pytest.approx(math.log(1 / (1 + math.exp(-1))))


def test_vae_weights_average_to_the_likelihood() -> None:
    """With one latent, log p(x) = log of the integral over z by scipy."""
    info = DataInfo(2, "levels", 3)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = VAE(info, 1, 8).double()
    x = torch.tensor([[0.0, 2.0]], dtype=torch.float64)

    def joint(z: float) -> float:
        logits = model.decode(torch.tensor([[z]], dtype=torch.float64)).view(1, 2, 3)
        return float(level_log_probability(logits, x).sum().exp().detach()) * stats.norm.pdf(z)

    exact = math.log(integrate.quad(joint, -8, 8)[0])
    bound = iw_bound(model, x, 20_000, generator())
    assert float(bound.values) == pytest.approx(exact, abs=0.01)
    assert bound.details["elbo"].value < exact


def test_scaled_entropy_is_the_early_release() -> None:
    """That release's log q has latent * log variance: the loss differs by half (latent - 1) times their sum."""
    info = DataInfo(4, "levels", 3)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        right = VAE(info, 3, 8)
    early = VAE(info, 3, 8, entropy_factor=3.0)
    early.load_state_dict(right.state_dict())
    x = torch.tensor([[0.0, 2.0, 1.0, 1.0]])
    log_var = right.encode(x).chunk(2, 1)[1]
    gap = early.printed_loss(x, generator()) - right.printed_loss(x, generator())
    assert float(gap.detach()) == pytest.approx(float(-0.5 * 2 * log_var.sum().detach()), rel=1e-4)


def test_arm_is_causal_and_normalised() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ARM(DataInfo(3, "levels", 3), 4, 7)
    every = torch.cartesian_prod(*[torch.arange(3)] * 3).float()
    assert float(model.log_prob(every).exp().sum().detach()) == pytest.approx(1, abs=1e-5)


def test_early_stopping_keeps_the_best_epoch() -> None:
    """A parameter that each step pushes past the validation optimum: the loop stops after patience and goes back."""
    task = load_task("digits")
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    size = {len(task.valid): 0.02}

    def loss(x: torch.Tensor, _: torch.Generator) -> torch.Tensor:
        target = size.get(len(x), 1.0)
        return (model.weight.squeeze() - target).abs().expand(len(x))

    loop, streams = Loop(patience=3, max_epochs=50), Streams("textbook-vae", "textbook", 0)
    history = early_stopped(model, loss, task, loop, streams, torch.device("cpu"))
    best = min(range(len(history)), key=history.__getitem__)
    assert len(history) == best + 1 + 4
    assert abs(float(model.weight.detach()) - 0.02) == pytest.approx(history[best], abs=1e-6)


def test_uniform_reference_is_exact() -> None:
    found = uniform_reference.measure(new_run(uniform_reference)).estimates
    assert found["nll_uniform"].value == pytest.approx(64 * math.log(17), abs=1e-9)
    assert found["nll_uniform_error"].value < 1e-9


class HalfNoise(DequantisedLogit):
    """A planted error: noise on half of the cell."""

    def _logit(self, x: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        u = 0.5 * torch.rand(x.shape, generator=generator, dtype=torch.float64)
        s = self.alpha + (1 - 2 * self.alpha) * (x.double() + u) / self.levels
        logdet = math.log(1 - 2 * self.alpha) - math.log(self.levels) - s.log() - (-s).log1p()
        return s.log() - (-s).log1p(), logdet


def test_cell_noise_catches_a_planted_half_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    right = cell_noise.measure(new_run(cell_noise, draws=2000)).estimates["excess_over_entropy"].value
    assert right == pytest.approx(0, abs=0.02)
    monkeypatch.setattr(notebooks, "DequantisedLogit", HalfNoise)
    wrong = cell_noise.measure(new_run(cell_noise, draws=2000)).estimates["excess_over_entropy"].value
    assert wrong == pytest.approx(-math.log(1.5), abs=0.02)


@pytest.mark.parametrize("experiment", PAPER.experiments, ids=lambda e: e.name)
def test_experiments_run_small_and_measure_what_claims_name(experiment: Experiment) -> None:
    outcome = experiment.measure(tiny(experiment))
    again = experiment.measure(tiny(experiment))
    assert {k: e.value for k, e in outcome.estimates.items()} == {k: e.value for k, e in again.estimates.items()}
    plots = {p.name for p in outcome.plots}
    for claim in claims_of(PAPER).claims:
        if claim.experiment == experiment.name:
            assert claim.measure in outcome.estimates
            assert not claim.minus or "/" in claim.minus or claim.minus in outcome.estimates
            assert set(claim.plots) <= plots
