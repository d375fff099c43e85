"""Convergent and non-convergent learning of an energy on the ring of eight Gaussians.

Nijkamp, Hill, Han, Zhu, Wu 2019, arXiv:1903.12370, algorithm 1 and section 3. Both learnings descend the same
gradient, that of d = E_data[U] - E_short-run[U], and differ in their Markov chains and optimizer only:

    convergent: SGD, persistent chains, large Langevin noise (epsilon = 0.125).
    non-convergent: Adam, chains that start from a Gaussian each time, small noise (epsilon = 0.01), 100 steps.

Diagnostics of section 3: d_t, the difference of mean energies, and r_t, the mean length of the gradient term along the
chains, here over that of the noise so that it has no unit.

As printed, x <- x - (epsilon^2 / 2) grad U(x) + epsilon z; as released, x <- x - grad f(x) + epsilon z, so that
U = 2 f / epsilon^2, a factor of 128 for epsilon = 0.125. Both exp(-U) and exp(-f) are measured. In the suite's
convention the step size is epsilon^2, the score is -grad U and T = 1.

Deviations: the ring, the network, epsilon and the starting distributions are those of the released configurations
(radius 1, standard deviation 0.15; 2-32-64-64-64-1 with leaky ReLU), the lengths are not. Convergent: 4,500 updates
(200,000 there) of 20 steps (500), 100 persistent chains that all move (100 out of 10,000), a learning rate of 1 that
falls to 0 along a cosine (constant 0.1). Non-convergent: 600 updates (100,000), a learning rate of 2e-3 that falls
likewise (constant 1e-4). Data are 50,000 fixed draws, not fresh ones.
"""

from replicate.experiments import Paper
from replicate.papers.anatomy.learning import compare

PAPER = Paper("anatomy", __file__, experiments=(compare,))
