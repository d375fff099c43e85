"""Germain, Gregor, Murray and Larochelle 2015: MADE: Masked Autoencoder for Distribution Estimation, 1502.03509.

Replicated: test NLL on static bits of MNIST of MADE with one and two hidden layers of 8000 units, trained with one set
of masks and with 32 in turn, whose densities are averaged.

The settings are those of the command that the released code (github.com/mgermain/MADE) gives for the best of the four
rows: two layers of 8000 rectified units, a direct connection to the outputs, orthogonal start, AdaGrad at 0.01 with
1e-6 under the root, batches of 100 in the order of the file, training until 30 epochs in a row have not improved the
validation NLL, the best epoch kept, random orders in every set. The settings of the three other rows could not be
checked against a text: they are the same here.

Deviations: output biases start at the training marginals, not at zero. 32 sets are trained and averaged; by its text,
the code with 32 sets trains on 33 and averages 33: it averages one that was never trained, and leaves out the first
that was. Training ends at 1000 epochs at the latest.

`made-static-short` is no row of the paper: 500 units and minutes of one CPU core, with dropout, Adam, averaged weights
and the best validated step, through the suite's own training loop.
"""

from pathlib import Path

from replicate.experiments import Paper
from replicate.papers.germain.rows import ROWS, train_short

PAPER = Paper("germain", Path(__file__).with_name("claims.toml"), experiments=(*ROWS, train_short))
