"""Song and Ermon 2020, "Improved Techniques for Training Score-Based Generative Models", 2006.09011 (NCSNv2).

Replicated:

- technique 1 (figure 2): annealed Langevin dynamics with the exact score of the mixture centred on the CIFAR-10 test
  images, with the first noise level at 1 and at 50;
- technique 2: the number of noise levels that its equation gives at the printed C, and the C that the printed number
  implies;
- technique 4: the step size that its equation gives at the printed noise levels;
- the pattern of table 1: how much the last denoising step gains, on our own model of the digits.

Deviations. Technique 1: no text that we have read gives the noise levels of figure 2; we take the paper's CIFAR-10
sampler (last level 0.01, ratio of the 232 levels from 50, T = 5, step size 6.2e-6) for both, so that the levels from 1
are the end of those from 50, and as a variant NCSN's ten levels from 1 (T = 100, step size 2e-5). Table 1: 8x8 digits
of 17 levels and the features of a small digit classifier replace CIFAR-10 and Inception; both kinds of samples are
the same chains before and after the step.

Convention: the paper's step x + alpha s + sqrt(2 alpha) z is the suite's with step size 2 alpha; step sizes here are
the paper's and are doubled where the suite's sampler is called.
"""

from replicate.experiments import Paper
from replicate.papers.ncsnv2.techniques import first_level, last_step, solve_levels, solve_step_size

EXPERIMENTS = (solve_levels, solve_step_size, first_level, last_step)
PAPER = Paper("ncsnv2", __file__, EXPERIMENTS)
