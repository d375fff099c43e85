"""Vincent 2011, "A Connection Between Score Matching and Denoising Autoencoders", Neural Computation 23(7).

For data x_1..x_m, noise N(0, sigma^2 I) and the Parzen density q_sigma that the two make, the paper proves

    J_DSM(theta) = J_ESM(theta; q_sigma) + C:

denoising score matching is explicit score matching of the smoothed density up to a constant, so both have the same
gradient. Replicated on a few points in the plane, where q_sigma and its score are known. Each expectation takes the
quadrature that suits it: Gauss-Hermite over the noise for J_DSM, a grid over q_sigma for J_ESM. The two sides share
only the network. By the paper's derivation C = D / (2 sigma^2) - E|grad log q_sigma|^2 / 2.

Deviations: the paper's networks are one-layer denoising autoencoders; the theorem holds for any score, and ours are
free score networks and the gradient of an energy. The suite's objective is sigma^2 times the paper's, so it is divided
by sigma^2 here.
"""

from replicate.experiments import Paper
from replicate.papers.vincent.equivalence import check_equivalence

PAPER = Paper("vincent", __file__, experiments=(check_equivalence,))
