"""Kingma, Dhariwal 2018: Glow: Generative flow with invertible 1x1 convolutions, 1807.03039; its row on MNIST.

Replicated: bits per dimension of affine couplings between learned 1x1 convolutions, and the gain over fixed masks with
equal couplings and training (`replicate.papers.realnvp` has that side, and all that the rows share). Ours: the same
steps with rational-quadratic spline couplings (Durkan et al. 2019, 1906.04032), and Glow on Fashion-MNIST.

Deviations, besides those of `baselines.image_flow`: 8 steps in each of 2 scales and residual conditioners of 128
channels where the paper has 32 steps in 3 scales and 512 channels on CIFAR-10; its setup on MNIST is not printed.
Logits of the pixels, as in `replicate.papers.realnvp`, where the released code has none. The spline row maps each pixel
by its own training distribution (`DequantisedGaussian`) and tells the conditioners where they are, as no paper does.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from baselines.image_flow import GLOW, IMAGE_SPLINE_FLOW
from replicate.experiments.image_flows import AFFINE, image_row
from replicate.runs.experiment import Experiment
from replicate.runs.paper import Paper
from replicate.tasks.images import FILES

#: 12 couplings in place of 16, batches of 256: 41 ms of arithmetic a step, and the launches of some 6,000 small kernels
#: of the splines (7 microseconds each) take as long; with the sorting behind deterministic gathers about 50 ms.
SPLINE: dict[str, Any] = {
    **AFFINE,
    "transform": "gaussianise",
    "depth": 6,
    "positions": True,
    "bins": 8,
    "steps": 10_000,
    "batch_size": 256,
}
MNIST = Experiment(
    "glow-mnist",
    "multi-scale affine couplings and 1x1 convolutions on dequantised MNIST",
    "flow",
    partial(image_row, GLOW),
    AFFINE,
    seeds=3,
    profiles=("full",),
    files=FILES["mnist"],
    cuda_minutes=9,
)
SPLINES = Experiment(
    "glow-spline-mnist",
    "multi-scale spline couplings and 1x1 convolutions on dequantised MNIST",
    "flow",
    partial(image_row, IMAGE_SPLINE_FLOW),
    SPLINE,
    seeds=3,
    profiles=("full",),
    files=FILES["mnist"],
    cuda_minutes=9,
)
FASHION = Experiment(
    "glow-fashion-mnist",
    "multi-scale affine couplings and 1x1 convolutions on dequantised Fashion-MNIST",
    "flow",
    partial(image_row, GLOW),
    {**AFFINE, "data": "fashion-mnist"},
    seeds=3,
    profiles=("full",),
    files=FILES["fashion-mnist"],
    cuda_minutes=9,
)

PAPER = Paper("glow", Path(__file__).with_suffix(".toml"), experiments=(MNIST, SPLINES, FASHION))
