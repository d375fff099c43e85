"""van den Oord et al. 2016: PixelCNN (1601.06759) and Gated PixelCNN (1606.05328) on static bits of MNIST.

Replicated: test NLL of a plain stack of masked convolutions and of the gated model with a vertical and a horizontal
stack, which is this suite's registered gated-pixelcnn; and of the gated model on Caltech silhouettes, beside the number
that Chen et al. 2017 (1611.02731) print for a PixelCNN there.

Deviations: Adam where 1601.06759 has RMSProp. Numbers of layers and channels on MNIST are not printed: the masked stack
has the paper's CIFAR form (a 7x7 convolution of type A, then residual blocks h + W relu(3x3 type B relu(W relu(h))))
at a smaller width. Weights are those of the best validation step, averaged, with dropout in the gated model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from replicate.experiments.image_rows import STATIC_BITS, exact_nll, splits, training, validation_plot
from replicate.model import DataInfo, Model
from replicate.registry import model_entry
from replicate.runs.experiment import Context, Experiment, Outcome
from replicate.runs.paper import Paper
from replicate.runs.training import train
from replicate.tasks.base import Task
from replicate.tasks.binary import SILHOUETTES_FILE, caltech_silhouettes
from replicate.tasks.images import FILES, mnist_static

#: rows scored at a time
CHUNK = 500


class MaskedConv(nn.Conv2d):
    """A k x k convolution that sees the pixels before this one in raster order (1601.06759, figure 2, right).

    Args:
        inputs, outputs: channels.
        kernel: k, odd.
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
    """The plain masked stack on images of bits.

    Args:
        image: (height, width).
        width: channels.
        layers: residual blocks.
    """

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


def build(context: Context, info: DataInfo) -> Model:
    """The untrained model that the settings name."""
    p = context.params
    assert info.image is not None
    with context.streams.initialisation():
        if p["gated"]:
            return model_entry("gated-pixelcnn").build(info, width=p["width"], layers=p["layers"], dropout=p["dropout"])
        return PixelCNN(info.image, p["width"], p["layers"])


#: what the settings may name as "data"
TASKS: dict[str, Callable[[], Task]] = {STATIC_BITS: mnist_static, "caltech-silhouettes": caltech_silhouettes}


def train_and_score(context: Context) -> Outcome:
    """Train on bits, keep the best validation step, and score the test bits exactly."""
    task = TASKS[context.params["data"]]()
    fit, valid, test = splits(context, task)
    model = build(context, task.info).to(context.device)
    history = train(model, fit, valid, training(context.params), context.streams)
    with torch.no_grad():
        log_p = torch.cat([model.log_prob(part) for part in test.split(CHUNK)])
    return exact_nll(log_p, validation_plot(history.valid), task.name)


_TRAINING: dict[str, Any] = {
    "data": STATIC_BITS,
    "steps": 100_000,
    "batch_size": 64,
    "lr": 1e-3,
    "grad_clip": 10.0,
    "ema": 0.999,
    "validate_every": 2000,
    "rows": 0,
}
MASKED = Experiment(
    "pixelcnn-masked",
    "plain stack of masked convolutions on static bits",
    "autoregressive",
    train_and_score,
    {**_TRAINING, "gated": False, "width": 64, "layers": 12, "dropout": 0.0},
    seeds=3,
    profiles=("full",),
    files=FILES["mnist-static"],
    cuda_minutes=10,
)
GATED = Experiment(
    "pixelcnn-gated",
    "gated PixelCNN with two stacks on static bits",
    "autoregressive",
    train_and_score,
    {**_TRAINING, "gated": True, "width": 64, "layers": 12, "dropout": 0.3},
    seeds=3,
    profiles=("full",),
    files=FILES["mnist-static"],
    cuda_minutes=10,
)
#: 4,100 silhouettes are soon learned by heart
SILHOUETTES = replace(
    GATED,
    name="pixelcnn-gated-silhouettes",
    about="gated PixelCNN with two stacks on Caltech silhouettes",
    params={**GATED.params, "data": "caltech-silhouettes", "dropout": 0.5, "steps": 20_000, "validate_every": 500},
    files=(SILHOUETTES_FILE,),
    cuda_minutes=2,
)

PAPER = Paper("pixelcnn", Path(__file__).with_suffix(".toml"), experiments=(MASKED, GATED, SILHOUETTES))
