"""Salakhutdinov, Hinton 2009: Deep Boltzmann machines; the mixture-of-Bernoullis baselines of section 4.1.

Replicated: mixtures of K = 10, 100 and 500 Bernoullis fitted by EM to binarised MNIST, with exact test NLL. The model
is this suite's registered mixture-em.

Deviations: Larochelle's static bits instead of the authors' own binarisation, so the printed numbers are shown and not
judged; the orderings in K are judged. EM starts from random training rows and has a weak Dirichlet prior shared out by
the training marginals; it takes a fixed number of steps. The authors' start and stop are not printed.
"""

from pathlib import Path

from replicate.experiments import Paper
from replicate.papers.mixture.rows import MIXTURES

PAPER = Paper("mixture", Path(__file__).with_name("claims.toml"), experiments=MIXTURES)
