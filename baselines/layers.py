"""What several families share: dropout whose masks come from an explicit generator."""

from __future__ import annotations

import torch
from torch import Tensor


def dropout(x: Tensor, rate: float, generator: torch.Generator | None) -> Tensor:
    """Inverted dropout of x; the identity without a generator or at rate 0.

    torch's own draws from the global generator, which no run may touch.
    """
    if generator is None or rate == 0.0:
        return x
    keep = torch.rand(x.shape, generator=generator, device=x.device, dtype=x.dtype) >= rate
    return x * keep / (1 - rate)
