"""Short-run chains of a convolutional energy look right, and the energy they leave behind is no density.

Nijkamp, Hill, Zhu and Wu 2019, arXiv:1904.09770: at every update K Langevin steps from uniform noise, whose ends are
taken for samples of the model. Du and Mordatch 2019, arXiv:1903.08689: the same with a buffer of chains that continue
from update to update, a share of them starting again. Both are `baselines.conv_ebm.ConvEBM` with different
probabilities of a restart, and are called `fresh` and `replay` here. Each is sampled as it was trained (short run: as
many steps as its chains are old on average) and then for many times as long (long run).

The third model has a likelihood: `tilted`, a convolutional energy that tilts a Gaussian (`TiltedConvEBM`) behind the
suite's dequantisation, with log Z annealed both ways. Its bits per dimension are given only where the two ends of that
bracket are at most 10 nats apart; the width itself is always given. Short-run energies have no such number: along a
long run they fall without end, so that exp(-U) has no finite integral to estimate.

Quality is measured in the features of a classifier that the suite trains on the task's training part. The classifier
does not recognise images that are no digits (that of the 8x8 digits is confident of 57 in 100 images of uniform noise),
so the share of confident answers is given beside the distance and not in its place.

Deviations: MNIST and 8x8 digits in place of CIFAR-10, CelebA and LSUN; a few thousand updates in place of 100,000 to
200,000; the network of the released minimal code with SiLU, its last layer at zero; weights are an exponential moving
average; a weak penalty on squared energies in both methods. Images are dequantised and scaled to [-1, 1], where the
step's noise of 0.01 is the released one. On the digits K and the number of updates are what a minute of one CPU
affords, chosen on seeds that are not judged.
"""

from replicate.experiments import Paper
from replicate.papers.nijkamp.chains import on_digits, on_mnist

PAPER = Paper("nijkamp", __file__, experiments=(on_digits, on_mnist))
