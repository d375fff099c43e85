"""Observations, the answers to them, and measures of answers; first of all the halves of the textbook's digits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor

from replicate.experiments import Plot
from replicate.metrics.features import FeatureClassifier
from replicate.model import Estimate
from replicate.runs.evaluate import digit_features
from replicate.tasks.base import Task
from replicate.tasks.digits import LEVELS
from replicate.tasks.loading import load_task

ROWS, COLUMNS = 8, 8
#: pixels of half a digit
HALF = ROWS * COLUMNS // 2
#: penalty of the ridge regression, the best of 0.1, 1 and 10 on the validation digits
RIDGE = 10.0
#: test examples that the report draws
SHOWN = 10


class Pairs(NamedTuple):
    """Observations x (n, a) and answers y (n, b), in [0, 1]."""

    x: Tensor
    y: Tensor

    @staticmethod
    def of(rows: Tensor, observed: int) -> Pairs:
        """Cut rows of levels (n, a + b)."""
        scaled = rows / (LEVELS - 1)
        return Pairs(scaled[:, :observed], scaled[:, observed:])


def simple_answers(known: Pairs, test: Pairs) -> dict[str, Tensor]:
    """Answer (n, 1, b) without a model: by the mean of the known answers, and by that of the nearest observation."""
    nearest = known.y[torch.cdist(test.x, known.x).argmin(1)]
    return {"mean": known.y.mean(0).expand_as(test.y).unsqueeze(1), "neighbour": nearest.unsqueeze(1)}


def ridge_answers(known: Pairs, x: Tensor) -> Tensor:
    """Answer (n, 1, b) by ridge regression."""
    centre, mean = known.x.mean(0), known.y.mean(0)
    centred = (known.x - centre).double()
    gram = centred.T @ centred + RIDGE * torch.eye(x.shape[1], dtype=torch.float64, device=x.device)
    weights = torch.linalg.solve(gram, centred.T @ (known.y - mean).double()).float()
    return (mean + (x - centre) @ weights).clamp(0, 1).unsqueeze(1)


@dataclass(frozen=True)
class HalfDigits:
    """Upper and lower halves of the textbook's digits.

    Attributes:
        task, features: the digits, in levels, and the classifier of whole digits.
        known, test: halves of the 1000 training and the 447 test digits, (n, 32) each.
        labels: classes of the test digits.
    """

    task: Task
    known: Pairs
    test: Pairs
    labels: Tensor
    features: FeatureClassifier


def half_digits(device: torch.device) -> HalfDigits:
    """Load the textbook's split, cut between the fourth and the fifth row."""
    task = load_task("digits")
    assert task.labels is not None
    known, test = (Pairs.of(part.to(device), HALF) for part in (task.train, task.test))
    return HalfDigits(task, known, test, task.labels[2].to(device), digit_features(task))


def squared_errors(answers: Tensor, truth: Tensor) -> dict[str, Estimate]:
    """Return the mean squared error to the truth (n, b) of answers (n, s, b): of one, of the best, of their mean."""
    error = (answers - truth.unsqueeze(1)).square().mean(2)
    found = {"squared_error": error.mean(1)}
    if answers.shape[1] > 1:
        of_mean = (answers.mean(1) - truth).square().mean(1)
        found |= {"squared_error_best": error.min(1).values, "squared_error_mean": of_mean}
    return {name: Estimate.mean_of(values, "exact", "squared intensity") for name, values in found.items()}


def slopes(whole: Tensor) -> Tensor:
    """Return the mean absolute difference of neighbouring pixels of digits (.., 64) at the lower half, shape (..)."""
    image = whole.unflatten(-1, (ROWS, COLUMNS))[..., ROWS // 2 - 1 :, :]
    down, right = image.diff(dim=-2).abs(), image[..., 1:, :].diff(dim=-1).abs()
    return torch.cat([down.flatten(-2), right.flatten(-2)], dim=-1).mean(-1)


def completion_metrics(completions: Tensor, data: HalfDigits) -> dict[str, Estimate]:
    """Measure completions (n, s, 32) in [0, 1] of the test digits.

    Returns:
        `squared_errors`; "diversity", the root mean square difference of two completions of one digit; "sharpness",
        the mean slope over that of the true digits; "agreement", the share of completed digits that the classifier
        labels as the digit is labelled.
    """
    n, s, _ = completions.shape
    whole = torch.cat([data.test.x.unsqueeze(1).expand(-1, s, -1), completions], dim=2)
    truth = slopes(torch.cat(data.test, dim=1)).double().mean()
    labels = data.features.probabilities(whole.flatten(0, 1) * (LEVELS - 1)).argmax(1)
    right = (labels.view(n, s) == data.labels.cpu()[:, None]).double().mean(1)
    found = {
        **squared_errors(completions, data.test.y),
        "sharpness": Estimate.mean_of(slopes(whole).double().mean(1) / truth, "exact", "ratio"),
        "agreement": Estimate.mean_of(right, "exact", "accuracy"),
    }
    if s > 1:
        pairs = [(completions[:, i] - completions[:, j]).square().mean(1).sqrt() for i, j in combinations(range(s), 2)]
        found["diversity"] = Estimate.mean_of(torch.stack(pairs).mean(0), "estimate", "intensity")
    return found


def answers_plot(title: str, images: Mapping[str, Tensor], side: int) -> Plot:
    """Draw the first SHOWN images (n, side^2) of each kind."""
    rows = [Plot.row_of_images(k, x[:SHOWN].clamp(0, 1).unflatten(1, (side, side))) for k, x in images.items()]
    return Plot("answers", title, "pixel", "grey", tuple(rows), style="images", image=(side, side))


def digits_plot(data: HalfDigits, answers: Mapping[str, Tensor]) -> Plot:
    """Draw test digits, and the first lower half that each method answers, of (n, s, 32)."""
    lower = {"truth": data.test.y, **{name: y[:, 0] for name, y in answers.items()}}
    whole = {name: torch.cat([data.test.x, y], dim=1) for name, y in lower.items()}
    return answers_plot("lower halves of test digits, given the upper ones", whole, COLUMNS)
