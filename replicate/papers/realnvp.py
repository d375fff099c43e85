"""Dinh, Sohl-Dickstein, Bengio 2017: Density estimation using Real NVP, 1605.08803; its row on MNIST in bits/dim.

Also what every flow of dequantised images shares (`glow` and `maf` use it): uniform noise on the whole bin, logits, the
flow, and the test images under several noise draws.

For noise u the density q of x + u gives E_u[log q(x + u)] <= log P(x) (Theis et al. 2016, 1511.01844). The papers print
the left side, most of them by one draw; that is `nll` and `bits_per_dim` here, averaged over the draws. The mean of the
densities bounds log P(x) more tightly, and is beside it as `:iw_bound`; no printed number compares with that one.

Deviations: `baselines.image_flow` says what differs in the flow. Logits are those of 1e-6 + (1 - 2e-6) x, as public
code takes them on MNIST; the paper's 0.05 is for natural images, and there the noise of a black pixel is an eightieth
of the range that strokes need, with 1e-6 a fifth. One mean and one deviation of all pixels standardise them. About
fifty passes over the training images; averaged weights of the best validation step.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from baselines.image_flow import IMAGE_REALNVP
from replicate.experiments.image_flows import AFFINE, image_row
from replicate.runs.experiment import Experiment
from replicate.runs.paper import Paper
from replicate.tasks.images import FILES

# -- preprocessing


# -- training


# -- evaluation


# -- the row

MNIST = Experiment(
    "realnvp-mnist",
    "multi-scale affine couplings under fixed masks on dequantised MNIST",
    "flow",
    partial(image_row, IMAGE_REALNVP),
    AFFINE,
    seeds=3,
    profiles=("full",),
    files=FILES["mnist"],
    cuda_minutes=9,
)

PAPER = Paper("realnvp", Path(__file__).with_suffix(".toml"), experiments=(MNIST,))
