"""Convergent and non-convergent learning of an energy on the ring of eight Gaussians.

Nijkamp, Hill, Han, Zhu, Wu 2019, arXiv:1903.12370, algorithm 1 and section 3. Both learnings descend the same
gradient, that of d = E_data[U] - E_short-run[U], and differ in their Markov chains and optimizer only:

    convergent: SGD, persistent chains, large Langevin noise (epsilon = 0.125).
    non-convergent: Adam, chains that start from a Gaussian each time, small noise (epsilon = 0.01), 100 steps.

Diagnostics of the paper's section 3: d_t, the difference of mean energies, and r_t, the mean length of the gradient
term along the chains, here over the mean length of the noise so that it has no unit.

As printed, x <- x - (epsilon^2 / 2) grad U(x) + epsilon z; as released, x <- x - grad f(x) + epsilon z, with the
coefficient inside the network: U = 2 f / epsilon^2, a factor of 128 for epsilon = 0.125. Both readings are measured:
the model exp(-U), and what exp(-f) would be. In the suite's convention the step size is epsilon^2, the score is
-grad U and T = 1.

Deviations: the ring, the network, epsilon and the starting distributions are those of the released configurations
(radius 1, standard deviation 0.15; 2-32-64-64-64-1 with leaky ReLU), the lengths are not. Convergent: 4,500 in place
of 200,000 updates of 20 in place of 500 steps, 100 persistent chains that all move in place of 100 out of 10,000, and
a learning rate of 1 that falls to 0 along a cosine in place of a constant 0.1. Non-convergent: 600 in place of 100,000
updates, with a learning rate of 2e-3 that falls along a cosine in place of a constant 1e-4. Data are 50,000 fixed
draws, not fresh ones.
"""

from pathlib import Path

from replicate.experiments import Paper
from replicate.papers.anatomy.learning import compare

PAPER = Paper("anatomy", Path(__file__).with_name("claims.toml"), experiments=(compare,))
