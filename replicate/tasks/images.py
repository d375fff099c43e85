"""Images as tasks, from files of REPLICATE_DATA: MNIST as grey values and as bits, Fashion-MNIST, CIFAR-10.

Binarised MNIST is two data sets. Static: Larochelle's fixed bits (Larochelle and Murray 2011), 50,000 / 10,000 /
10,000 rows whose order is not MNIST's, without labels. Dynamic: every training batch draws its bits afresh from the
grey values taken as probabilities, so that the training part holds the probabilities; the bits of validation and test
are drawn once from recorded seeds, where some public code draws them again at every evaluation.
"""

import math
from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from torch import Tensor

from replicate.data.files import contents, data_file, parse_idx, parse_idx_labels, read
from replicate.errors import UsageError
from replicate.model import DataInfo
from replicate.tasks.base import Task, TaskEntry

DIM, SHAPE = 784, (28, 28)
BITS, GREY = DataInfo(DIM, "bits", 2, SHAPE), DataInfo(DIM, "levels", 256, SHAPE)
#: training images that every task here keeps for validation: the last ones
VALID = 10_000
#: seeds of the dynamic bits of validation and test
VALID_BITS_SEED, TEST_BITS_SEED = 150900518, 150900519
ORIGINS = {
    "mnist-static": "Larochelle's fixed bits, http://www.cs.toronto.edu/~larocheh/public/datasets/binarized_mnist/",
    "mnist": "MNIST, http://yann.lecun.com/exdb/mnist/ and its mirrors",
    "fashion-mnist": "Fashion-MNIST, https://github.com/zalandoresearch/fashion-mnist",
    "cifar-10": "the binary version of CIFAR-10, https://www.cs.toronto.edu/~kriz/cifar.html",
}
_IMAGES = ("train-images-idx3-ubyte", "t10k-images-idx3-ubyte")
_LABELS = ("train-labels-idx1-ubyte", "t10k-labels-idx1-ubyte")
#: what each task reads, below REPLICATE_DATA
FILES: dict[str, tuple[str, ...]] = {
    "mnist-static": tuple(f"mnist-static/binarized_mnist_{part}.amat" for part in ("train", "valid", "test")),
    "mnist-dynamic": tuple(f"mnist/{name}" for name in _IMAGES),
    "mnist": tuple(f"mnist/{name}" for name in (*_IMAGES, *_LABELS)),
    "fashion-mnist": tuple(f"fashion-mnist/{name}" for name in (*_IMAGES, *_LABELS)),
    "cifar-10": (*(f"cifar-10/data_batch_{i}.bin" for i in range(1, 6)), "cifar-10/test_batch.bin"),
}
#: colour planes, height and width of CIFAR-10's images
COLOUR_SHAPE = (3, 32, 32)
COLOURS = DataInfo(math.prod(COLOUR_SHAPE), "levels", 256)


def parse_amat(content: bytes, dim: int = DIM) -> Tensor:
    """Rows (n, dim) of bits as float32 from text of digits, a blank or line end after each; else raises UsageError."""
    symbols = np.frombuffer(content, dtype=np.uint8)
    if len(symbols) % (2 * dim):
        raise UsageError(f"{len(symbols)} bytes are not rows of {dim} bits in .amat text")
    digits = symbols[::2] - ord("0")
    if len(digits) == 0 or digits.max() > 1:
        raise UsageError("an .amat file of bits holds the digits 0 and 1 only")
    return torch.from_numpy(digits.reshape(-1, dim).astype(np.float32))


def binarise(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """Bits that are 1 with these probabilities, of the same shape."""
    u = torch.rand(probabilities.shape, generator=generator, device=probabilities.device)
    return (u <= probabilities).to(probabilities.dtype)


@cache
def mnist_static() -> Task:
    """Larochelle's bits, 50,000 / 10,000 / 10,000 rows; raises UsageError if a file is missing or wrong."""
    paths = (data_file(name, ORIGINS["mnist-static"]) for name in FILES["mnist-static"])
    train, valid, test = (parse_amat(contents(path)) for path in paths)
    return Task("mnist-static", MNIST_STATIC.about, BITS, train, valid, test)


def grey_values(folder: str) -> tuple[Tensor, Tensor]:
    """Pixels (60000, 784) and (10000, 784) of "mnist" or "fashion-mnist" as uint8; raises UsageError as `read`."""
    train, test = (read(f"{folder}/{name}", ORIGINS[folder], parse_idx) for name in _IMAGES)
    return train, test


@cache
def _grey(folder: str) -> Task:
    """Grey values 0..255: 50,000 / 10,000 / 10,000 rows with labels."""
    train, test = grey_values(folder)
    labels, test_labels = (read(f"{folder}/{name}", ORIGINS[folder], parse_idx_labels) for name in _LABELS)
    images, named = (len(train), len(test)), (len(labels), len(test_labels))
    if images != named:
        step = "`replicate data check` names what is wrong."
        raise UsageError(f"{folder} has {images} images and {named} labels; {step}")
    cut = len(train) - VALID if len(train) > VALID else len(train) // 2
    parts = (train[:cut].float(), train[cut:].float(), test.float())
    return Task(folder, f"{folder}, grey values", GREY, *parts, labels=(labels[:cut], labels[cut:], test_labels))


def mnist() -> Task:
    """MNIST's grey values, 50,000 / 10,000 / 10,000 rows; raises UsageError if a file is missing or wrong."""
    return _grey("mnist")


def fashion_mnist() -> Task:
    """Fashion-MNIST's grey values, 50,000 / 10,000 / 10,000 rows; raises UsageError if a file is missing or wrong."""
    return _grey("fashion-mnist")


@cache
def mnist_dynamic() -> Task:
    """MNIST's grey values as probabilities to train on, frozen bits to test on; raises UsageError as `mnist`."""
    train, test = (part.float() / 255 for part in grey_values("mnist"))
    cut = len(train) - VALID if len(train) > VALID else len(train) // 2
    valid = binarise(train[cut:], torch.Generator().manual_seed(VALID_BITS_SEED))
    test = binarise(test, torch.Generator().manual_seed(TEST_BITS_SEED))
    return Task("mnist-dynamic", MNIST_DYNAMIC.about, BITS, train[:cut], valid, test, redraw=binarise)


def parse_cifar(content: bytes, what: str) -> tuple[Tensor, Tensor]:
    """Images (n, 3072) as uint8, the red, green and blue plane one after the other, and labels (n,) of a batch.

    Raises:
        UsageError: these are not the bytes of a batch of the binary version; `what` names them.
    """
    size = 1 + math.prod(COLOUR_SHAPE)  # a label, then the pixels
    if not content or len(content) % size:
        raise UsageError(f"{what} is no batch of CIFAR-10: {len(content)} bytes are not rows of {size}.")
    rows = torch.frombuffer(bytearray(content), dtype=torch.uint8).view(-1, size)
    labels = rows[:, 0].long()
    if int(labels.max()) > 9:
        raise UsageError(f"{what} is no batch of CIFAR-10: a label is {int(labels.max())}, and the last one is 9.")
    return rows[:, 1:], labels


def read_cifar(name: str) -> tuple[Tensor, Tensor]:
    """Read a batch of CIFAR-10 below REPLICATE_DATA as `parse_cifar`; raises UsageError if there is no such batch."""
    return read(name, ORIGINS["cifar-10"], parse_cifar)


@cache
def cifar_10() -> Task:
    """CIFAR-10's colours, 45,000 / 5,000 / 10,000 rows of 3072 levels with labels; raises UsageError as `mnist`."""
    *batches, (test, test_labels) = [read_cifar(name) for name in FILES["cifar-10"]]
    train, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    cut = len(train) * 9 // 10
    parts = (train[:cut].float(), train[cut:].float(), test.float())
    return Task("cifar-10", CIFAR_10.about, COLOURS, *parts, labels=(labels[:cut], labels[cut:], test_labels))


def mirrored(x: Tensor) -> Tensor:
    """Colour images (n, 3072), left and right exchanged."""
    return x.unflatten(1, COLOUR_SHAPE).flip(-1).flatten(1)


def _entry(name: str, about: str, load: Callable[[], Task], info: DataInfo) -> TaskEntry:
    return TaskEntry(about, load, "data", files=FILES[name], info=info)


MNIST_STATIC = _entry("mnist-static", "MNIST, Larochelle's fixed bits", mnist_static, BITS)
MNIST_DYNAMIC = _entry(
    "mnist-dynamic", "MNIST, training bits drawn afresh for every batch, test bits frozen", mnist_dynamic, BITS
)
MNIST = _entry("mnist", "MNIST, 256 grey values", mnist, GREY)
FASHION_MNIST = _entry("fashion-mnist", "Fashion-MNIST, 256 grey values", fashion_mnist, GREY)
CIFAR_10 = _entry("cifar-10", "CIFAR-10, 256 levels of three colours", cifar_10, COLOURS)
