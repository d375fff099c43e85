"""Measure the quality of grey images in the features of a classifier that the suite trains itself.

`FeatureClassifier` takes the place that Inception has for photographs (Heusel et al. 2017, arXiv:1706.08500): a small
convolutional network, trained once per process under a fixed seed on a task's training labels and identified by its
weights' sha256. Distances in the features of two classifiers do not compare, so the record has the digest with every
number. Far from its training data a classifier is unreliable: for that of MNIST 96 in 100 images of uniform noise are
among real ones, within the wide balls of outliers, so that precision and density mean little where the Frechet distance
or coverage is bad (1121 and 0.01 there, against 16 and 0.93 for 1000 validation images). The published FID of the same
images is another number: it needs Inception's weights.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from replicate.metrics.quality import frechet, precision_recall_density_coverage
from replicate.model import Estimate
from replicate.tasks.base import Task
from replicate.tasks.images import fashion_mnist, mnist

#: seed of the initial weights and the batches of the classifiers of 28x28 images; part of their definition
SEED = 170608500
LEARNING_RATE = 3e-3
#: rows per call of the network
CHUNK = 2_000
#: rows per set behind precision, recall, density and coverage, whose cost grows with the square
NEIGHBOURS_OF = 5_000
#: tasks that have a classifier of 28x28 images
TASKS: dict[str, Callable[[], Task]] = {"mnist": mnist, "fashion-mnist": fashion_mnist}


@dataclass(frozen=True)
class Design:
    """A classifier of one size of images, with its training.

    Attributes:
        side: height and width.
        kernel, stride: of the first convolution, 1 to 16 channels; the second has kernel 3, stride 2 and 32 channels.
        features: width of the last hidden layer.
        white: the largest grey value.
        epochs, batch: of the training.
    """

    side: int
    kernel: int
    stride: int
    features: int
    white: float
    epochs: int
    batch: int

    def network(self, classes: int) -> nn.Sequential:
        """Return the untrained network: pixels divided by `white`, (n, side^2), to class logits."""
        left = self.side // self.stride // 2
        return nn.Sequential(
            nn.Unflatten(1, (1, self.side, self.side)),
            nn.Conv2d(1, 16, self.kernel, stride=self.stride, padding=self.kernel // 2),
            nn.SiLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(32 * left**2, self.features),
            nn.SiLU(),
            nn.Linear(self.features, classes),
        )


DIGITS = Design(side=8, kernel=3, stride=1, features=32, white=16.0, epochs=30, batch=50)
IMAGES = Design(side=28, kernel=5, stride=2, features=64, white=255.0, epochs=5, batch=128)


@dataclass(frozen=True)
class FeatureClassifier:
    """A classifier of grey images and its last hidden layer; on the CPU.

    Attributes:
        design: of its images.
        network: pixels divided by the largest grey value, (n, D), to class logits.
        sha256: of the trained weights, in the state dictionary's order.
    """

    design: Design
    network: nn.Sequential
    sha256: str

    @staticmethod
    def train(design: Design, x: Tensor, labels: Tensor, seed: int) -> FeatureClassifier:
        """Train on x (n, D) with labels (n,) int64; the same weights for the same seed.

        Adam, with a rate that falls to 0 along a cosine. The loop is deliberately not resumable: whether a process has
        to train depends on its earlier work, and a journal counts the loops that it meets.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = design.network(int(labels.max()) + 1)
        generator = torch.Generator().manual_seed(seed)
        x, labels = x.cpu().float() / design.white, labels.cpu()
        optimizer = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE)
        per_epoch = -(-len(x) // design.batch)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, design.epochs * per_epoch)
        with torch.enable_grad():
            for _ in range(design.epochs):
                for batch in torch.randperm(len(x), generator=generator).split(design.batch):
                    loss = nn.functional.cross_entropy(network(x[batch]), labels[batch])
                    optimizer.zero_grad(set_to_none=True)
                    loss.backward()
                    optimizer.step()
                    schedule.step()
        network.requires_grad_(False)
        digest = hashlib.sha256()
        for value in network.state_dict().values():
            digest.update(value.numpy().tobytes())
        return FeatureClassifier(design, network, digest.hexdigest())

    @torch.no_grad()
    def _through(self, layers: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return torch.cat([layers(part.cpu().float() / self.design.white) for part in x.split(CHUNK)])

    def features(self, x: Tensor) -> Tensor:
        """Return the last hidden layer (n, F) of images x (n, D)."""
        return self._through(self.network[:-1], x)

    def probabilities(self, x: Tensor) -> Tensor:
        """Return class probabilities (n, classes) of images x (n, D)."""
        return self._through(self.network, x).softmax(1)

    def accuracy(self, x: Tensor, labels: Tensor) -> Estimate:
        """Return the share of images x (n, D) that the classifier labels as `labels` (n,)."""
        right = self._through(self.network, x).argmax(1) == labels.cpu()
        return Estimate.mean_of(right, "exact", "accuracy")


@cache
def image_features(name: str) -> FeatureClassifier:
    """Return the classifier of "mnist" or "fashion-mnist", trained once per process on the task's training part.

    Raises:
        ValueError: there is no classifier of that name.
        UsageError: a file of the task is missing or wrong.
    """
    if name not in TASKS:
        raise ValueError(f"there is no classifier of {name!r}; it is one of {', '.join(TASKS)}")
    task = TASKS[name]()
    assert task.labels is not None
    return FeatureClassifier.train(IMAGES, task.train, task.labels[0], SEED)


def feature_quality(fake: Tensor, real: Tensor) -> dict[str, Estimate]:
    """Return Frechet distance, precision, recall, density and coverage of features fake (n, F) against real (m, F).

    The Frechet distance uses all rows, the others the first min(n, m, 5000) of each set.

    Raises:
        ValueError: the numbers of features differ, or a set has too few rows.

    Example:
        >>> x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
        >>> found = feature_quality(x, x)
        >>> round(found["frechet"].value, 6), found["coverage"].value
        (0.0, 1.0)
    """
    k = min(len(fake), len(real), NEIGHBOURS_OF)
    return {"frechet": frechet(fake, real), **precision_recall_density_coverage(real[:k], fake[:k])}


def sample_quality(samples: Tensor, real: Tensor, name: str) -> dict[str, Estimate]:
    """Return `feature_quality` of images (n, 784) against (m, 784), grey values 0..255, by the classifier of `name`.

    Raises:
        ValueError: there is no classifier of that name, or a set has too few rows.
        UsageError: a file of the task is missing or wrong.
    """
    classifier = image_features(name)
    return feature_quality(classifier.features(samples), classifier.features(real))
