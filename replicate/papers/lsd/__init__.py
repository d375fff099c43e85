"""Linear ICA by objectives that need no log Z, scored by the exact likelihood.

Grathwohl, Wang, Jacobsen, Duvenaud and Zemel 2020, "Learning the Stein Discrepancy for Training and Evaluating
Energy-Based Models without Sampling" (2002.05616), the ICA benchmark: x = A s with independent logistic sources
s_i of scale 1, and the model

    log p(x) = f(x) - log Z,   f(x) = sum_i g(w_i x),   log Z = -log|det W|,   g the logistic log density,

of which an objective uses f alone, while the likelihood, which scores it, uses both. The mixing is the released code's:
W standard normal, drawn again until its condition number is below D. The logistic density is smooth, so score matching
is exact here; with Laplace's |.| it would not apply.

Deviations from the released code, which draws new data at each of 100,000 Adam steps:
- every objective has the same `examples` data and one auxiliary draw per example (a noise, a projection, a chain).
  L-BFGS in float64 minimises the objectives whose draws can be kept fixed, to convergence. So the results show the
  statistics of the objective and not its learning rate. Contrastive divergence has no objective to minimise and follows
  its gradient by Adam, with a learning rate and a number of steps chosen once on a seed that no claim uses;
- all start at the whitening of the data after a random rotation, and move M in W = M * whitening;
- score matching has the exact trace (the code's "sm" is its sliced form with Gaussian projections, `ssm-vr` here with
  signs); denoising score matching and contrastive divergence are not in the code;
- the learned Stein discrepancy itself and the kernel one are not replicated.
"""

from replicate.experiments import Paper
from replicate.papers.lsd.components import EXPERIMENTS

PAPER = Paper("lsd", __file__, EXPERIMENTS)
