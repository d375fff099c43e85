"""Conditional energies of half digits and of frames: training, ranking of pairs, inference by descent and Langevin."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from replicate.energies.conditional import (
    ConditionalEnergy,
    PairEnergy,
    ProductEnergy,
    WellsEnergy,
    descend,
    langevin_answers,
    ranked_right,
)
from replicate.experiments import Run, experiment
from replicate.model import Estimate, Training
from replicate.papers.lecun.digits import (
    HALF,
    Pairs,
    answers_plot,
    completion_metrics,
    digits_plot,
    half_digits,
    ridge_answers,
    simple_answers,
    squared_errors,
)
from replicate.runs.training import Stopwatch, train
from replicate.score_based.networks import mlp
from replicate.tasks.base import Task
from replicate.tasks.bouncing import CANVAS, OBSERVED, SPEED, bouncing
from replicate.tasks.digits import LEVELS

SIDE = 2 * SPEED + 1
#: temperatures of Langevin inference
TEMPERATURES = {"langevin": 1.0, "langevin_cool": 0.1, "langevin_cold": 0.01}


def halves_energy(hidden: int, rank: int) -> ProductEnergy:
    """F of an upper half, by a small convolution, and a lower half, by a perceptron."""
    of_upper = nn.Sequential(
        nn.Unflatten(1, (1, 4, 8)),
        nn.Conv2d(1, 24, 3, padding=1),
        nn.SiLU(),
        nn.Conv2d(24, 32, 3, stride=(1, 2), padding=1),
        nn.SiLU(),
        nn.Flatten(),
        nn.Linear(32 * 16, hidden),
        nn.SiLU(),
        nn.Linear(hidden, rank),
    )
    return ProductEnergy(of_upper, mlp([HALF, hidden, rank + 1]), HALF, HALF, rank)


def displaced(frames: Tensor) -> Tensor:
    """Move frames (n, CANVAS, CANVAS) by each of the SIDE^2 displacements, zeros entering: (n, SIDE^2, CANVAS^2)."""
    columns: Tensor = nn.functional.unfold(frames.unsqueeze(1), CANVAS, padding=SPEED)
    return columns.mT  # a window whose corner is at SPEED - d shows the frame moved by d


class BouncingEnergy(WellsEnergy):
    """A well round the last frame in each of its displacements; a perceptron says how deep each is.

    The perceptron reads the motion and the walls: the overlap of each frame, displaced, with the next one,
    and the row and column sums of the last.
    """

    def __init__(self, hidden: int, width: float) -> None:
        super().__init__(width)
        self.depth = mlp([(OBSERVED - 1) * SIDE**2 + 2 * CANVAS, hidden, hidden, SIDE**2])

    def candidates(self, x: Tensor) -> Tensor:
        return displaced(x.view(-1, OBSERVED, CANVAS, CANVAS)[:, -1])

    def costs(self, x: Tensor) -> Tensor:
        frames = x.view(-1, OBSERVED, CANVAS, CANVAS)
        size = frames.flatten(2).norm(dim=2).clamp_min(1e-6)
        features = [frames[:, -1].sum(1) / size[:, -1:], frames[:, -1].sum(2) / size[:, -1:]]
        for t in range(OBSERVED - 1):
            overlap = displaced(frames[:, t]) @ frames[:, t + 1].flatten(1).unsqueeze(2)
            features.append(overlap.squeeze(2) / (size[:, t] * size[:, t + 1]).unsqueeze(1))
        out: Tensor = self.depth(torch.cat(features, dim=1))
        return out


def random_displacements(count: int, x: Tensor, generator: torch.Generator) -> Tensor:
    """Draw `count` answers to each x (n, 768), its last frame displaced at random, (n, count, 256); few are right."""
    moved = displaced(x.view(-1, OBSERVED, CANVAS, CANVAS)[:, -1])
    which = torch.randint(SIDE**2, (len(x), count), generator=generator, device=x.device)
    return moved.gather(1, which.unsqueeze(2).expand(-1, -1, moved.shape[2]))


@dataclass(frozen=True)
class Settings:
    """How an energy is trained and answers are inferred.

    Attributes:
        hidden: units of each layer of its perceptrons.
        sigma, weight: noise of denoising score matching and its weight beside the ranking loss.
        steps, batch_size, lr, weight_decay, ema: of training.
        starts, descent_steps, descent_rate: of descent; the rate is in units of sigma^2.
        chains, langevin_steps, langevin_rate: of Langevin inference; the rate likewise, times the temperature.
    """

    hidden: int = 256
    sigma: float = 0.3
    weight: float = 0.1
    steps: int = 500
    batch_size: int = 250
    lr: float = 3e-3
    weight_decay: float = 0.05
    ema: float = 0.99
    starts: int = 4
    descent_steps: int = 200
    descent_rate: float = 0.2
    chains: int = 4
    langevin_steps: int = 100
    langevin_rate: float = 0.2


def trained(network: PairEnergy, task: Task, observed: int, run: Run, s: Settings, **more: Any) -> Estimate:
    """Train a pair energy on the task's rows of levels by the suite's loop, and return the seconds that it took.

    `more` are further arguments of `ConditionalEnergy`.
    """
    model = ConditionalEnergy(network, observed, s.sigma, s.weight, **more).to(run.device)
    settings = Training(steps=s.steps, batch_size=s.batch_size, lr=s.lr, weight_decay=s.weight_decay, ema=s.ema)
    rows, valid = (part.to(run.device) / (LEVELS - 1) for part in (task.train, task.valid))
    with torch.enable_grad():
        return Estimate.exact(train(model, rows, valid, settings, run.streams).seconds, "seconds")


def infer(
    network: PairEnergy, x: Tensor, mean: Tensor, run: Run, s: Settings
) -> tuple[dict[str, Tensor], Estimate, Estimate]:
    """Answer x (n, a) by descent from the training mean (b,) and from noise, and by chains from noise at temperatures.

    Returns:
        Answers (n, k, b) by method, the spread of the energies that descent reaches, and the seconds of inference.
    """
    watch = Stopwatch()
    starts = torch.rand(len(x), s.starts, len(mean), generator=run.stream("starts"), device=x.device)
    starts[:, 0] = mean
    found = descend(network, x, starts, s.descent_steps, s.descent_rate * s.sigma**2)
    answers = {"descent": found.y.unsqueeze(1)}
    for name, temperature in TEMPERATURES.items():
        noise = torch.rand(len(x), s.chains, len(mean), generator=run.stream(f"{name}-start"), device=x.device)
        # the step that a well of the noise's width allows at this temperature
        step = s.langevin_rate * temperature * s.sigma**2
        answers[name] = langevin_answers(network, x, noise, s.langevin_steps, step, temperature, run.stream(name))
    return answers, Estimate.mean_of(found.spread, "exact", "nats"), Estimate.exact(watch.seconds, "seconds")


def plot_margins(run: Run, name: str, energies: Tensor, groups: Mapping[str, Tensor]) -> None:
    """Draw quantiles of F(x_i, y_j) - F(x_i, y_i) over groups of wrong pairs, boolean masks (n, n)."""
    margin = energies - energies.diagonal()[:, None]
    share = torch.linspace(0, 1, 200, dtype=torch.float64)
    curves = {}
    for label, mask in groups.items():
        values = margin[mask].double().sort().values
        curves[label] = share.tolist(), values[(share * (len(values) - 1)).long()].tolist()
    title = f"{name}: energy of wrong pairs less that of the right pair"
    run.curves("margins", title, ("share of wrong pairs", "difference, nats"), curves, levels={"right": 0.0})


def rank_estimates(energies: Tensor, generator: torch.Generator) -> dict[str, Estimate]:
    """Return `ranked_right`, and the lower bound on the mutual information of x and y that the ranking loss gives.

    log n less the loss, at most log n (van den Oord et al. 2018, 1807.03748).
    """
    loss = (-energies).log_softmax(1).diagonal().neg()
    gained = torch.tensor(float(len(energies))).log() - loss
    found = {f"wrong_above_right:{k}": e for k, e in ranked_right(energies, generator).items()}
    return {**found, "mutual_information:ranking": Estimate.mean_of(gained, "lower_bound", "nats")}


@dataclass(frozen=True)
class Halves(Settings):
    """Also the rank of the product energy, and the noise that training adds to its pairs."""

    rank: int = 64
    jitter: float = 0.1


ON_HALVES = "a conditional energy of lower halves of digits given upper ones: pairs ranked, answers by descent"
ON_FRAMES = "a conditional energy of the next frame of a bouncing digit: pairs ranked, answers by descent"
ON_DIGITS: dict[str, Any] = {"family": "ebm", "seeds": 3, "tasks": ("digits",)}


@experiment(
    "energy-halves", about=ON_HALVES, **ON_DIGITS, smoke=dict.fromkeys(("steps", "descent_steps", "langevin_steps"), 5)
)
@torch.no_grad()
def halves(run: Run, s: Halves) -> None:
    """Train F on upper and lower halves, rank pairs, infer lower halves of the test digits."""
    with run.initialisation():
        network = halves_energy(s.hidden, s.rank)
    data = half_digits(run.device)
    training = trained(network, data.task, HALF, run, s, jitter=s.jitter)
    answers, spread, seconds = infer(network, data.test.x, data.known.y.mean(0), run, s)
    energies = network.pairs(network.observe(data.test.x), data.test.y)
    run.measure_all(rank_estimates(energies, run.stream("wrong pairs")))
    run.measure("start_energy_sd:descent", spread)
    same = data.labels[:, None] == data.labels
    other = ~torch.eye(len(same), dtype=torch.bool, device=same.device)
    above = (energies > energies.diagonal()[:, None]).double()
    groups = {"same class": same & other, "another class": ~same}
    for label, mask in groups.items():
        # over the test digits, as the wrong pairs of one x are not independent
        share = ((above * mask).sum(1) / mask.sum(1).clamp_min(1))[mask.any(1)]
        run.measure(f"wrong_above_right:{label.replace(' ', '_')}", Estimate.mean_of(share, "exact", "probability"))
    answers |= simple_answers(data.known, data.test) | {"ridge": ridge_answers(data.known, data.test.x)}
    for name, completions in answers.items():
        run.measure_all(completion_metrics(completions, data), name)
    run.measure_all({"time_training": training, "time_inference": seconds})
    run.plot(digits_plot(data, answers))
    plot_margins(run, "halves", energies, groups)


@dataclass(frozen=True)
class Frames(Settings):
    """Also the displaced frames that training adds as wrong answers, and the test sequences."""

    hidden: int = 128
    sigma: float = 0.4
    weight: float = 0.0
    steps: int = 400
    batch_size: int = 128
    lr: float = 1e-2
    weight_decay: float = 0.01
    ema: float = 0.98
    descent_steps: int = 30
    descent_rate: float = 0.5
    chains: int = 2
    langevin_steps: int = 50
    distractors: int = 12
    cases: int = 1000


SMOKE = {"steps": 5, "descent_steps": 3, "langevin_steps": 3, "cases": 100}


@experiment("energy-bouncing", about=ON_FRAMES, **ON_DIGITS, smoke=SMOKE)
@torch.no_grad()
def frames(run: Run, s: Frames) -> None:
    """Train F on three frames and the next, rank pairs, infer the next frames of the test sequences."""
    with run.initialisation():
        network = BouncingEnergy(s.hidden, s.sigma)
    task, observed = bouncing(), OBSERVED * CANVAS**2
    training = trained(network, task, observed, run, s, distractors=partial(random_displacements, s.distractors))
    known, test = (Pairs.of(rows.to(run.device), observed) for rows in (task.train, task.test[: s.cases]))
    answers, spread, seconds = infer(network, test.x, known.y.mean(0), run, s)
    answers |= simple_answers(known, test) | {"last_frame": test.x[:, -(CANVAS**2) :].unsqueeze(1)}
    for name, y in answers.items():
        run.measure_all(squared_errors(y, test.y), name)
    seen = network.observe(test.x)
    energies = network.pairs(seen, test.y)
    run.measure_all(rank_estimates(energies, run.stream("wrong pairs")))
    run.measure("start_energy_sd:descent", spread)
    images = test.x.view(-1, OBSERVED, CANVAS, CANVAS)
    wrong = displaced(images[:, -1])
    differs = (wrong - test.y.unsqueeze(1)).abs().amax(2) > 0
    ranked = ((network.energy(seen, wrong) > energies.diagonal()[:, None]) | ~differs).all(1).double()
    run.measure("wrong_above_right:displaced", Estimate.mean_of(ranked, "exact", "probability"))
    run.measure_all({"time_training": training, "time_inference": seconds})
    shown = {f"frame {i + 1}": images[:, i].flatten(1) for i in range(OBSERVED)}
    shown |= {f"frame {OBSERVED + 1}, the truth": test.y, **{name: y[:, 0] for name, y in answers.items()}}
    run.plot(answers_plot("the next frame of test sequences", shown, CANVAS))
    other = ~torch.eye(len(energies), dtype=torch.bool, device=run.device)
    plot_margins(run, "bouncing", energies, {"another sequence": other})
