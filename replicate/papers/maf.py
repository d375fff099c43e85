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

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from baselines.maf import MAF as ENTRY
from replicate.experiments.image_flows import image_row
from replicate.runs.experiment import Experiment
from replicate.runs.paper import Paper
from replicate.tasks.images import FILES

#: 3.5 million multiply-adds an image and network: 10 GFLOP a batch for five, far below what their kernels cost to
#: launch: about 450 a step, 5 ms with the masking of 17 million weights.
_MNIST: dict[str, Any] = {
    "data": "mnist",
    "rows": 0,
    "transform": "logit",
    "alpha": 1e-6,
    "noise_once": True,
    "draws": 16,
    "hidden": 1024,
    "layers": 2,
    "dropout": 0.0,
    "bound": 5.0,
    "batch_size": 100,
    "schedule": "constant",
    "validate_every": 500,
}
MADE = Experiment(
    "maf-made-mnist",
    "MADE with Gaussian conditionals on dequantised MNIST in logit space",
    "flow",
    partial(image_row, ENTRY),
    {**_MNIST, "blocks": 1, "lr": 1e-3, "steps": 30_000},
    seeds=3,
    profiles=("full",),
    files=FILES["mnist"],
    cuda_minutes=2,
)
MAF = Experiment(
    "maf-mnist",
    "MAF of five networks on dequantised MNIST in logit space",
    "flow",
    partial(image_row, ENTRY),
    {**_MNIST, "blocks": 5, "lr": 1e-4, "steps": 75_000},
    seeds=3,
    profiles=("full",),
    files=FILES["mnist"],
    cuda_minutes=8,
)
#: 3.5 to 4 times the weights of MNIST's networks, and twice the images
_CIFAR: dict[str, Any] = {**_MNIST, "data": "cifar-10", "alpha": 0.05, "mirror": True}
CIFAR_MADE = Experiment(
    "maf-made-cifar-10",
    "MADE with Gaussian conditionals on dequantised CIFAR-10 in logit space",
    "flow",
    partial(image_row, ENTRY),
    {**_CIFAR, "blocks": 1, "lr": 1e-3, "steps": 45_000},
    seeds=3,
    profiles=("full",),
    files=FILES["cifar-10"],
    cuda_minutes=4,
)
CIFAR_MAF = Experiment(
    "maf-cifar-10",
    "MAF of five networks on dequantised CIFAR-10 in logit space",
    "flow",
    partial(image_row, ENTRY),
    {**_CIFAR, "blocks": 5, "lr": 1e-4, "steps": 45_000},
    seeds=3,
    profiles=("full",),
    files=FILES["cifar-10"],
    cuda_minutes=9,
)

PAPER = Paper("maf", Path(__file__).with_suffix(".toml"), experiments=(MADE, MAF, CIFAR_MADE, CIFAR_MAF))
