"""Implicit generation (Du and Mordatch 2019, arXiv:1903.08689): the temperature at which its sampler draws.

Equation 1 draws from p(x) proportional to exp(-E(x)) by

    x <- x - (lambda / 2) grad E(x) + omega,    omega ~ N(0, lambda I),

with one lambda before the gradient and in the noise. The released code has two constants: a step before the gradient
(10 in its commands for CIFAR-10 and ImageNet 32, 100 for ImageNet 128, 500 for dSprites) and noise of standard
deviation 0.005. Any step `a` before the gradient with noise of standard deviation `s` samples exp(-E / T) with

    T = s^2 / (2 a),

in the suite's convention a step size of s^2 at temperature T: 1.25e-6 for a step of 10, 2.5e-8 for 500.

Both samplers run here on energies that are known: a Gaussian, where the variance that either ends at has a closed form,
and the ring of eight Gaussians. Both take the released step of 10 before the gradient, so that only the noise differs,
and both start at exact samples, so that the sampler alone causes every loss.

Deviations: no network and no images. The energies are stretched (standard deviation sqrt(500) in each Gaussian) until
a step of 10 is stable; the temperature does not depend on that. The released code also clips the gradient's components
at 0.01 and the state to the unit box; neither is done here (at the released temperature the gradient's standard
deviation on the Gaussian is 5e-5, so that its clip would do nothing once the chain has settled). The sampler alone is
measured: a network trained with it may adapt its scale, and exp(-E / T) is then its density.
"""

from pathlib import Path

from replicate.experiments import Paper
from replicate.papers.igebm.temperature import compare

PAPER = Paper("igebm", Path(__file__).with_name("claims.toml"), experiments=(compare,))
