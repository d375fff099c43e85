"""Kingma, Dhariwal 2018: Glow: Generative flow with invertible 1x1 convolutions, 1807.03039; its row on MNIST.

Replicated: bits per dimension of affine couplings between learned 1x1 convolutions, and the gain over fixed masks with
equal couplings and training (`replicate.papers.realnvp` measures those). Ours: the same steps with rational-quadratic
spline couplings (Durkan et al. 2019, 1906.04032), and Glow on Fashion-MNIST.

Deviations, besides those of `baselines.image_flow`: 8 steps in each of 2 scales and residual conditioners of 128
channels where the paper has 32 steps in 3 scales and 512 channels on CIFAR-10; its setup on MNIST is not printed.
Logits of the pixels, as in `replicate.papers.realnvp`, where the released code has none. The spline row maps each pixel
by its own training distribution (`DequantisedGaussian`) and gives the conditioners their positions, as no paper does.
"""

from pathlib import Path

from replicate.experiments import Paper
from replicate.papers.glow.rows import FASHION, MNIST, splines

PAPER = Paper("glow", Path(__file__).with_name("claims.toml"), experiments=(MNIST, splines, FASHION))
