"""A REPLICATE_DATA with a few made-up images in the formats of the published files, for the tests that read images."""

from __future__ import annotations

import gzip
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch

from replicate.tasks import binary, images

#: rows of each file of static bits, and images of each IDX file
STATIC, GREY = 40, 460


def bits(n: int, dim: int = images.DIM, seed: int = 0) -> torch.Tensor:
    """Rows of bits (n, dim), a fifth of them 1."""
    return torch.bernoulli(torch.full((n, dim), 0.2), generator=torch.Generator().manual_seed(seed))


def amat(x: torch.Tensor) -> bytes:
    """Rows of bits as Larochelle's text."""
    return "".join("".join(f"{int(v)} " for v in row[:-1]) + f"{int(row[-1])}\n" for row in x).encode()


def grey(seed: int = 0, n: int = GREY) -> bytes:
    """An IDX file of images."""
    pixels = np.random.default_rng(seed).integers(0, 256, n * images.DIM, dtype=np.uint8)
    return np.array([2051, n, 28, 28], dtype=">i4").tobytes() + pixels.tobytes()


def labels(seed: int = 0, n: int = GREY) -> bytes:
    """An IDX file of labels."""
    named = np.random.default_rng(seed).integers(0, 10, n, dtype=np.uint8)
    return np.array([2049, n], dtype=">i4").tobytes() + named.tobytes()


def colour(seed: int = 0, n: int = STATIC) -> bytes:
    """A batch of CIFAR-10's binary version."""
    rows = np.random.default_rng(seed).integers(0, 256, (n, 3073), dtype=np.uint8)
    rows[:, 0] %= 10
    return rows.tobytes()


def silhouettes() -> bytes:
    """A MATLAB file of silhouettes."""
    stream = io.BytesIO()
    parts = {name: bits(STATIC, seed=i).numpy().astype(np.uint8) for i, name in enumerate(binary.SILHOUETTES_PARTS)}
    scipy.io.savemat(stream, parts)
    return stream.getvalue()


def forget() -> None:
    """Let go what the tasks have read."""
    for cached in (
        images.mnist_static,
        images.mnist_dynamic,
        images._grey,
        images.cifar_10,
        binary.caltech_silhouettes,
    ):
        cached.cache_clear()


@pytest.fixture
def small_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder: static bits with and without .gz, MNIST's and Fashion-MNIST's IDX files, silhouettes, CIFAR-10."""
    monkeypatch.setenv("REPLICATE_DATA", str(tmp_path))
    monkeypatch.setattr("replicate.data.files.expected", lambda path: None)  # made-up content under real names
    for folder in ("mnist", "fashion-mnist", "mnist-static", "caltech101-silhouettes", "cifar-10"):
        (tmp_path / folder).mkdir()
    (tmp_path / binary.SILHOUETTES_FILE).write_bytes(silhouettes())
    for i, name in enumerate(images.FILES["mnist-static"]):
        content = amat(bits(STATIC, seed=i))
        (tmp_path / (f"{name}.gz" if i else name)).write_bytes(gzip.compress(content) if i else content)
    for i, name in enumerate((*images.FILES["mnist"], *images.FILES["fashion-mnist"])):
        content = labels(i) if "labels" in name else grey(i)
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content))
    for i, name in enumerate(images.FILES["cifar-10"]):
        (tmp_path / name).write_bytes(colour(i))
    forget()
    yield tmp_path
    forget()
