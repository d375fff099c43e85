"""Minibatches as the papers' code takes them: pass after pass, each in a fresh order.

`replicate.runs.training.Batches` concatenates its passes, so that no batch is short; here a last one may be.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


class Minibatches(Iterator[Tensor]):
    """Endless batches of rows, each pass over the rows in a fresh permutation.

    A permutation is drawn with its first batch: the generator may serve other draws in between.

    Args:
        rows: shape (n, ..).
        size: rows per batch; the last one of a pass may have fewer, or is left out where batches must be `whole`.
        generator: draws the permutations.
    """

    def __init__(self, rows: Tensor, size: int, generator: torch.Generator, whole: bool = False) -> None:
        self.rows, self.size, self.generator = rows, size, generator
        self.used = len(rows) - len(rows) % size if whole else len(rows)
        self.order = torch.empty(0, dtype=torch.int64, device=generator.device)

    def __len__(self) -> int:
        """Return the number of batches per pass."""
        return -(-self.used // self.size)

    def __next__(self) -> Tensor:
        if not len(self.order):
            fresh = torch.randperm(len(self.rows), generator=self.generator, device=self.generator.device)
            self.order = fresh[: self.used]
        chosen, self.order = self.order[: self.size], self.order[self.size :]
        return self.rows[chosen]

    def state_dict(self) -> dict[str, Any]:
        """Return the rest of the permutation, and the generator."""
        return {"order": self.order, "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a state."""
        self.order = state["order"].to(self.generator.device)
        self.generator.set_state(state["generator"].cpu())
