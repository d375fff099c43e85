"""MADE with Gaussian conditionals and MAF on MNIST and CIFAR-10."""

from __future__ import annotations

from dataclasses import dataclass

from baselines.maf import MAF
from replicate.experiments import Run
from replicate.experiments.image_flows import FlowSettings, image_row
from replicate.experiments.image_rows import full_row
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
    blocks: int
    dropout: float = 0.0
    bound: float = 5.0
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


#: name, what is trained, settings, minutes
_ROWS: tuple[tuple[str, str, Settings, float], ...] = (
    ("maf-made-mnist", "MADE with Gaussian conditionals", Settings(blocks=1, steps=30_000), 2),
    ("maf-mnist", "MAF of five networks", Settings(blocks=5, lr=1e-4, steps=75_000), 8),
    ("maf-made-cifar-10", "MADE with Gaussian conditionals", ColourSettings(blocks=1, steps=45_000), 4),
    ("maf-cifar-10", "MAF of five networks", ColourSettings(blocks=5, lr=1e-4, steps=45_000), 9),
)
ROWS = tuple(
    full_row(name, minutes, f"{what} on dequantised {s.data.upper()} in logit space", s, "flow", FILES[s.data])(
        colour if isinstance(s, ColourSettings) else grey
    )
    for name, what, s, minutes in _ROWS
)
