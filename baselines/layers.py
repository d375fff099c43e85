"""Pieces that several families share: settings as values, and dropout whose masks come from an explicit generator."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from replicate.model import DataInfo

M = TypeVar("M")
S = TypeVar("S")


def from_settings(build: Callable[[DataInfo, S], M], settings: type[S], **fixed: Any) -> Callable[..., M]:
    """Return a builder that takes the fields of a settings dataclass as keyword arguments, as `ModelEntry.build` does.

    Args:
        build: takes the data's shape and the settings.
        settings: the dataclass.
        fixed: values of fields that are not parameters of the builder.
    """

    def build_from(info: DataInfo, **params: Any) -> M:
        return build(info, settings(**{**fixed, **params}))

    return build_from


def dropout(x: Tensor, rate: float, generator: torch.Generator | None) -> Tensor:
    """Inverted dropout of x; the identity without a generator or at rate 0.

    torch's own draws from the global generator, which no run may touch.
    """
    if generator is None or rate == 0.0:
        return x
    keep = torch.rand(x.shape, generator=generator, device=x.device, dtype=x.dtype) >= rate
    return x * keep / (1 - rate)
