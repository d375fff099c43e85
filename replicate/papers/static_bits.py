"""Binarised MNIST, static bits: Larochelle's fixed files, 50,000 / 10,000 / 10,000 rows of 784 bits.

The rows of Larochelle and Murray 2011 and of every paper that compares with it. Their order is not MNIST's and there
are no labels. The files are read where REPLICATE_DATA has them and checked by the sha256 of their content.
"""

from __future__ import annotations

import hashlib
from functools import cache

import numpy as np
import torch
from torch import Tensor

from replicate.data.files import contents, data_file
from replicate.model import DataInfo
from replicate.registry import UsageError
from replicate.tasks.base import Task

DIM = 784
ORIGIN = "Larochelle's fixed binarisation, http://www.cs.toronto.edu/~larocheh/public/datasets/binarized_mnist/"
#: path below REPLICATE_DATA, with or without .gz -> sha256 of the uncompressed content
SHA256: dict[str, str] = {
    "mnist-static/binarized_mnist_train.amat": "ad693b29f94c14277b095f5238ddefbbdaaae0939789dd2f4f0205278cee3e4d",
    "mnist-static/binarized_mnist_valid.amat": "1de3d397c40fe8eeb33dafd4099a1f665ec01e96d9be234aaeeac8a34930e2e2",
    "mnist-static/binarized_mnist_test.amat": "e6687bfea3f820c174f33b7865140b2a2dd2930ef786f35d45795fc193b5ab2c",
}
#: what an experiment on static bits names as its files
FILES: tuple[str, ...] = tuple(SHA256)


def parse_amat(content: bytes, dim: int = DIM) -> Tensor:
    """Rows of `dim` bits from text of single digits, one blank or line end after each: shape (n, dim), float32.

    Raises:
        UsageError: anything else.
    """
    symbols = np.frombuffer(content, dtype=np.uint8)
    if len(symbols) % (2 * dim):
        raise UsageError(f"{len(symbols)} bytes are not rows of {dim} bits in .amat text")
    digits = symbols[::2] - ord("0")
    if len(digits) == 0 or digits.max() > 1:
        raise UsageError("an .amat file of bits holds the digits 0 and 1 only")
    return torch.from_numpy(digits.reshape(-1, dim).astype(np.float32))


def read_part(name: str) -> Tensor:
    """One of the three files as (n, 784) bits, its content checked.

    Raises:
        UsageError: the file is missing, or its content is not the published one.
    """
    path = data_file(name, ORIGIN)
    content = contents(path)
    found = hashlib.sha256(content).hexdigest()
    if found != SHA256[name]:
        raise UsageError(f"{path} has content {found[:12]}.., not {SHA256[name][:12]}..; get it again from {ORIGIN}")
    return parse_amat(content)


@cache
def static_mnist() -> Task:
    """The three parts as a task.

    Raises:
        UsageError: a file is missing or wrong.
    """
    train, valid, test = (read_part(name) for name in SHA256)
    return Task("mnist-static", "binarised MNIST, static bits", DataInfo(DIM, "bits", 2, (28, 28)), train, valid, test)
