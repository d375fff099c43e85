"""One energy, every way to train it.

Song and Kingma 2021, "How to train your energy-based models" (2101.03288), is a survey: it says what each way costs and
where it fails, and prints no numbers. Here the same network, data, batches, optimizer and number of updates serve every
method of `replicate.energies.objectives`, on densities whose truth is known:

- `comparison`: in the plane a crescent, connected, so that every consistent method can find it, and two Gaussians, 14
  standard deviations apart, whose weights 1/5 and 4/5 are in log Z, which some methods miss; and linear ICA, where the
  exact likelihood is known in any dimension;
- `bias`: the fixed point of contrastive divergence for a Gaussian model of data that are not Gaussian, computed exactly
  from the transition matrix of a Metropolis chain on a grid: its bias without any learning rate or sampling error;
- `bits`, `digits`: a restricted Boltzmann machine with exact log Z and a neural energy with a bracketed one, on images.

Deviations: the survey has no experiments to replicate; all settings are ours, chosen on seeds that are not judged.
Equal updates are not equal cost: every method reports its energy evaluations and seconds. Chains' step sizes and
lengths are each method's own. In the plane and in ICA the judged weights are a moving average over updates; on images
they are those of the best validation likelihood, for every method, although the methods that do without Z could not
have used it by themselves.
"""

from replicate.experiments import Paper
from replicate.papers.song_kingma.bias import cd_bias
from replicate.papers.song_kingma.bits import trained_on_bits
from replicate.papers.song_kingma.comparison import MODES, PLANE, independent_components
from replicate.papers.song_kingma.digits import trained_on_digits

EXPERIMENTS = (PLANE, MODES, independent_components, cd_bias, trained_on_bits, trained_on_digits)
PAPER = Paper("song_kingma", __file__, EXPERIMENTS)
