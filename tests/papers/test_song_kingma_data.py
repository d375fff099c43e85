"""The training methods on bits and on digits: exact log Z against enumeration, and each experiment once, tiny."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from torch import Tensor

from replicate.experiments import Experiment, Run
from replicate.experiments.rbm import BinaryRows, Machine, flat
from replicate.model import DataInfo
from replicate.papers.carreira.divergence import Enumerated
from replicate.papers.song_kingma import bits, digits
from replicate.papers.song_kingma.bits import METHODS, CentredMachine, cd_biases, learn, model_statistics
from replicate.papers.song_kingma.bits import trained_on_bits as BITS
from replicate.papers.song_kingma.digits import trained_on_digits as DIGITS
from replicate.resume import Journal, State
from replicate.runs.seeds import Streams
from replicate.tasks.loading import load_task

DIM = 5


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def new_run(experiment: Experiment, **changed: object) -> Run:
    streams = Streams(experiment.name, "song_kingma", 0)
    return Run({**experiment.settings("smoke"), **changed}, streams, torch.device("cpu"))


def rows(n: int = 40) -> Tensor:
    """Bits that agree with their neighbour three times out of four."""
    first = torch.randint(2, (n, 1), generator=seeded()).float()
    flips = (torch.rand(n, DIM, generator=seeded(1)) < 0.25).float()
    return (first - flips).abs()


def centred(hidden: int = 3, scale: float = 1.0) -> CentredMachine:
    with new_run(BITS).initialisation():
        machine = CentredMachine(rows(), hidden)
    with torch.no_grad():
        for part in (machine.weights, machine.visible, machine.hidden):
            part += scale * torch.randn(part.shape, generator=seeded(2))
    return machine


def doubled(machine: CentredMachine) -> Machine:
    return Machine(*(part.detach().double() for part in machine.machine()))


def test_the_centred_machine_s_probabilities_sum_to_one_and_are_numpy_s() -> None:
    machine = centred()
    v = torch.tensor(list(itertools.product((0.0, 1.0), repeat=DIM)))
    log_p = machine.log_prob(v)
    assert float(log_p.exp().sum()) == pytest.approx(1.0, abs=1e-5)
    w, b, c = (part.detach().numpy() for part in (machine.weights, machine.visible, machine.hidden))
    mu = machine.offset.numpy()
    hidden = np.array(list(itertools.product((0.0, 1.0), repeat=3)))
    # as Montavon and Mueller write it: centred units in the interaction, plain biases
    pairs = [[(x - mu) @ w @ (h - 0.5) + b @ x + c @ h for h in hidden] for x in v.numpy()]
    expected = logsumexp(pairs, 1) - logsumexp(pairs)
    np.testing.assert_allclose(log_p.numpy(), expected, atol=1e-5)


def test_a_machine_of_no_weights_is_independent_bits_with_log_z_0() -> None:
    machine = centred(scale=0.0)
    with torch.no_grad():
        machine.weights.zero_()
    assert machine.log_z().item() == pytest.approx(0.0, abs=1e-5)
    rates = (rows().sum(0) + 0.5) / 41
    expected = torch.distributions.Bernoulli(rates).log_prob(rows()).sum(1)
    torch.testing.assert_close(machine.log_prob(rows()).float(), expected, rtol=1e-5, atol=1e-5)


def test_model_statistics_are_those_of_enumerated_visible_states() -> None:
    machine = doubled(centred())
    every_state = Enumerated(DIM, 3)
    expected = every_state.statistics(machine, every_state.distribution(machine).exp())
    torch.testing.assert_close(flat(model_statistics(machine)), flat(expected))


def test_cd_s_bias_is_that_of_enumerated_chains() -> None:
    machine, every_state = doubled(centred()), Enumerated(DIM, 3)
    data = rows().double()
    place = 2 ** torch.arange(DIM - 1, -1, -1)
    start = torch.bincount((data.long() * place).sum(1), minlength=2**DIM).double() / len(data)
    likelihood = flat(every_state.direction(machine, start, None))
    found = cd_biases(machine, data, 3, 2000, seeded(3))
    for k, bias in enumerate(found, 1):
        exact = (flat(every_state.direction(machine, start, k)) - likelihood).square().mean().sqrt()
        assert bias == pytest.approx(float(exact), rel=0.1, abs=1e-3)
    assert found[0] > found[2]


@pytest.mark.parametrize("name", [name for name in METHODS if not name.startswith("nce")])
def test_every_method_finds_that_neighbouring_bits_agree(name: str) -> None:
    data = BinaryRows(rows(400), rows(400), rows(400))
    settings = bits.Settings(hidden=3, updates=80, checks=4, lr=0.1, batch=100, flip_rate=0.2)
    fit = learn(name, data, new_run(BITS), settings)
    independent = torch.distributions.Bernoulli(data.train.mean(0)).log_prob(data.train).sum(1).mean()
    assert float(fit.machine.log_prob(data.train).mean()) > float(independent) + 0.1
    assert [at for at, _ in fit.curve] == [20, 40, 60, 80]
    best = min(valid for _, valid in fit.curve)
    assert float(-fit.machine.log_prob(data.valid).mean()) == pytest.approx(best)


def test_interrupted_learning_resumes_to_the_same_machine() -> None:
    data, settings = BinaryRows(rows(), rows(), rows()), bits.Settings(hidden=3, updates=8, checks=2, batch=10)
    whole = learn("pcd", data, new_run(BITS), settings).machine.state_dict()
    saves: list[State] = []
    with Journal(saves.append, every=0).active():
        learn("pcd", data, new_run(BITS), settings)
    again = Journal(lambda state: None, saves[4], every=0)
    with again.active():
        resumed = learn("pcd", data, new_run(BITS), settings).machine.state_dict()
    assert 0 < saves[4]["cut"]["step"] < 8
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_the_bits_experiment_measures_every_method_and_ends_where_it_began_a_second_time() -> None:
    small = {"hidden": 3, "updates": 2, "checks": 1, "samples": 20, "sweeps": 1}
    first, second = (BITS.measure(new_run(BITS, **small)) for _ in range(2))
    for metric in ("nll", "train_nll", "cost", "time_training"):
        assert {f"{metric}:{name}" for name in METHODS} <= first.estimates.keys()
    for name, estimate in first.estimates.items():
        assert math.isfinite(estimate.value)
        assert name.startswith("time_") or estimate.value == second.estimates[name].value
    assert [line.label for line in first.plots[0].lines] == list(METHODS)


def test_the_digits_experiment_measures_every_method_or_says_why_not() -> None:
    outcome = DIGITS.measure(new_run(DIGITS))
    for name in ("gaussian", *digits.gradients(64, digits.Settings())):
        for metric in ("nll", "frechet"):
            assert (f"{metric}:{name}" in outcome.estimates) != (f"{metric}:{name}" in outcome.missing)
    assert outcome.estimates["nll:gaussian"].kind == "estimate"
    assert outcome.estimates["log_z_gap:gaussian"].value == pytest.approx(0.0, abs=1e-6)
    assert all(e.value >= 0 for name, e in outcome.estimates.items() if name.startswith("drift:"))
    assert "nll:ml" in outcome.missing


def test_costs_and_objectives_are_of_the_same_methods() -> None:
    settings = digits.Settings()
    objectives = digits.methods(DataInfo(64, "levels", 17, (8, 8)), settings)
    assert objectives.keys() == digits.gradients(64, settings).keys()
    assert bits.products(64, bits.Settings()).keys() == METHODS.keys()


def test_an_energy_whose_log_z_annealing_cannot_find_has_no_likelihood() -> None:
    run, task = new_run(DIGITS), load_task("digits")
    settings = digits.Settings(**{**run.settings, "ais_chains": 8, "ais_steps": 2, "dequantisation_draws": 1})
    model, _ = digits.learn("nce", task, run, settings, 0)
    with torch.no_grad():  # two wells far out in the base, which two annealing steps cannot reach
        model.inner.network.head.weight.fill_(200.0)
    digits.score("steep", model, task, run, settings)
    assert "nll:steep" not in run.estimates
    assert "nats apart" in run.missing["nll:steep"]
    assert digits.OPEN_BRACKET > 0
