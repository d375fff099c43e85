"""Song and Ermon 2019, "Generative Modeling by Estimating Gradients of the Data Distribution" (arXiv:1907.05600).

Replicated, by module, with the section of each experiment and the claims that it measures:

- networks: ncsn-manifold, the score matching loss on data that lie on a plane (3.1, Fig 1; N5); ncsn-score-error, where
  sliced score matching estimates the score well (3.2.1, Fig 2, App B.1; N1); ncsn-noise-levels, score norms and
  weighted losses from level to level (4.2; N6);
- langevin: ncsn-langevin and ncsn-passage, the weights that plain Langevin dynamics ends with (3.2.2, Fig 3b; N2), and
  how long a chain takes to change modes; ncsn-annealed, annealed Langevin on the same mixture (4.3, Fig 3c; N3, N4);
  on Gaussians ncsn-inpainting (Algorithm 2; N7) and ncsn-step (Algorithm 1).

Deviations: a plane of Gaussian coordinates in 10 dimensions replaces CIFAR-10 in 3.1, with the toy's network; 8x8
digits replace the images of 4.2; inpainting is that of a Gaussian vector with an image's scale. The main text leaves T
and eps of the annealed chain open; `langevin.READINGS` lists the values that are run.
"""

from replicate.experiments import Paper
from replicate.papers.ncsn.langevin import annealed, compare_rules, passage, plain_langevin, step_readings
from replicate.papers.ncsn.networks import manifold, noise_levels, score_error

EXPERIMENTS = (score_error, plain_langevin, passage, annealed, manifold, noise_levels, compare_rules, step_readings)
PAPER = Paper("ncsn", __file__, EXPERIMENTS)
