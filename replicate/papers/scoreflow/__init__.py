"""Maximum likelihood training of score-based diffusion models (Song, Durkan, Murray and Ermon 2021, 2101.09258).

Replicated on the 8x8 digits: what the weighting and the drawing of the time do to the likelihood and to the samples,
at one network, one initialisation, the same batches and the same number of steps. The arms are

    plain        lambda(t) = sigma^2, t uniform: the mean of |eps - z|^2, the "original" weighting of the paper
    likelihood   lambda(t) = g^2, t uniform (eq. 7 and theorem 1)
    importance   lambda(t) = g^2, t drawn in proportion to g^2 / sigma^2 (section 4.3): even in log(sigma / s)

and two more that score_sde's table 2 needs: "subvp" is plain on the sub-VP SDE, "discrete" is plain on DDPM's 1000
levels. With lambda = log rho = log(sigma / s) one has d lambda / dt = g^2 / (2 sigma^2) for every affine SDE, so that
the likelihood weighting is the integral of E|eps - z|^2 over lambda, whatever the SDE.

`variational_bound` is theorem 3 with the last step to the data: the bound that the likelihood weighting lowers.
On MNIST and Fashion-MNIST: `replicate.papers.scoreflow.images`.

Deviations: a multilayer perceptron preconditioned by the data's Gaussian fit, a thousandth of the paper's
training, in which each example is noised by z and by -z (the same objective with less noise, for every arm), uniform
dequantisation with gaussianised marginals in place of variational dequantisation; t_min = 1e-3 (VP)
and 0.03 (sub-VP), which are the same noise, where the paper has 1e-5; samples by Heun's method on the probability
flow; the Frechet distance is taken in the features of a digit classifier, to the training images.
"""

from replicate.experiments import Paper
from replicate.papers.scoreflow.digits import objectives
from replicate.papers.scoreflow.images import WEIGHTINGS

PAPER = Paper("scoreflow", __file__, experiments=(objectives, *WEIGHTINGS))
