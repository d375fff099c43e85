"""Roberts and Tweedie 1996, "Exponential convergence of Langevin distributions and their discrete approximations".

Replicated is how the step size changes Langevin dynamics, x <- x + (eps / 2) s(x) + sqrt(eps) z as in all the suite:

    roberts-kernel: the laws that ULA and MALA really converge to, without a chain. The transition kernel is computed on
        a grid and solved for its stationary vector; on N(0, s^2) the answer is N(0, s^2 / (1 - eps / (4 s^2))),
        elsewhere there is no closed form. Densities: a Gaussian, two Gaussians 4 standard deviations apart, and
        1 / (pi cosh x), whose tails are exponential and whose score is bounded.
    roberts-chains: the samplers themselves against those laws, and where there is none: ULA on a Gaussian at
        eps = 4 s^2 and above, and ULA where the tails are lighter than a Gaussian's, p ~ exp(-x^4 / 4), on which it is
        transient (Theorem 3.2) and MALA is not, though it is stuck far out (Theorem 4.2).

Experiment ncsn-step of `replicate.papers.ncsn` measures what the step does to annealed Langevin's last level.

Deviation: Roberts and Tweedie prove rates of convergence and give no bias; the order of the bias is that of Talay and
Tubaro 1990 (Stoch. Anal. Appl. 8), the first one in eps.
"""

from replicate.experiments import Paper
from replicate.papers.roberts.langevin import check_chains, kernel_bias

PAPER = Paper("roberts", __file__, experiments=(kernel_bias, check_chains))
