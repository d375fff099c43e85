"""van den Oord et al. 2016: PixelCNN (1601.06759) and Gated PixelCNN (1606.05328) on static bits of MNIST.

Replicated: test NLL of a plain stack of masked convolutions and of the gated model with a vertical and a horizontal
stack, which is this suite's registered gated-pixelcnn; and of the gated model on Caltech silhouettes, beside the number
that Chen et al. 2017 (1611.02731) print for a PixelCNN there.

Deviations: Adam where 1601.06759 has RMSProp. Numbers of layers and channels on MNIST are not printed: the masked stack
has the paper's CIFAR form (a 7x7 convolution of type A, then residual blocks h + W relu(3x3 type B relu(W relu(h))))
at a smaller width. Weights are those of the best validation step, averaged, with dropout in the gated model.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from replicate.experiments import Paper, Run
from replicate.experiments.image_rows import STATIC_BITS, RowSettings, exact_row, full_row
from replicate.model import DataInfo, Model
from replicate.registry import model_entry
from replicate.tasks.binary import SILHOUETTES_FILE
from replicate.tasks.loading import task_entry

#: rows scored at a time
CHUNK = 500


class MaskedConv(nn.Conv2d):
    """A k x k convolution that sees the pixels before this one in raster order (1601.06759, figure 2, right).

    Args:
        inputs, outputs, kernel: channels, and k, odd.
        centre: whether it sees the pixel itself (type B) or not (type A).
    """

    mask: Tensor

    def __init__(self, inputs: int, outputs: int, kernel: int, centre: bool) -> None:
        super().__init__(inputs, outputs, kernel, padding=kernel // 2)
        mask = torch.zeros(kernel * kernel)
        mask[: kernel * kernel // 2 + int(centre)] = 1
        self.register_buffer("mask", mask.view(kernel, kernel))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * self.mask, self.bias, padding=self.padding)


class Block(nn.Module):
    """h + W relu(3x3 masked relu(V relu(h))) with half the channels inside (1601.06759, figure 5, left)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.enter = nn.Conv2d(width, width // 2, 1)
        self.masked = MaskedConv(width // 2, width // 2, 3, centre=True)
        self.leave = nn.Conv2d(width // 2, width, 1)

    def forward(self, h: Tensor) -> Tensor:
        """(n, width, H, W) -> the same shape."""
        return h + self.leave(F.relu(self.masked(F.relu(self.enter(F.relu(h))))))


class PixelCNN(Model):
    """The plain masked stack on images (height, width) of bits, with `width` channels and `layers` residual blocks."""

    family = "autoregressive"
    capabilities = frozenset({"log_prob"})

    def __init__(self, image: tuple[int, int], width: int, layers: int) -> None:
        super().__init__()
        self.image = image
        self.first = MaskedConv(1, width, 7, centre=False)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(layers)))
        self.last = nn.Sequential(nn.ReLU(), nn.Conv2d(width, width, 1), nn.ReLU(), nn.Conv2d(width, 1, 1))

    def logits(self, x: Tensor) -> Tensor:
        """Bits x (n, D) -> logits (n, D); that of pixel d sees x[:, :d] only."""
        return self.last(self.blocks(self.first((2 * x - 1).view(-1, 1, *self.image)))).flatten(1)

    def log_prob(self, x: Tensor) -> Tensor:
        return F.logsigmoid((2 * x - 1) * self.logits(x)).sum(-1)

    def loss(self, batch: Tensor, generator: torch.Generator) -> Tensor:
        """Mean NLL in nats."""
        return -self.log_prob(batch).mean()


@dataclass(frozen=True, kw_only=True)
class Settings(RowSettings):
    """Settings of a PixelCNN.

    Attributes:
        data: a task of bits.
        gated: the gated model, else the plain stack.
        width, layers, dropout: of the model; the plain stack has no dropout.
    """

    data: str = STATIC_BITS
    gated: bool
    width: int = 64
    layers: int = 12
    dropout: float = 0.3
    steps: int = 100_000
    batch_size: int = 64
    grad_clip: float = 10.0
    ema: float = 0.999
    validate_every: int = 2000


def build(info: DataInfo, s: Settings) -> Model:
    """Return the untrained model that the settings name."""
    assert info.image is not None
    if s.gated:
        return model_entry("gated-pixelcnn").build(info, width=s.width, layers=s.layers, dropout=s.dropout)
    return PixelCNN(info.image, s.width, s.layers)


def train_and_score(run: Run, s: Settings) -> None:
    """Train on bits, keep the best validation step, and score the test bits exactly."""
    task = task_entry(s.data).load()
    exact_row(run, task, lambda: build(task.info, s), s, CHUNK)


MASKED = full_row(
    "pixelcnn-masked", 10, "plain stack of masked convolutions on static bits", Settings(gated=False, dropout=0.0)
)(train_and_score)
GATED = full_row("pixelcnn-gated", 10, "gated PixelCNN with two stacks on static bits", Settings(gated=True))(
    train_and_score
)
#: 4,100 silhouettes are soon learned by heart
_SETTINGS = Settings(gated=True, data="caltech-silhouettes", dropout=0.5, steps=20_000, validate_every=500)
_ABOUT = "gated PixelCNN with two stacks on Caltech silhouettes"
SILHOUETTES = full_row("pixelcnn-gated-silhouettes", 2, _ABOUT, _SETTINGS, files=(SILHOUETTES_FILE,))(train_and_score)
PAPER = Paper("pixelcnn", __file__, experiments=(MASKED, GATED, SILHOUETTES))
