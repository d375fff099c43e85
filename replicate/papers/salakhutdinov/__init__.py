"""Salakhutdinov & Murray (2008), On the quantitative analysis of deep belief networks, ICML.

Annealed importance sampling (AIS) gives log Z of restricted Boltzmann machines with an error bar. Replicated here: on
machines small enough to enumerate, the estimate agrees with the exact log Z within its own error, from below and from
above; and, on the fixed binarisation of MNIST, the test log-likelihood of 500 hidden units trained by CD-1, CD-3, CD-25
and persistent CD-25; and by centred gradients and persistent CD-3, a recipe that a CPU carries out in half an hour,
since the others' long chains need a GPU.

Deviations: Larochelle's fixed bits (50,000 training rows) instead of the authors' own binarisation; reverse annealing
runs (Grosse et al. 2015, 1511.02543) beside the authors' forward ones; float64 throughout the annealing. The
enumerable machines model the suite's thresholded 8x8 digits, and their schedule keeps the paper's three densities of
temperatures with every tenth temperature.
"""

from replicate.experiments import Paper
from replicate.papers.salakhutdinov.annealing import STATIC, against_enumeration

PAPER = Paper("salakhutdinov", __file__, experiments=(against_enumeration, *STATIC))
