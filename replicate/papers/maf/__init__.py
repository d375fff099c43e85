"""Papamakarios, Pavlakou, Murray 2017: Masked autoregressive flow for density estimation, 1705.07057; its tables.

Replicated: MADE with a Gaussian for each conditional, and MAF of five such networks, on MNIST and CIFAR-10 in logit
space, in bits per dimension of the pixels (the conversion that 1810.01367, table 2, makes). The rows of the small
tables wait for data: POWER, GAS, HEPMASS and BSDS300 as the authors preprocessed them, and MINIBOONE's training rows.
They are then measured by the registered gaussian-mixture with one component, realnvp, and maf with one block or five.
The paper prints log-likelihoods, the suite measures NLL.

From the released code: two layers of 1024 rectified units, batches of 100, Adam at 1e-3 for MADE and 1e-4 for MAF,
logits of 1e-6 + (1 - 2e-6) x (CIFAR-10: 0.05 + 0.9 x, and each training image mirrored too), training and validation
images dequantised once, weights of the best validation epoch.

Deviations, besides those of `baselines.maf`: each pixel's logits are standardised, which changes no likelihood of what
is then trained but the way there; a fixed number of epochs where the code waits for 30 without a better one; no weight
decay (1e-6 there); the test images have several noise draws where the code has one.
"""

from dataclasses import dataclass

from baselines.maf import MAF
from replicate.experiments import Paper, Run
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
PAPER = Paper("maf", __file__, ROWS)
