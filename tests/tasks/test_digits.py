"""The digits tasks are scikit-learn's images, cut as stated."""

from __future__ import annotations

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from replicate.tasks.base import Task
from replicate.tasks.digits import DIGITS, DIGITS_BINARY, DIGITS_SHUFFLED

ENTRIES = {"digits": DIGITS, "digits-shuffled": DIGITS_SHUFFLED, "digits-binary": DIGITS_BINARY}


def whole(t: Task) -> tuple[Tensor, Tensor]:
    """All rows and labels of a task in the order train, valid, test."""
    assert t.labels is not None
    return torch.cat([t.train, t.valid, t.test]), torch.cat(t.labels)


def sklearn_digits() -> tuple[Tensor, Tensor]:
    """The 1797 images and their labels as scikit-learn gives them."""
    bunch = load_digits()
    return torch.tensor(bunch.data, dtype=torch.float32), torch.tensor(bunch.target)


@pytest.mark.parametrize("name", list(ENTRIES))
def test_sizes_and_identity(name: str) -> None:
    t = ENTRIES[name].load()
    assert (t.name, ENTRIES[name].kind, t.about) == (name, "data", ENTRIES[name].about)
    assert t.density is None
    assert t.labels is not None
    for x, y, n in zip((t.train, t.valid, t.test), t.labels, (1000, 350, 447), strict=True):
        assert x.shape == (n, 64)
        assert y.shape == (n,)
        assert x.dtype == torch.float32
    assert t.info.image == (8, 8)
    assert t.sha256() == ENTRIES[name].load().sha256()


def test_the_textbook_split_keeps_the_order_of_scikit_learn() -> None:
    rows, labels = whole(DIGITS.load())
    images, targets = sklearn_digits()
    assert torch.equal(rows, images)
    assert torch.equal(labels, targets)


@pytest.mark.parametrize("entry", [DIGITS, DIGITS_SHUFFLED])
def test_levels_are_the_integers_0_to_16(entry: object) -> None:
    t = entry.load()  # type: ignore[attr-defined]
    assert (t.info.domain, t.info.levels) == ("levels", 17)
    assert whole(t)[0].unique().tolist() == list(range(17))


def test_the_shuffled_parts_hold_every_image_once() -> None:
    rows, labels = whole(DIGITS_SHUFFLED.load())
    images, targets = sklearn_digits()
    assert not torch.equal(rows, images)

    def labelled(x: Tensor, y: Tensor) -> list[tuple[float, ...]]:
        return sorted(map(tuple, torch.cat([x, y[:, None].float()], dim=1).tolist()))

    assert labelled(rows, labels) == labelled(images, targets)


def test_the_shuffled_parts_have_the_classes_in_proportion() -> None:
    t = DIGITS_SHUFFLED.load()
    assert t.labels is not None
    share = torch.bincount(whole(t)[1]).double() / 1797
    for part in t.labels:
        counts = torch.bincount(part, minlength=10)
        assert ((counts - share * len(part)).abs() <= 1).all()


def test_binary_pixels_are_on_from_level_8() -> None:
    binary, grey = DIGITS_BINARY.load(), DIGITS.load()
    assert (binary.info.domain, binary.info.levels) == ("bits", 2)
    rows, labels = whole(binary)
    levels, same_labels = whole(grey)
    assert torch.equal(labels, same_labels)
    assert rows.unique().tolist() == [0, 1]
    assert (rows[levels == 8] == 1).all()
    assert (rows[levels == 7] == 0).all()
    assert torch.equal(rows, (levels > 7).float())
