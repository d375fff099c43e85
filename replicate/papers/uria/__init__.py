"""Uria, Murray and Larochelle 2014: A Deep and Tractable Density Estimator, 1310.1757.

Replicated: test NLL on static bits of MNIST of order-agnostic NADE with one and two hidden layers of 500 units, by the
number of orderings whose densities are averaged.

Each depth is one trained model with 128 recorded random orderings. "nll:k" is the NLL of an ensemble of k of them,
averaged over the 128 / k ensembles into which the 128 are cut. Each ensemble is one normalised distribution, so that
every number is exact. As pairs of ensembles make the next larger ones, nll:2k <= nll:k holds by the concavity of the
logarithm, whatever the model has learned; the experiment measures by how much.

Deviations: Adam and a cosine schedule from He's start, without pretraining; the released code
(github.com/MarcCote/NADE) has momentum 0.9, a linear schedule from 1e-3, a start of N(0, 0.01^2) and layer-wise
pretraining. Batches of 100 and 500 rectified units are those of the code's example on these bits; that this is the
paper's own setting, and how many steps the paper took, could not be checked against a text: the steps are ours. The
split points of a batch are spread evenly, no probability is clamped (the code keeps them between 5e-5 and 1 - 5e-5),
and the best of the validated steps is kept, by an ensemble of eight orderings.

The code's own sampler of bits adds each new bit to the activations before it has drawn it, when it is still zero: no
later bit depends on it. Samples here are tested against enumeration.
"""

from replicate.experiments import Paper
from replicate.papers.uria.ensembles import DEPTHS

PAPER = Paper("uria", __file__, experiments=DEPTHS)
