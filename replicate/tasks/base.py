"""A task: data with a fixed split, and the truth where it is known."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from replicate.data.files import absent
from replicate.errors import UsageError
from replicate.model import DataInfo

#: test rows of data, not of a density: a record keeps the likelihood of each
MAX_EXAMPLES = 100_000


class Density(Protocol):
    """A density whose log p, score and sampler are exact."""

    dim: int
    #: False where log p is not differentiable everywhere (the checkerboard's edges)
    smooth: bool
    #: per-axis half width of a centred box that holds all but a negligible mass (< 1e-8 where smooth)
    half_width: float
    #: the smallest length over which the density changes: Langevin's step sizes are set by it
    narrowest: float

    def log_prob(self, x: Tensor) -> Tensor:
        """Return the exact log density in nats of x (n, D), shape (n,); computed in x's dtype."""

    def score(self, x: Tensor) -> Tensor:
        """Return the exact grad log p of x (n, D), shape (n, D)."""

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Draw n exact samples, shape (n, D), float32."""

    def mode_weights(self) -> Tensor | None:
        """Return the true probability of each mode, shape (M,), or None where modes mean nothing."""

    def mode_of(self, x: Tensor) -> Tensor:
        """Return the index of the mode of each x (n, D), shape (n,), int64."""


@dataclass(frozen=True)
class Task:
    """Data with a fixed split.

    Attributes:
        name: as in `replicate list`.
        about: one line.
        info: what a model may know of the data.
        train, valid, test: float32 tensors (n, D); discrete data hold integers. `check_task` has every rule.
        density: the truth, where it is known.
        labels: class labels of (train, valid, test) where the data have them (only metrics read them).
        redraw: where training draws every batch afresh, redraw(rows of train, generator) -> the batch; train then holds
            the parameters of the draw.
    """

    name: str
    about: str
    info: DataInfo
    train: Tensor
    valid: Tensor
    test: Tensor
    density: Density | None = None
    labels: tuple[Tensor, Tensor, Tensor] | None = None
    redraw: Callable[[Tensor, torch.Generator], Tensor] | None = None

    def sha256(self) -> str:
        """Return the sha256 of the three parts' bytes: the data's identity in a run's hash."""
        digest = hashlib.sha256()
        for part in (self.train, self.valid, self.test):
            array = part.contiguous().numpy()
            digest.update(f"{array.dtype.str}{array.shape}".encode())
            digest.update(array.tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class TaskEntry:
    """How the suite finds a task: the object that an entry point in `replicate.tasks` names.

    Attributes:
        about: one line.
        load: builds the task; deterministic, reads at most REPLICATE_DATA. Called as load(fold) where there are folds.
        kind: "density" (truth known) or "data".
        folds: of cross-validation; a run of seed s is on fold s modulo this, and models are still paired by seed.
        files: paths below REPLICATE_DATA that it reads, each as it is or packed (.gz, .xz).
        info: that of the task, known without loading it; without it the report cannot draw images or plot by dimension.
        series: of tasks of one kind in several dimensions, which the report shows against their dimension.
    """

    about: str
    load: Callable[..., Task]
    kind: str
    folds: int = 1
    files: tuple[str, ...] = ()
    info: DataInfo | None = None
    series: str = ""

    def absent(self) -> str:
        """Return why this machine cannot load it: the first of its missing files; "" where it has all."""
        return absent(self.files)


def refused(what: str, problem: str) -> UsageError:
    """Return the error for a file whose bytes are not those of its data set, with the next step."""
    return UsageError(f"{what}: {problem}; get the file again.")
