"""The classifier two-sample test.

Lopez-Paz and Oquab 2017, arXiv:1610.06545, with the five folds of Lueckmann et al. 2021, arXiv:2101.04653.
"""

import warnings

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from replicate.model import Estimate

FOLDS = 5


def c2st(x: Tensor, y: Tensor, generator: torch.Generator) -> Estimate:
    """Return the accuracy of a classifier of x against y on held-out folds: the classifier two-sample test.

    0.5 means that the classifier finds no difference, 1 that it separates the sets. The classifier is a multilayer
    perceptron with one hidden layer on standardised inputs, early-stopped by its number of iterations. The standard
    error treats the held-out answers as independent, although folds share training data.

    Args:
        x, y: samples, (n, D) each, so that chance is 0.5.
        generator: draws the seed of the folds and of the classifier.

    Raises:
        ValueError: the shapes differ, or there are fewer samples than folds.

    Example:
        Two sets that do not overlap:

        >>> g = torch.Generator().manual_seed(0)
        >>> x = torch.randn(50, 2, generator=g)
        >>> c2st(x, x + 20, g).value
        1.0
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
