"""Efron 2011, "Tweedie's Formula and Selection Bias", JASA 106: the posterior mean from the score of the marginal.

For mu ~ g and z | mu ~ N(mu, sigma^2) with marginal density f, Efron takes from Robbins (1956)

    E[mu | z]   = z + sigma^2 l'(z),
    Var[mu | z] = sigma^2 (1 + sigma^2 l''(z)),         l = log f.

Replicated: both against the posterior itself, integrated numerically, for three priors far from Gaussian whose
marginals have closed forms: the paper's exponential, a uniform and a mixture of two narrow Gaussians. The formula
sees only the marginal (differentiated automatically), the posterior only the prior and Bayes' rule.

Deviation: the paper estimates l from data; here it is exact, so that the identity can be held to rounding error.
"""

from pathlib import Path

from replicate.experiments import Paper
from replicate.papers.efron.tweedie import check_tweedie

PAPER = Paper("efron", Path(__file__).with_name("claims.toml"), experiments=(check_tweedie,))
