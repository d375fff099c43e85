"""NADE on static bits of MNIST."""

from __future__ import annotations

from dataclasses import dataclass

from baselines.nade import FixedOrderNADE
from replicate.experiments import Run
from replicate.experiments.image_rows import RowSettings, exact_row, full_row
from replicate.tasks.images import mnist_static


@dataclass(frozen=True, kw_only=True)
class Settings(RowSettings):
    """Settings of NADE."""

    steps: int = 200_000
    lr: float = 0.05
    validate_every: int = 2000
    optimizer: str = "sgd"
    hidden: int = 500


@full_row("nade-static", 10)
def static_bits(run: Run, s: Settings) -> None:
    """NADE with 500 hidden units on static bits."""
    task = mnist_static()
    exact_row(run, task, lambda: FixedOrderNADE(task.info, s.hidden), s, chunk=len(task.test))
