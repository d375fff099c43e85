"""MADE with Gaussian conditionals and MAF on MNIST and CIFAR-10."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from baselines.maf import MAF
from replicate.experiments import Experiment, Run, experiment
from replicate.experiments.image_flows import FlowSettings, image_row
from replicate.tasks.images import FILES


#: 3.5 million multiply-adds per image and network: 10 GFLOP per batch for five, far below what their kernels cost to
#: launch: about 450 per step, 5 ms with the masking of 17 million weights.
@dataclass(frozen=True, kw_only=True)
class Settings(FlowSettings):
    """Settings of `blocks` networks on MNIST."""

    transform: str = "logit"
    noise_once: bool = True
    hidden: int = 1024
    layers: int = 2
    bound: float = 5.0
    batch_size: int = 100
    schedule: str = "constant"
    validate_every: int = 500


#: 3.5 to 4 times the weights of MNIST's networks, and twice the images
@dataclass(frozen=True, kw_only=True)
class ColourSettings(Settings):
    """Settings of `blocks` networks on CIFAR-10."""

    data: str = "cifar-10"
    alpha: float = 0.05
    mirror: bool = True


def grey(run: Run, s: Settings) -> None:
    """Train on grey images and bound the bits per dimension of the test images."""
    image_row(run, MAF, s)


def colour(run: Run, s: ColourSettings) -> None:
    """Train on colour images and bound the bits per dimension of the test images."""
    image_row(run, MAF, s, s.mirror)


def row(name: str, about: str, function: Callable[..., None], settings: Settings, minutes: float) -> Experiment:
    """Declare the experiment of one row."""
    return experiment(
        name,
        about=f"{about} in logit space",
        family="flow",
        settings=settings,
        seeds=3,
        profiles=("full",),
        files=FILES[settings.data],
        cuda_minutes=minutes,
    )(function)


_MADE, _MAF = "MADE with Gaussian conditionals on dequantised", "MAF of five networks on dequantised"
ROWS = (
    row("maf-made-mnist", f"{_MADE} MNIST", grey, Settings(blocks=1, lr=1e-3, steps=30_000), 2),
    row("maf-mnist", f"{_MAF} MNIST", grey, Settings(blocks=5, lr=1e-4, steps=75_000), 8),
    row("maf-made-cifar-10", f"{_MADE} CIFAR-10", colour, ColourSettings(blocks=1, lr=1e-3, steps=45_000), 4),
    row("maf-cifar-10", f"{_MAF} CIFAR-10", colour, ColourSettings(blocks=5, lr=1e-4, steps=45_000), 9),
)
