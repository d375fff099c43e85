"""The row `truth`: the task's own density and sampler, which show the floor of every metric."""

from typing import ClassVar

import torch
from torch import Tensor

from replicate.model import DataInfo, Family, Model, ModelEntry, Training
from replicate.tasks.base import Density


class Truth(Model):
    """The true density as a model; on data, where no density is known, training examples as samples."""

    family: ClassVar[Family] = "reference"
    train_examples: Tensor

    def __init__(self, info: DataInfo, density: Density | None) -> None:
        super().__init__()
        self.density = density
        self.register_buffer("train_examples", torch.empty(0, info.dim))
        known = () if density is None else ("log_prob", "score") if density.smooth else ("log_prob",)
        self.capabilities = frozenset({"sample", *known})

    def initialise(self, train: Tensor, generator: torch.Generator) -> None:
        if self.density is None:
            self.train_examples = train.clone()

    def _known(self) -> Density:
        if self.density is None:
            raise NotImplementedError("the true density is not known")
        return self.density

    def log_prob(self, x: Tensor) -> Tensor:
        return self._known().log_prob(x)

    def score(self, x: Tensor) -> Tensor:
        return self._known().score(x)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Exact samples; on data, training examples without repeats (with, where n is larger than the split)."""
        if self.density is not None:
            return self.density.sample(n, generator)
        size = len(self.train_examples)
        order = torch.randperm(size, generator=generator, device=generator.device)
        extra = torch.randint(size, (max(0, n - size),), generator=generator, device=generator.device)
        return self.train_examples[torch.cat([order[: min(n, size)], extra])]


TRUTH = ModelEntry(
    family="reference",
    about="the density and sampler themselves (on data: training images as samples)",
    paper="the task's own definition",
    build=Truth,
    domains=frozenset({"continuous", "levels", "bits"}),
    training=Training(steps=0),
    needs_density=True,
)
