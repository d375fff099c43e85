"""Geyer 1991, "Markov Chain Monte Carlo Maximum Likelihood": chains that do not cross between modes, and what helps.

Two densities whose score is exact, so that only the sampler is at fault: two Gaussians of weights 1/5 and 4/5, 14
standard deviations apart (Song and Ermon 2019), and eight equal Gaussians on a circle, neighbours 6 standard deviations
apart. All chains start in one mode, the first one, from its own law. Samplers:

    ula, mala: Langevin dynamics, unadjusted and adjusted (Roberts and Tweedie 1996).
    tempering: parallel tempering, MALA at temperatures in geometric progression (Swendsen and Wang 1986; Geyer 1991).
    annealed: Langevin dynamics through noise levels (Song and Ermon 2019), another chain for every number of steps.

The currency is the score evaluation, those of all temperatures and noise levels counted. Measured are the error of the
modes' weights over the chains when a given number is spent, and for the three that have a stationary law the integrated
autocorrelation time of the modes' indicators after the first quarter of the path, with the modes' true weights as
means, so that a chain that stays in its mode cannot look good (`replicate.metrics.autocorrelation`).

Deviations: Geyer's example is a spatial process and has no gradient; his chains are Metropolis-coupled without it. The
annealed chain has no stationary law and so no autocorrelation time.
"""

from replicate.experiments import Paper
from replicate.papers.geyer.mixing import EIGHT, TWO

PAPER = Paper("geyer", __file__, experiments=(TWO, EIGHT))
