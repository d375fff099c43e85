"""Sample quality of 28x28 grey images in the features of a classifier that the suite trains itself.

`ImageFeatures` stands where Inception features stand for photographs (Heusel et al. 2017, arXiv:1706.08500), as
`classifier.DigitFeatures` does for 8x8 digits: a small convolutional network, trained once a process under a fixed
seed on the labels of MNIST or Fashion-MNIST and identified by its weights' sha256. Distances in the features of two
classifiers do not compare, so the digest belongs beside every number. Far from its training data a classifier is blind
in its own way: to the one of MNIST 96 in 100 images of uniform noise lie among real ones, within the wide balls of
outliers, so that precision and density mean little beside a bad Frechet distance or coverage (1121 and 0.01 there,
against 16 and 0.93 for 1000 validation images). The published FID of the same images is another number: it
needs Inception's weights.
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

FEATURES = 64
#: of the initial weights and the batches; part of what a classifier is
SEED = 170608500
WHITE = 255.0
EPOCHS = 5
BATCH = 128
LEARNING_RATE = 3e-3
#: rows that pass the network at a time
CHUNK = 2_000
#: rows of either set behind precision, recall, density and coverage, whose cost grows with the square
NEIGHBOURS_OF = 5_000
#: what a classifier may be trained on
TASKS: dict[str, Callable[[], Task]] = {"mnist": mnist, "fashion-mnist": fashion_mnist}


def _network(classes: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Unflatten(1, (1, 28, 28)),
        nn.Conv2d(1, 16, 5, stride=2, padding=2),
        nn.SiLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.SiLU(),
        nn.Flatten(),
        nn.Linear(32 * 7 * 7, FEATURES),
        nn.SiLU(),
        nn.Linear(FEATURES, classes),
    )


@dataclass(frozen=True)
class ImageFeatures:
    """A classifier of 28x28 images with grey values 0..255, and its last hidden layer; on the CPU.

    Attributes:
        network: pixels divided by 255, (n, 784), to class logits.
        sha256: of the trained weights, in the state dictionary's order.
    """

    network: nn.Sequential
    sha256: str

    @staticmethod
    def train(x: Tensor, labels: Tensor, seed: int, epochs: int = EPOCHS) -> ImageFeatures:
        """Train on x (n, 784) with labels (n,) int64; the same weights for the same seed.

        Adam, its rate falling to 0 along a cosine. The loop is none that a killed run goes on with: whether a process
        has to train depends on what it did before, and a journal counts the loops that it meets.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = _network(int(labels.max()) + 1)
        generator = torch.Generator().manual_seed(seed)
        x, labels = x.cpu().float() / WHITE, labels.cpu()
        optimizer = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * -(-len(x) // BATCH))
        with torch.enable_grad():
            for _ in range(epochs):
                for batch in torch.randperm(len(x), generator=generator).split(BATCH):
                    loss = nn.functional.cross_entropy(network(x[batch]), labels[batch])
                    optimizer.zero_grad(set_to_none=True)
                    loss.backward()
                    optimizer.step()
                    schedule.step()
        network.requires_grad_(False)
        digest = hashlib.sha256()
        for value in network.state_dict().values():
            digest.update(value.numpy().tobytes())
        return ImageFeatures(network, digest.hexdigest())

    @torch.no_grad()
    def _through(self, layers: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return torch.cat([layers(part.cpu().float() / WHITE) for part in x.split(CHUNK)])

    def features(self, x: Tensor) -> Tensor:
        """The last hidden layer (n, 64) of images x (n, 784) with values 0..255."""
        return self._through(self.network[:-1], x)

    def probabilities(self, x: Tensor) -> Tensor:
        """Class probabilities (n, classes) of images x (n, 784)."""
        return self._through(self.network, x).softmax(1)

    def accuracy(self, x: Tensor, labels: Tensor) -> Estimate:
        """Share of images x (n, 784) that the classifier labels as `labels` (n,)."""
        return Estimate.mean_of(self.probabilities(x).argmax(1) == labels.cpu(), "exact", "accuracy")


@cache
def image_features(name: str) -> ImageFeatures:
    """The classifier of "mnist" or "fashion-mnist", trained once a process on the task's training part.

    Raises:
        ValueError: there is no classifier of that name.
        UsageError: a file of the task is missing or wrong.
    """
    if name not in TASKS:
        raise ValueError(f"there is no classifier of {name!r}; it is one of {', '.join(TASKS)}")
    task = TASKS[name]()
    assert task.labels is not None
    return ImageFeatures.train(task.train, task.labels[0], SEED)


def feature_quality(fake: Tensor, real: Tensor) -> dict[str, Estimate]:
    """Frechet distance, precision, recall, density and coverage of features fake (n, F) against real (m, F).

    The Frechet distance takes all rows, the others the first min(n, m, 5000) of each set.

    Raises:
        ValueError: the numbers of features differ, or a set has too few rows.
    """
    k = min(len(fake), len(real), NEIGHBOURS_OF)
    return {"frechet": frechet(fake, real), **precision_recall_density_coverage(real[:k], fake[:k])}


def sample_quality(samples: Tensor, real: Tensor, name: str) -> dict[str, Estimate]:
    """`feature_quality` of images (n, 784) against (m, 784), grey values 0..255, by the classifier of `name`.

    Raises:
        ValueError: there is no classifier of that name, or a set has too few rows.
        UsageError: a file of the task is missing or wrong.
    """
    classifier = image_features(name)
    return feature_quality(classifier.features(samples), classifier.features(real))
