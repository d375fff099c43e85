"""scikit-learn's 8x8 handwritten digits: 1797 images, 64 pixels, integers 0..16."""

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

from replicate.model import DataInfo
from replicate.tasks.base import Task, TaskEntry

LEVELS = 17
#: split seed of `digits-shuffled`; part of the task's definition
SPLIT_SEED = 20240501
GREY, BITS = DataInfo(64, "levels", LEVELS, (8, 8)), DataInfo(64, "bits", 2, (8, 8))


def _pixels() -> tuple[Tensor, Tensor]:
    bunch = load_digits()
    return torch.tensor(bunch.data, dtype=torch.float32), torch.tensor(bunch.target, dtype=torch.int64)


def _task(name: str, about: str, info: DataInfo, parts: list[tuple[Tensor, Tensor]]) -> Task:
    (train, a), (valid, b), (test, c) = parts
    return Task(name, about, info, train, valid, test, labels=(a, b, c))


def textbook_split() -> list[tuple[Tensor, Tensor]]:
    """Rows [:1000] / [1000:1350] / [1350:], unshuffled, as in Tomczak's public notebooks."""
    x, y = _pixels()
    cuts = [slice(0, 1000), slice(1000, 1350), slice(1350, None)]
    return [(x[c], y[c]) for c in cuts]


def shuffled_split() -> list[tuple[Tensor, Tensor]]:
    """Split into the same sizes, shuffled and stratified by class: the textbook's parts are by different writers."""
    x, y = _pixels()
    rest, test = train_test_split(range(len(x)), test_size=447, stratify=y.numpy(), random_state=SPLIT_SEED)
    train, valid = train_test_split(rest, test_size=350, stratify=y[rest].numpy(), random_state=SPLIT_SEED)
    return [(x[sorted(i)], y[sorted(i)]) for i in (train, valid, test)]


def digits() -> Task:
    """Load the textbook's split."""
    return _task("digits", "8x8 digits, 17 levels, the textbook's split", GREY, textbook_split())


def digits_shuffled() -> Task:
    """Load the stratified shuffled split."""
    return _task("digits-shuffled", "8x8 digits, 17 levels, stratified shuffled split", GREY, shuffled_split())


def digits_binary() -> Task:
    """Pixels >= 8 are 1, on the textbook's split."""
    parts = [((x >= 8).float(), y) for x, y in textbook_split()]
    return _task("digits-binary", "8x8 digits thresholded at 8, the textbook's split", BITS, parts)


DIGITS = TaskEntry("8x8 digits, 17 levels, the textbook's split", digits, "data", info=GREY)
DIGITS_SHUFFLED = TaskEntry("8x8 digits, 17 levels, stratified shuffled split", digits_shuffled, "data", info=GREY)
DIGITS_BINARY = TaskEntry("8x8 digits thresholded at 8, the textbook's split", digits_binary, "data", info=BITS)
