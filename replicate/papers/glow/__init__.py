"""Kingma, Dhariwal 2018: Glow: Generative flow with invertible 1x1 convolutions, 1807.03039; its row on MNIST.

Replicated: bits per dimension of affine couplings between learned 1x1 convolutions, and the gain over fixed masks with
equal couplings and training (`replicate.papers.realnvp` measures those). Ours: the same steps with rational-quadratic
spline couplings (Durkan et al. 2019, 1906.04032), and Glow on Fashion-MNIST.

Deviations, besides those of `baselines.image_flow`: 8 steps in each of 2 scales and residual conditioners of 128
channels where the paper has 32 steps in 3 scales and 512 channels on CIFAR-10; its setup on MNIST is not printed.
Logits of the pixels, as in `replicate.papers.realnvp`, where the released code has none. The spline row maps each pixel
by its own training distribution (`DequantisedGaussian`) and gives the conditioners their positions, as no paper does.
"""

from dataclasses import dataclass

from baselines.image_flow import GLOW, IMAGE_SPLINE_FLOW
from replicate.experiments import Paper, Run
from replicate.experiments.image_flows import CouplingSettings, image_row
from replicate.experiments.image_rows import full_row
from replicate.tasks.images import FILES


def glow(run: Run, s: CouplingSettings) -> None:
    """Train Glow and bound the bits per dimension of the test images."""
    image_row(run, GLOW, s)


ABOUT = "multi-scale affine couplings and 1x1 convolutions on dequantised"
MNIST, FASHION = (
    full_row(f"glow-{data}", 9, f"{ABOUT} {title}", CouplingSettings(data=data), "flow", FILES[data])(glow)
    for data, title in (("mnist", "MNIST"), ("fashion-mnist", "Fashion-MNIST"))
)


#: 12 couplings in place of 16, batches of 256: 41 ms of arithmetic per step, and the launches of some 6,000 small
#: kernels of the splines (7 microseconds each) take as long; with the sorting behind deterministic gathers about 50 ms.
@dataclass(frozen=True, kw_only=True)
class SplineSettings(CouplingSettings):
    """Settings of the spline couplings."""

    transform: str = "gaussianise"
    depth: int = 6
    positions: bool = True
    bins: int = 8
    steps: int = 10_000
    batch_size: int = 256


@full_row("glow-spline-mnist", 9, family="flow", files=FILES["mnist"])
def splines(run: Run, s: SplineSettings) -> None:
    """Multi-scale spline couplings and 1x1 convolutions on dequantised MNIST."""
    image_row(run, IMAGE_SPLINE_FLOW, s)


PAPER = Paper("glow", __file__, experiments=(MNIST, splines, FASHION))
