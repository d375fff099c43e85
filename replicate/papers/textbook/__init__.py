"""Tomczak, Deep Generative Modeling (2nd edition, 2024): the public notebooks' numbers on the 8x8 digits.

Replicated: the notebooks' RealNVP, VAE and causal-convolution ARM (github.com/jmtomczak/intro_dgm) on the book's own
split, trained as the notebooks train (Adamax, lr 1e-3, batches of 64, the best validation epoch kept, stopped after
more than 20 epochs without a better one), in three columns: the number as the notebook computes it, a valid bound of
the very same weights, and this suite's model of the same family.

What the notebooks compute is not always a likelihood:
- The RealNVP adds noise from U(0, 0.5] to the integers. The density then lives on half a cell a pixel, and the printed
  mean of -log q(x + u) lies 64 ln 2 = 44.36 nats below the bound on -log P(x) that the same noise gives.
- VAE and ARM clamp each pixel's probability to [1e-5, 1 - 1e-5]: a surprising pixel costs 11.5 nats at most.
- An earlier release of the VAE notebook multiplies the log variance in log q(z | x) by the number of latents L. A wide
  posterior then pays: 16 latents at variance 16 gain hundreds of nats. `textbook-vae-early-release` shows it.
- An earlier release of the RealNVP notebook trains with noise U[0, 1) and evaluates at the integers without noise: a
  density, not a bound either ("density_at_integers").

Deviations: parameters and batches come from this suite's streams; a split is evaluated as one batch; PyTorch is newer
than the book's 1.7. The book's hierarchical VAE and integer discrete flow are not implemented.
"""

from replicate.experiments import Paper
from replicate.papers.textbook.notebooks import NOTEBOOKS, cell_noise, uniform_reference

CLAIMS = __file__
PAPER = Paper("textbook", CLAIMS, experiments=(*NOTEBOOKS, uniform_reference, cell_noise))
