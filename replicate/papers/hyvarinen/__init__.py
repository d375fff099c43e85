"""Hyvarinen 2005, "Estimation of Non-Normalized Statistical Models by Score Matching", JMLR 6.

Replicated: the partial integration that turns the explicit objective (eq. 2) into the implicit one (eq. 4), by
quadrature; the Gaussian example (sec. 3.1), where score matching is maximum likelihood; and the reason for the method:
score, objective and Langevin chains do not depend on the normalising constant, while the likelihood does.

Deviations: the paper solves the Gaussian example on paper; here the suite's own loss is minimised numerically, on data
that are not Gaussian (the identity holds for any sample). The models of the last experiment are the suite's, briefly
trained; Langevin dynamics is no part of the paper.
"""

from replicate.experiments import Paper
from replicate.papers.hyvarinen.identities import check_gaussian, check_normaliser, check_objective

PAPER = Paper("hyvarinen", __file__, (check_gaussian, check_objective, check_normaliser))
