"""The classifier of 28x28 images on made-up ones: what it tells apart, and that it is the same every time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from replicate.data.files import find
from replicate.metrics import features
from replicate.metrics.features import IMAGES, FeatureClassifier, feature_quality, image_features, sample_quality
from replicate.model import DataInfo
from replicate.tasks.base import Task
from replicate.tasks.images import FILES, mnist


def two_kinds(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noise whose upper half (class 0) or lower half (class 1) is brighter, grey values 0..255, and the classes."""
    generator = torch.Generator().manual_seed(seed)
    x = 150 * torch.rand(n, 28, 28, generator=generator)
    labels = torch.randint(2, (n,), generator=generator)
    x[labels == 0, :14] += 100
    x[labels == 1, 14:] += 100
    return x.floor().view(n, 784), labels


def classifier(seed: int = 0) -> FeatureClassifier:
    return FeatureClassifier.train(replace(IMAGES, epochs=2), *two_kinds(600, 1), seed)


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> Iterator[Task]:
    """Two kinds of images in the place of MNIST."""
    parts = [two_kinds(n, seed) for n, seed in ((400, 1), (100, 2), (150, 3))]
    x, y = zip(*parts, strict=True)
    task = Task("mnist", "", DataInfo(784, "levels", 256, (28, 28)), x[0], x[1], x[2], labels=(y[0], y[1], y[2]))
    monkeypatch.setitem(features.TASKS, "mnist", lambda: task)
    image_features.cache_clear()
    yield task
    image_features.cache_clear()


def test_two_kinds_of_images_are_separated() -> None:
    found, (x, labels) = classifier(), two_kinds(300, 2)
    accuracy = found.accuracy(x, labels)
    assert accuracy.value > 0.99
    assert (accuracy.kind, accuracy.n) == ("exact", 300)
    assert found.features(x).shape == (300, IMAGES.features)
    torch.testing.assert_close(found.probabilities(x).sum(1), torch.ones(300))


def test_training_twice_gives_the_same_weights_and_touches_no_global_generator() -> None:
    before = torch.get_rng_state()
    first, again, other = classifier(), classifier(), classifier(seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert first.sha256 == again.sha256 != other.sha256
    assert len(first.sha256) == 64
    x = two_kinds(5, 3)[0]
    assert torch.equal(first.features(x), again.features(x))


def test_features_do_not_depend_on_the_size_of_the_batch() -> None:
    found, x = classifier(), two_kinds(2 * features.CHUNK + 1, 4)[0]
    torch.testing.assert_close(found.features(x)[-1:], found.features(x[-1:]))


def test_identical_sets_are_at_no_distance_and_cover_each_other(made_up: Task) -> None:
    same = sample_quality(made_up.test, made_up.test, "mnist")
    spread = float(image_features("mnist").features(made_up.test).double().var(0).sum())
    assert same["frechet"].value == pytest.approx(0, abs=1e-4 * spread)
    assert same["precision"].value == same["recall"].value == same["coverage"].value == 1


def test_worse_images_are_farther(made_up: Task) -> None:
    noise = torch.randint(256, made_up.valid.shape, generator=torch.Generator().manual_seed(0)).float()
    real, fake = (sample_quality(x, made_up.test, "mnist") for x in (made_up.valid, noise))
    assert fake["frechet"].value > 5 * real["frechet"].value
    assert fake["coverage"].value < real["coverage"].value
    assert set(real) == {"frechet", "precision", "recall", "density", "coverage"}


def test_the_classifier_is_trained_once_per_process(made_up: Task) -> None:
    assert image_features("mnist") is image_features("mnist")
    with pytest.raises(ValueError, match="one of mnist, fashion-mnist"):
        image_features("cifar-10")


def test_neighbours_are_counted_in_sets_of_one_size() -> None:
    """Precision of n fakes against more reals is that against the first n of them."""
    x = torch.randn(90, 3, generator=torch.Generator().manual_seed(0))
    whole, part = feature_quality(x[:30], x[30:]), feature_quality(x[:30], x[30:60])
    assert whole["precision"] == part["precision"]
    assert whole["frechet"].value != part["frechet"].value


@pytest.mark.skipif(any(find(name) is None for name in FILES["mnist"]), reason="MNIST is not in REPLICATE_DATA")
def test_a_tenth_of_mnist_is_enough_to_read_most_digits() -> None:
    task = mnist()
    assert task.labels is not None
    found = FeatureClassifier.train(replace(IMAGES, epochs=2), task.train[:5000], task.labels[0][:5000], features.SEED)
    accuracy = found.accuracy(task.test[:2000], task.labels[2][:2000])
    assert accuracy.value > 0.85
