"""van den Oord et al. 2016: PixelCNN (1601.06759) and Gated PixelCNN (1606.05328) on static bits of MNIST.

Replicated: test NLL of a plain stack of masked convolutions and of the gated model with a vertical and a horizontal
stack, which is this suite's registered gated-pixelcnn; and of the gated model on Caltech silhouettes, beside the number
that Chen et al. 2017 (1611.02731) print for a PixelCNN there.

Deviations: Adam where 1601.06759 has RMSProp. Numbers of layers and channels on MNIST are not printed: the masked stack
has the paper's CIFAR form (a 7x7 convolution of type A, then residual blocks h + W relu(3x3 type B relu(W relu(h))))
at a smaller width. Weights are those of the best validation step, averaged, with dropout in the gated model.
"""

from pathlib import Path

from replicate.experiments import Paper
from replicate.papers.pixelcnn.rows import GATED, MASKED, SILHOUETTES

PAPER = Paper("pixelcnn", Path(__file__).with_name("claims.toml"), experiments=(MASKED, GATED, SILHOUETTES))
