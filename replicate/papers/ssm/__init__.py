"""Sliced score matching: Song, Garg, Shi, Ermon 2019, 1905.07088.

Replicated: that the sliced objectives average to the exact one (eq. 7 and 8) and the cost of a step against the
dimension (Fig. 2), and the asymptotic covariances of theorem 3 and corollary 1, in `objectives`; the two density models
of the paper, in `nice` (Table 1) and `kernel` with `tables` (Fig. 1), where the estimate of log Z is tested too.

Deviations: the cost is measured on an energy MLP, not on the deep kernel exponential family, since the figure shows how
many passes through its model an objective needs; on the CPU, time is processor time. The paper prints no simulation of
its asymptotic covariances: the simulated case, a Gaussian of unknown precision, is ours. The headers of `nice` and
`tables` list those of the density models. Curvature propagation and approximate backpropagation are not implemented.
"""

from replicate.experiments import Paper
from replicate.papers.ssm.nice import learning_rates, table_1
from replicate.papers.ssm.objectives import counted_costs, covariance_simulation, timed_costs, unbiasedness
from replicate.papers.ssm.tables import FIGURE_1, partition_functions

OBJECTIVES = (unbiasedness, counted_costs, timed_costs, covariance_simulation)
MODELS = (table_1, learning_rates, *FIGURE_1, partition_functions)
PAPER = Paper("ssm", __file__, experiments=(*OBJECTIVES, *MODELS))
