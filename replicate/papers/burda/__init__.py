"""Burda, Grosse, Salakhutdinov 2016: Importance weighted autoencoders, 1509.00519.

Replicated: VAE and IWAE with one and two stochastic layers trained with k = 1, 5, 50 draws, on dynamic and on static
binarised MNIST, scored by the bound with 5000 importance samples (table 1 and appendix D).

Setup as in the paper and its released code (github.com/yburda/iwae): deterministic layers of tanh, Glorot's uniform
start with zero biases, output bias = logit of the clipped training mean; batches of 20 in the order of the file; Adam
with beta1 = 0.99, beta2 = 0.999, eps = 1e-4 outside the bias correction, second moments that start at 1, and gradients
summed over a batch; stage i = 0..7 has 3^i epochs at 1e-3 * 10^(-i/7), rounded as in the code; the last weights kept.

Deviations: test bits of the dynamic rows are drawn once from a fixed seed (the code draws them afresh at evaluation).
Randomness comes from this suite's streams. Rows `dreg` train the same IWAE by doubly reparameterised gradients (Tucker
et al. 2019), as one public re-implementation does. A model with two layers has the shape 784-200-200-100-100-100-50.

k = 1 is one and the same model for VAE and IWAE: the paper prints one number for both.
"""

from replicate.experiments import Paper
from replicate.papers.burda.bounds import measure_gaps
from replicate.papers.burda.rows import ROWS

PAPER = Paper("burda", __file__, experiments=(measure_gaps, *ROWS))
