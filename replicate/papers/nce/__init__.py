"""Noise-contrastive estimation: consistency, the learned log Z, and what more noise is worth.

Gutmann and Hyvarinen 2010, "Noise-contrastive estimation: a new estimation principle for unnormalized statistical
models" (AISTATS 9, 297-304), and 2012, "Noise-contrastive estimation of unnormalized statistical models, with
applications to natural image statistics" (JMLR 13, 307-361). Two models whose log Z is known and withheld:

- the zero-mean Gaussian, f(x) = -x' P x / 2 with precision P, in 5 dimensions;
- linear ICA with Laplacian sources of unit variance, f(x) = -sqrt(2) sum_i |w_i x|, in 4 dimensions.

Both learn c = -log Z beside their parameters, from n data and nu n noises.

Deviations: the papers' texts could not be read while this was written; dimensions and condition numbers are as widely
quoted. The noise is N(0, I) for the Gaussian, N(0, C) with the data's covariance C for ICA. The Gaussian's objective
is convex and solved by Newton's method to machine accuracy for all repetitions at once; ICA's starts near the truth,
so that its error is that of estimation and not of a search.
"""

from replicate.experiments import Paper
from replicate.papers.nce.gaussian import consistency, noise_ratio, vanishing_gradient
from replicate.papers.nce.laplace import laplace_consistency

EXPERIMENTS = (consistency, noise_ratio, vanishing_gradient, laplace_consistency)
PAPER = Paper("nce", __file__, EXPERIMENTS)
