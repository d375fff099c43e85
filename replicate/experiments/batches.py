"""Minibatches as the papers' code walks through them: pass after pass, each in a fresh order.

`replicate.runs.training.Batches` joins its passes, so that no batch is short; here a pass ends with what is left.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


class Minibatches(Iterator[Tensor]):
    """Rows in batches without end, through fresh permutations of them.

    A permutation is drawn when its first batch is asked for: the generator may serve others in between.

    Args:
        rows: shape (n, ..).
        size: rows of a batch; the last one of a pass may have fewer.
        generator: of the permutations.
        whole: leave out a last batch that is short.
    """

    def __init__(self, rows: Tensor, size: int, generator: torch.Generator, whole: bool = False) -> None:
        self.rows, self.size, self.generator = rows, size, generator
        self.used = len(rows) - len(rows) % size if whole else len(rows)
        self.order = torch.empty(0, dtype=torch.int64, device=generator.device)

    def __len__(self) -> int:
        """Batches of a pass."""
        return -(-self.used // self.size)

    def __next__(self) -> Tensor:
        if not len(self.order):
            fresh = torch.randperm(len(self.rows), generator=self.generator, device=self.generator.device)
            self.order = fresh[: self.used]
        chosen, self.order = self.order[: self.size], self.order[self.size :]
        return self.rows[chosen]

    def state_dict(self) -> dict[str, Any]:
        """What is left of the permutation, and the generator."""
        return {"order": self.order, "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.order = state["order"].to(self.generator.device)
        self.generator.set_state(state["generator"].cpu())
