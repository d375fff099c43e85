"""Inference by optimisation of a conditional energy: y* = argmin_y F(x, y).

LeCun, Chopra, Hadsell, Ranzato and Huang 2006, "A Tutorial on Energy-Based Learning", states the programme: an energy
measures the compatibility of an observation and an answer, training makes right pairs low and wrong pairs high,
inference is a search for the lowest answer. The tutorial prints no numbers for tasks like these; what is claimed here
are bars of this suite, on two tasks of its own:

- halves: the lower four rows of a digit from the upper four (the textbook's split of the 8x8 digits; no image of the
  test part is in the training part, and the nearest training image is as far from a test image, 0.65 in units of the
  largest level at the least, as training images are from one another, 0.59).
- bouncing: the fourth frame from the first three (`replicate.tasks.bouncing`).

Right and wrong pairs: each test x with its own y and with the y of another test example. "random" takes one other y at
random for each x, "all" takes every other y, "first" asks that the own y be the lowest of all.

Departures from the tutorial: its losses compare the right answer with the most offending wrong one; here the wrong ones
are the answers of the other rows of the batch, and on the frames also the last frame displaced at random, by ranking
noise contrast, and denoising score matching shapes the wells (`replicate.energies.conditional`). On the frames the
energy has a latent variable, the displacement, summed out at temperature 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
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
from replicate.model import Estimate, Training
from replicate.papers.lecun_families import (
    COMPLETIONS,
    HALF,
    SHOWN,
    completion_metrics,
    half_digits,
    sheet,
    squared_errors,
)
from replicate.runs.experiment import Context, Experiment, Line, Outcome, Plot
from replicate.runs.paper import Paper
from replicate.runs.training import Stopwatch, train
from replicate.score_based.networks import mlp
from replicate.tasks.base import Task
from replicate.tasks.bouncing import CANVAS, OBSERVED, SPEED, bouncing
from replicate.tasks.digits import LEVELS

SIDE = 2 * SPEED + 1
#: temperatures of Langevin inference
TEMPERATURES = {"langevin": 1.0, "langevin_cool": 0.1, "langevin_cold": 0.01}


# -- the two energies


def convolution_of_half(hidden: int, rank: int) -> nn.Sequential:
    """Upper halves (n, 32) -> (n, rank)."""
    return nn.Sequential(
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


def halves_energy(hidden: int, rank: int) -> ProductEnergy:
    """F of an upper half, by a small convolution, and a lower half, by a perceptron."""
    return ProductEnergy(convolution_of_half(hidden, rank), mlp([HALF, hidden, rank + 1]), HALF, HALF, rank)


def displaced(frames: Tensor) -> Tensor:
    """Frames (n, CANVAS, CANVAS) moved by each of the SIDE^2 displacements, zeros entering: (n, SIDE^2, CANVAS^2)."""
    columns: Tensor = nn.functional.unfold(frames.unsqueeze(1), CANVAS, padding=SPEED)
    return columns.mT  # a window whose corner is at SPEED - d shows the frame moved by d


class BouncingEnergy(WellsEnergy):
    """A well round the last frame in each of its displacements; a perceptron says how deep each is.

    The perceptron reads what tells a motion and the walls: the overlap of each frame, displaced, with the next one,
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
    """`count` wrong answers to each x (n, 768): its last frame displaced at random, (n, count, 256).

    One in SIDE^2 is the right answer by chance, as it may be in noise contrast.
    """
    moved = displaced(x.view(-1, OBSERVED, CANVAS, CANVAS)[:, -1])
    which = torch.randint(SIDE**2, (len(x), count), generator=generator, device=x.device)
    return moved.gather(1, which.unsqueeze(2).expand(-1, -1, moved.shape[2]))


# -- inference and its measures


@dataclass(frozen=True)
class Pairs:
    """Observations x (n, a) and answers y (n, b), in [0, 1]."""

    x: Tensor
    y: Tensor

    @staticmethod
    def of(rows: Tensor, observed: int) -> Pairs:
        """Cut rows of levels (n, a + b)."""
        scaled = rows / (LEVELS - 1)
        return Pairs(scaled[:, :observed], scaled[:, observed:])


def trained(network: PairEnergy, task: Task, observed: int, context: Context, **more: Any) -> float:
    """Train a pair energy on the task's rows of levels by the suite's loop; seconds that took.

    `more` are further arguments of `ConditionalEnergy`.
    """
    p, device = context.params, context.device
    model = ConditionalEnergy(network, observed, p["sigma"], p["weight"], **more).to(device)
    settings = Training(
        steps=p["steps"], batch_size=p["batch_size"], lr=p["lr"], weight_decay=p["weight_decay"], ema=p["ema"]
    )
    rows, valid = (part.to(device) / (LEVELS - 1) for part in (task.train, task.valid))
    with torch.enable_grad():
        return train(model, rows, valid, settings, context.streams).seconds


def starting_points(mean: Tensor, n: int, count: int, generator: torch.Generator) -> Tensor:
    """Starts (n, count, b) that know nothing of the answer: the training mean (b,), then uniform noise."""
    noise = torch.rand(n, count, len(mean), generator=generator, device=mean.device)
    noise[:, 0] = mean
    return noise


def infer(
    network: PairEnergy, x: Tensor, mean: Tensor, context: Context
) -> tuple[dict[str, Tensor], dict[str, Estimate]]:
    """Answers (n, s, b) to x (n, a) by each method, and how far the starts of descent agree.

    Langevin dynamics starts at noise, s chains for each x at each temperature; descent gives one answer.
    """
    p, streams = context.params, context.streams
    starts = starting_points(mean, len(x), p["starts"], streams.fresh("starts"))
    found = descend(network, x, starts, p["descent_steps"], p["descent_rate"] * p["sigma"] ** 2)
    answers = {"descent": found.y.unsqueeze(1)}
    agree = {"start_energy_sd:descent": Estimate.mean_of(found.spread, "exact", "nats")}
    for name, temperature in TEMPERATURES.items():
        noise = torch.rand(len(x), p["chains"], len(mean), generator=streams.fresh(f"{name}-start"), device=x.device)
        # the step that a well of the noise's width allows at this temperature
        step = p["langevin_rate"] * temperature * p["sigma"] ** 2
        steps, generator = p["langevin_steps"], streams.fresh(name)
        answers[name] = langevin_answers(network, x, noise, steps, step, temperature, generator)
    return answers, agree


def margins_plot(name: str, energies: Tensor, groups: Mapping[str, Tensor]) -> Plot:
    """Quantiles of F(x_i, y_j) - F(x_i, y_i) over groups of wrong pairs, boolean masks (n, n)."""
    margin = energies - energies.diagonal()[:, None]
    share = torch.linspace(0, 1, 200, dtype=torch.float64)
    lines = []
    for label, mask in groups.items():
        values = margin[mask].double().sort().values
        lines.append(Line(label, share.tolist(), values[(share * (len(values) - 1)).long()].tolist()))
    return Plot(
        "margins",
        f"{name}: energy of wrong pairs less that of the right pair",
        "share of wrong pairs",
        "difference, nats",
        tuple(lines),
        levels={"right": 0.0},
    )


def rank_estimates(energies: Tensor, generator: torch.Generator) -> dict[str, Estimate]:
    """`ranked_right`, and the lower bound on the mutual information of x and y that the ranking loss gives.

    log n less the loss, at most log n (van den Oord et al. 2018, 1807.03748).
    """
    loss = (-energies).log_softmax(1).diagonal().neg()
    gained = torch.tensor(float(len(energies))).log() - loss
    found = {f"wrong_above_right:{k}": e for k, e in ranked_right(energies, generator).items()}
    return {**found, "mutual_information:ranking": Estimate.mean_of(gained, "lower_bound", "nats")}


def frames_sheet(test: Pairs, answers: Mapping[str, Tensor]) -> Plot:
    """The frames observed of the first SHOWN test sequences, the one that came, and what each method answers."""
    seen = test.x.view(len(test.x), OBSERVED, CANVAS**2)
    rows = {f"frame {i + 1}": seen[:, i] for i in range(OBSERVED)} | {f"frame {OBSERVED + 1}, the truth": test.y}
    rows |= {label: y[:, 0] for label, y in answers.items()}
    lines = [Plot.row_of_images(k, v[:SHOWN].clamp(0, 1).unflatten(1, (CANVAS, CANVAS))) for k, v in rows.items()]
    title = "the next frame of test sequences"
    return Plot("answers", title, "pixel", "grey", tuple(lines), style="images", image=(CANVAS, CANVAS))


# -- the experiments


@torch.no_grad()
def halves(context: Context) -> Outcome:
    """Task A: train F on upper and lower halves, rank pairs, infer lower halves of the test digits."""
    p, streams = context.params, context.streams
    with streams.initialisation():
        network = halves_energy(p["hidden"], p["rank"])
    data = half_digits(context.device)
    seconds = trained(network, data.task, HALF, context, jitter=p["jitter"])
    watch = Stopwatch()
    answers, agree = infer(network, data.x, data.mean, context)
    searching = watch.seconds
    energies = network.pairs(network.observe(data.x), data.y)
    estimates = {**rank_estimates(energies, streams.fresh("wrong pairs")), **agree}
    answers |= data.baselines()
    same = data.labels[:, None] == data.labels
    other = ~torch.eye(len(same), dtype=torch.bool, device=same.device)
    above = (energies > energies.diagonal()[:, None]).double()
    groups = {"same class": same & other, "another class": ~same}
    for label, mask in groups.items():
        # over the test digits, as the wrong pairs of one x are not independent
        share = (above * mask).sum(1) / mask.sum(1).clamp_min(1)
        key = f"wrong_above_right:{label.replace(' ', '_')}"
        estimates[key] = Estimate.mean_of(share[mask.any(1)], "exact", "probability")
    for name, completions in answers.items():
        estimates |= {f"{metric}:{name}": e for metric, e in completion_metrics(completions, data).items()}
    estimates |= {
        "time_training": Estimate.exact(seconds, "seconds"),
        "time_inference": Estimate.exact(searching, "seconds"),
    }
    return Outcome(estimates, (sheet(data, answers), margins_plot("halves", energies, groups)))


HALVES = Experiment(
    name="energy-halves",
    about="a conditional energy of lower halves of digits given upper ones: pairs ranked, answers by descent",
    family="ebm",
    run=halves,
    params={
        "hidden": 256,
        "rank": 64,
        "sigma": 0.3,
        "weight": 0.1,
        "jitter": 0.1,
        "steps": 500,
        "batch_size": 250,
        "lr": 3e-3,
        "weight_decay": 0.05,
        "ema": 0.99,
        "starts": 4,
        "descent_steps": 200,
        "descent_rate": 0.2,
        "chains": 4,
        "langevin_steps": 100,
        "langevin_rate": 0.2,
    },
    seeds=3,
    tasks=("digits",),
    overrides={"smoke": {"steps": 5, "descent_steps": 5, "langevin_steps": 5}},
)


@torch.no_grad()
def frames(context: Context) -> Outcome:
    """Task B: train F on three frames and the next, rank pairs, infer the next frames of the test sequences."""
    p, streams, device = context.params, context.streams, context.device
    with streams.initialisation():
        network = BouncingEnergy(p["hidden"], p["sigma"])
    task = bouncing()
    observed = OBSERVED * CANVAS**2

    def distractors(x: Tensor, generator: torch.Generator) -> Tensor:
        return random_displacements(p["distractors"], x, generator)

    seconds = trained(network, task, observed, context, distractors=distractors)
    known = Pairs.of(task.train.to(device), observed)
    test = Pairs.of(task.test[: p["cases"]].to(device), observed)
    watch = Stopwatch()
    answers, agree = infer(network, test.x, known.y.mean(0), context)
    searching = watch.seconds
    nearest = known.y[torch.cdist(test.x, known.x).argmin(1)]
    answers |= {
        "mean": known.y.mean(0).expand_as(test.y).unsqueeze(1),
        "neighbour": nearest.unsqueeze(1),
        "last_frame": test.x[:, -(CANVAS**2) :].unsqueeze(1),
    }
    estimates: dict[str, Estimate] = {}
    for name, completions in answers.items():
        estimates |= {f"{metric}:{name}": e for metric, e in squared_errors(completions, test.y).items()}
    seen = network.observe(test.x)
    energies = network.pairs(seen, test.y)
    estimates |= {**rank_estimates(energies, streams.fresh("wrong pairs")), **agree}
    wrong = displaced(test.x.view(-1, OBSERVED, CANVAS, CANVAS)[:, -1])
    differs = (wrong - test.y.unsqueeze(1)).abs().amax(2) > 0
    above = network.energy(seen, wrong) > energies.diagonal()[:, None]
    estimates["wrong_above_right:displaced"] = Estimate.mean_of(
        (above | ~differs).all(1).double(), "exact", "probability"
    )
    estimates |= {
        "time_training": Estimate.exact(seconds, "seconds"),
        "time_inference": Estimate.exact(searching, "seconds"),
    }
    other = ~torch.eye(len(energies), dtype=torch.bool, device=device)
    margins = margins_plot("bouncing", energies, {"another sequence": other})
    return Outcome(estimates, (frames_sheet(test, answers), margins))


BOUNCING = Experiment(
    name="energy-bouncing",
    about="a conditional energy of the next frame of a bouncing digit: pairs ranked, answers by descent",
    family="ebm",
    run=frames,
    params={
        "hidden": 128,
        "sigma": 0.4,
        "weight": 0.0,
        "distractors": 12,
        "steps": 400,
        "batch_size": 128,
        "lr": 1e-2,
        "weight_decay": 0.01,
        "ema": 0.98,
        "cases": 1000,
        "starts": 4,
        "descent_steps": 30,
        "descent_rate": 0.5,
        "chains": 2,
        "langevin_steps": 50,
        "langevin_rate": 0.2,
    },
    seeds=3,
    tasks=("digits",),
    overrides={"smoke": {"steps": 5, "descent_steps": 3, "langevin_steps": 3, "cases": 100}},
)

PAPER = Paper("lecun", Path(__file__).with_suffix(".toml"), experiments=(HALVES, BOUNCING, COMPLETIONS))
