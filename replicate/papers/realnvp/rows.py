"""Real NVP on MNIST."""

from __future__ import annotations

from baselines.image_flow import IMAGE_REALNVP
from replicate.experiments import Run
from replicate.experiments.image_flows import CouplingSettings, image_row
from replicate.experiments.image_rows import full_row
from replicate.tasks.images import FILES


@full_row("realnvp-mnist", 9, family="flow", files=FILES["mnist"])
def couplings(run: Run, s: CouplingSettings) -> None:
    """Multi-scale affine couplings under fixed masks on dequantised MNIST."""
    image_row(run, IMAGE_REALNVP, s)
