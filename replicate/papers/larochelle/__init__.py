"""Larochelle and Murray 2011: The Neural Autoregressive Distribution Estimator, AISTATS.

Replicated: test NLL of NADE with 500 hidden units on static bits of MNIST, whose files the paper made.

Deviations: stochastic gradient descent in batches of 100 with momentum 0.9 and a learning rate that falls to zero,
where the paper takes one example per step. The paper's learning rate for these bits and its order of the pixels could
not be checked against a text: here the pixels are read row by row from the top. The best of the validated steps is
kept.
"""

from pathlib import Path

from replicate.experiments import Paper
from replicate.papers.larochelle.rows import static_bits

PAPER = Paper("larochelle", Path(__file__).with_name("claims.toml"), experiments=(static_bits,))
