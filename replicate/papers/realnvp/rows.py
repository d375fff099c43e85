"""Real NVP on MNIST."""

from __future__ import annotations

from baselines.image_flow import IMAGE_REALNVP
from replicate.experiments import Run, experiment
from replicate.experiments.image_flows import CouplingSettings, image_row
from replicate.tasks.images import FILES


@experiment("realnvp-mnist", family="flow", seeds=3, profiles=("full",), files=FILES["mnist"], cuda_minutes=9)
def couplings(run: Run, s: CouplingSettings) -> None:
    """Multi-scale affine couplings under fixed masks on dequantised MNIST."""
    image_row(run, IMAGE_REALNVP, s)
