"""Larochelle and Murray 2011: The Neural Autoregressive Distribution Estimator, AISTATS.

Replicated: test NLL of NADE with 500 hidden units on static bits of MNIST, whose files the paper made.

Deviations: stochastic gradient descent in batches of 100 with momentum 0.9 and a learning rate that falls to zero,
where the paper takes one example per step. The paper's learning rate for these bits and its order of the pixels could
not be checked against a text: here the pixels are read row by row from the top. The best of the validated steps is
kept.
"""

from dataclasses import dataclass

from baselines.nade import FixedOrderNADE
from replicate.experiments import Paper, Run
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


PAPER = Paper("larochelle", __file__, experiments=(static_bits,))
