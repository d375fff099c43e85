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

from pathlib import Path

from replicate.experiments import Paper
from replicate.papers.maf.rows import ROWS

PAPER = Paper("maf", Path(__file__).with_name("claims.toml"), experiments=ROWS)
