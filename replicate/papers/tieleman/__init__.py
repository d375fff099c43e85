"""Tieleman (2008), Training restricted Boltzmann machines using approximations to the likelihood gradient, ICML.

Persistent contrastive divergence (PCD) continues the negatives of the last update instead of starting them at the data.
Replicated here: with few hidden units, where the likelihood is exact, and at equal time, PCD gives a better test
likelihood than CD-1 and CD-10.

Equal time is counted, not clocked, so that the result does not depend on the machine's load: an update of CD-k costs
2k + 4 products of a batch with the weights (two per sweep, the hidden means of both phases, two outer products), PCD
with one sweep as much as CD-1. The seconds of training are listed too. As in the paper: plain stochastic gradient
ascent without momentum or weight decay, minibatches of 100, as many chains, and a learning rate that falls linearly to
zero and whose first value is chosen on the validation split, for each method by itself, from one grid.

Deviations: the suite's thresholded 8x8 digits (1000 training rows) and 16 hidden units instead of MNIST and 25, in the
standard profile; the full profile has MNIST's fixed binarisation and 25 hidden units.
"""

from replicate.experiments import Paper
from replicate.papers.tieleman.persistence import on_digits, on_mnist

PAPER = Paper("tieleman", __file__, experiments=(on_digits, on_mnist))
