"""Carreira-Perpinan & Hinton (2005), On contrastive divergence learning, AISTATS; Hinton (2002), Neural Computation 14.

Contrastive divergence (CD-k) replaces the model's statistics in the gradient of the log-likelihood by those of the data
after k Gibbs sweeps, p0 T^k. Replicated here, all by enumeration of a small restricted Boltzmann machine: the expected
CD-k direction is biased, the bias falls with k, and the machine where CD-1 comes to rest is not the maximum likelihood
one but nearly as good.

With 9 visible and 6 hidden units the distribution of the chain after k sweeps is a vector of 512 numbers.

Deviations: the data are 3 x 3 patches of the suite's thresholded digits at random places, mixed with 1 % of the uniform
distribution so that the maximum likelihood machine is finite; the papers have other small data. "Half-trained" means
that half of the log-likelihood to be gained has been gained.
"""

from replicate.experiments import Paper
from replicate.papers.carreira.divergence import fixed_points, gradient_bias

PAPER = Paper("carreira", __file__, experiments=(gradient_bias, fixed_points))
