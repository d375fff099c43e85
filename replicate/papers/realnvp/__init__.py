"""Dinh, Sohl-Dickstein, Bengio 2017: Density estimation using Real NVP, 1605.08803; its row on MNIST in bits/dim.

Replicated: bits per dimension, by the bounds that `replicate.experiments.image_flows` takes of every flow.

Deviations: `baselines.image_flow` lists the differences in the flow. Logits are those of 1e-6 + (1 - 2e-6) x, as public
code takes them on MNIST; the paper's 0.05 is for natural images. With 0.05 the noise of a black pixel is an eightieth
of the range that strokes need, with 1e-6 a fifth. One mean and one deviation of all pixels standardise the logits.
About fifty passes over the training images; averaged weights of the best validation step.
"""

from baselines.image_flow import IMAGE_REALNVP
from replicate.experiments import Paper, Run
from replicate.experiments.image_flows import CouplingSettings, image_row
from replicate.experiments.image_rows import full_row
from replicate.tasks.images import FILES


@full_row("realnvp-mnist", 9, family="flow", files=FILES["mnist"])
def couplings(run: Run, s: CouplingSettings) -> None:
    """Multi-scale affine couplings under fixed masks on dequantised MNIST."""
    image_row(run, IMAGE_REALNVP, s)


PAPER = Paper("realnvp", __file__, experiments=(couplings,))
