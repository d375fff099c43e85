"""Score-based generative modeling through SDEs (Song et al. 2021, 2011.13456).

Replicated: samplers at equal numbers of score evaluations (table 1), likelihoods (table 2) and evaluations of the
probability flow by tolerance (figure 3), each with the exact score of a Gaussian mixture, where nothing but the
sampler errs, and with a network trained on the 8x8 digits; the sub-VP SDE's variance and the exactness of the
probability flow's likelihood as identities. On MNIST: `replicate.papers.score_sde.images`.

    P     predictor: reverse diffusion, N steps (algorithms 2 and 3)
    PC    predictor and one corrector step, N / 2 steps of the grid each
    C     corrector only, two steps at each of N / 2 noise levels

The corrector's r is the paper's 0.16 on digits; on the mixture, where it can be afforded, PC and C each take the best
of three r, as the paper searches r for the best FID, here on chains of their own. The Langevin convention is the
package's (see `replicate.sampling.predictor_corrector`, which converts the paper's).

Deviations: hundreds of evaluations in place of 2000 and a time grid that is even in (sigma / s)^(1/7), not in t; all
SDEs on digits share one network, for its input is x / s(t) and log(sigma / s), the same for each of them; it is a
multilayer perceptron, a thousandth of the paper's training; on the mixture the Frechet distance is that of the
residuals from the nearest mode to the component that they belong to, which is known in closed form.
"""

from replicate.experiments import ModelRuns, Paper
from replicate.papers.score_sde.images import DIFFUSIONS
from replicate.papers.score_sde.samplers import exact_mixture, identities, trained_digits

EXPERIMENTS = (exact_mixture, trained_digits, identities, *DIFFUSIONS)
RUNS = {"full": (ModelRuns(("sde-vp", "sde-subvp"), ("digits",), 3),)}
PAPER = Paper("score_sde", __file__, EXPERIMENTS, model_runs=RUNS)
