"""Salimans and Ho 2021, "Should EBMs model the energy or the score?" (ICLR workshop on energy-based models).

A score network may be any vector field or the gradient of a scalar. The two are compared on densities whose noised
score is known: the same multilayer perceptron but for its last layer, the same data, batches, noise and updates, by
denoising score matching at one noise level. Measured:

    quality: the Fisher divergence to the exact score of the noised density.
    conservation: |J - J'|_F^2 / |J|_F^2 of the field's Jacobian at noised data: 0 for a gradient, 4 for a rotation.
    consistency: the circulation of the field round triangles of noised data points, in nats. The log-ratio of two
        points is a line integral of the score; where the circulation is not 0 it depends on the path, and the field
        has no density.
    cost: processor time of training, and the operations of one update by count.

salimans-constant looks at the energy's other side: multiplying exp(-f) by a constant moves neither score nor Langevin
chain nor any score matching loss, by not a single bit, and moves the unnormalised log density by that constant: the
score does not see Z.

Deviations: two small densities in place of image sets, one noise level in place of a schedule, and an energy that is a
scalar head with a quadratic bowl (`replicate.score_based.networks.EnergyScore`) where the paper builds the energy from
the score network's output as a squared distance. The free network is given the bowl's linear term, so that the
constraint alone makes the difference.
"""

from replicate.experiments import Paper
from replicate.papers.salimans.fields import MIXTURE, MOONS, constant

PAPER = Paper("salimans", __file__, experiments=(MOONS, MIXTURE, constant))
