"""Classifiers as measuring instruments: features of digits, and the classifier two-sample test.

`DigitFeatures` stands where Inception features stand for large images (Heusel et al. 2017, arXiv:1706.08500): a small
convolutional network, trained once under a fixed seed on the task's training labels and identified by its weights'
sha256. `c2st` follows Lopez-Paz and Oquab 2017, arXiv:1610.06545, with the five folds of Lueckmann et al. 2021,
arXiv:2101.04653.
"""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from replicate.model import Estimate

FEATURES = 32
EPOCHS = 30
BATCH = 50
LEARNING_RATE = 3e-3
FOLDS = 5


def _network(classes: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 16, 3, padding=1),
        nn.SiLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.SiLU(),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, FEATURES),
        nn.SiLU(),
        nn.Linear(FEATURES, classes),
    )


@dataclass(frozen=True)
class DigitFeatures:
    """Features of 8x8 images: the last hidden layer of a small convolutional classifier, on the CPU.

    Attributes:
        network: pixels divided by `scale`, (n, 64), to class logits.
        scale: the largest pixel value.
        sha256: of the trained weights, in the state dictionary's order.
    """

    network: nn.Sequential
    scale: float
    sha256: str

    @staticmethod
    def train(x: Tensor, labels: Tensor, scale: float, seed: int) -> DigitFeatures:
        """Train on x (n, 64) with values 0..scale and labels (n,) int64; the same weights for the same seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = _network(int(labels.max()) + 1)
        generator = torch.Generator().manual_seed(seed)
        x, labels = x.cpu().float() / scale, labels.cpu()
        optimizer = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE)
        per_epoch = -(-len(x) // BATCH)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * per_epoch)
        with torch.enable_grad():
            for _ in range(EPOCHS):
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
        return DigitFeatures(network, scale, digest.hexdigest())

    @torch.no_grad()
    def features(self, x: Tensor) -> Tensor:
        """Features (n, 32) of images x (n, 64) with values 0..scale."""
        return self.network[:-1](x.cpu().float() / self.scale)

    @torch.no_grad()
    def accuracy(self, x: Tensor, labels: Tensor) -> Estimate:
        """Share of images x (n, 64) that the classifier labels as `labels` (n,)."""
        right = self.network(x.cpu().float() / self.scale).argmax(1) == labels.cpu()
        return Estimate.mean_of(right, "exact", "accuracy")


def c2st(x: Tensor, y: Tensor, generator: torch.Generator) -> Estimate:
    """Classifier two-sample test: the accuracy at telling x from y on held-out folds.

    0.5 means that the classifier finds no difference, 1 that it tells every sample. The classifier is a multilayer
    perceptron with one hidden layer on standardised inputs, early-stopped by its number of iterations. The standard
    error takes the held-out answers as independent, although folds share training data.

    Args:
        x, y: samples, (n, D) each, so that chance is 0.5.
        generator: draws the seed of the folds and of the classifier.

    Raises:
        ValueError: the shapes differ, or there are fewer samples than folds.
    """
    if x.shape != y.shape or x.ndim != 2 or len(x) < FOLDS:
        raise ValueError(f"c2st needs two sets (n, D) with n >= {FOLDS}; got {tuple(x.shape)}, {tuple(y.shape)}")
    seed = int(torch.randint(2**31 - 1, (), generator=generator, device=generator.device))
    data = torch.cat([x, y]).detach().cpu().double().numpy()
    label = np.repeat([0, 1], len(x))
    network = MLPClassifier((64,), alpha=1e-3, batch_size=64, learning_rate_init=3e-3, max_iter=40, random_state=seed)
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # stopping after max_iter is the regularisation
        answer = cross_val_predict(make_pipeline(StandardScaler(), network), data, label, cv=folds)
    return Estimate.mean_of(torch.from_numpy(answer == label), "estimate", "accuracy")
