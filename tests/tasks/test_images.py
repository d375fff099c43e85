"""Images as tasks: made-up files in the published formats, whole, truncated and damaged, and the real ones."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import pytest
import torch
from helpers.image_data import GREY, STATIC, amat, bits, colour, forget, grey, labels, small_images
from scipy import stats

from replicate.data.catalog import catalog
from replicate.data.files import absent
from replicate.errors import UsageError
from replicate.model import DataInfo
from replicate.runs.seeds import Streams
from replicate.runs.training import train
from replicate.tasks import images
from replicate.tasks.base import Task
from replicate.tasks.loading import tasks

__all__ = ["small_images"]
NAMES = ("mnist-static", "mnist-dynamic", "mnist", "fashion-mnist", "cifar-10")
IMAGES = "mnist/train-images-idx3-ubyte.gz"


def test_static_bits_are_read_as_written(small_images: Path) -> None:
    task = images.mnist_static()
    for i, part in enumerate((task.train, task.valid, task.test)):
        assert torch.equal(part, bits(STATIC, seed=i))
    assert task.info == DataInfo(784, "bits", 2, (28, 28))


def test_grey_values_and_labels_are_read_as_written(small_images: Path) -> None:
    for task in (images.mnist(), images.fashion_mnist()):
        assert task.info == DataInfo(784, "levels", 256, (28, 28))
        assert task.labels is not None
        assert [len(p) for p in (task.train, task.valid, task.test)] == [GREY // 2, GREY // 2, GREY]
        assert [len(p) for p in task.labels] == [GREY // 2, GREY // 2, GREY]
    whole = torch.cat([images.mnist().train, images.mnist().valid])
    assert torch.equal(whole[:, :3], torch.frombuffer(bytearray(grey(0)[16:]), dtype=torch.uint8).view(-1, 784)[:, :3])


def test_colour_values_and_labels_are_read_as_written_and_the_last_tenth_of_training_is_for_validation(
    small_images: Path,
) -> None:
    task = images.cifar_10()
    assert task.info == DataInfo(3072, "levels", 256)
    assert [len(p) for p in (task.train, task.valid, task.test)] == [180, 20, 40]
    assert task.labels is not None
    rows = [torch.frombuffer(bytearray(colour(i)), dtype=torch.uint8).view(-1, 3073) for i in range(6)]
    whole, labels = torch.cat(rows[:5])[:, 1:], torch.cat(rows)[:, 0]
    assert torch.equal(torch.cat([task.train, task.valid]), whole.float())
    assert torch.equal(task.test, rows[5][:, 1:].float())
    assert torch.equal(torch.cat(task.labels), labels.long())


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "0 bytes"), (colour()[:-1], "122919 bytes are not rows of 3073"), (b"\x0a" + bytes(3072), "a label is 10")],
    ids=["empty", "one byte missing", "label"],
)
def test_a_damaged_batch_of_colour_images_is_refused(small_images: Path, content: bytes, message: str) -> None:
    (small_images / "cifar-10/data_batch_3.bin").write_bytes(content)
    with pytest.raises(UsageError, match=message):
        images.cifar_10()


def test_training_bits_are_drawn_afresh_and_test_bits_are_frozen(small_images: Path) -> None:
    task = images.mnist_dynamic()
    forget()
    again = images.mnist_dynamic()
    assert torch.equal(task.test, again.test)
    assert torch.equal(task.valid, again.valid)
    assert set(task.test.unique().tolist()) == {0.0, 1.0}
    assert 0 < float(task.train[0, task.train[0] < 1].max()) < 1
    assert task.redraw is not None
    generator = torch.Generator().manual_seed(0)
    first, second = (task.redraw(task.train, generator) for _ in range(2))
    assert not torch.equal(first, second)
    many = images.binarise(torch.full((20_000,), 0.3), torch.Generator().manual_seed(0))
    assert stats.binomtest(int(many.sum()), 20_000, 0.3).pvalue > 1e-3


class Listener(torch.nn.Module):
    """A model that keeps what it is shown."""

    capabilities = frozenset()

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[torch.Tensor] = []

    def initialise(self, x: torch.Tensor, generator: torch.Generator) -> None:
        self.seen.append(x)

    def loss(self, x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        self.seen.append(x)
        return self.weight**2

    def after_step(self, generator: torch.Generator) -> None:
        pass


def test_a_model_of_dynamic_bits_never_sees_a_probability() -> None:
    from replicate.model import Training

    rows = torch.full((6, 4), 0.5)
    model = Listener()
    train(model, rows, rows, Training(steps=3, batch_size=6), Streams("t", "m", 0), images.binarise)
    assert len(model.seen) == 4
    assert all(set(x.unique().tolist()) <= {0.0, 1.0} for x in model.seen)
    assert not torch.equal(model.seen[1], model.seen[2])


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_file_is_one_clear_line(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forget()
    entry = tasks()[name]
    monkeypatch.setenv("REPLICATE_DATA", str(tmp_path))
    assert entry.files[0] in entry.absent()
    with pytest.raises(UsageError) as told:
        entry.load()
    text = str(told.value)
    assert "\n" not in text
    assert all(word in text for word in (name.removesuffix("-dynamic"), "REPLICATE_DATA", str(tmp_path)))
    monkeypatch.delenv("REPLICATE_DATA")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(UsageError, match="REPLICATE_DATA is not set"):
        entry.load()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gzip.compress(grey())[:-40], "cannot be used"),
        (gzip.compress(grey()[:-1]), "460 images of 28 x 28 pixels are announced"),
        (gzip.compress(labels()), "no IDX file of images"),
        (gzip.compress(b""), "no IDX file of images"),
        (b"\x00" * 100, "cannot be used"),
    ],
    ids=["cut short", "one byte missing", "labels", "empty", "zeros"],
)
def test_damaged_images_are_refused(small_images: Path, content: bytes, message: str) -> None:
    (small_images / IMAGES).write_bytes(content)
    for load in (images.mnist, images.mnist_dynamic):
        with pytest.raises(UsageError, match=message):
            load()


@pytest.mark.parametrize("content", [labels()[:-1], grey(), b"", labels(n=3)], ids=["cut", "images", "empty", "few"])
def test_damaged_labels_are_refused(small_images: Path, content: bytes) -> None:
    (small_images / "mnist/train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(content))
    with pytest.raises(UsageError, match=r"IDX file of labels|460, 460\) images and"):
        images.mnist()


def test_text_that_is_no_rows_of_bits_is_refused() -> None:
    with pytest.raises(UsageError, match="digits 0 and 1"):
        images.parse_amat(b"0 2\n0 1\n", dim=2)
    with pytest.raises(UsageError, match="not rows"):
        images.parse_amat(b"0 1 0", dim=2)
    assert torch.equal(images.parse_amat(amat(bits(3, 2)), dim=2), bits(3, 2))


def test_other_content_under_a_published_name_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REPLICATE_DATA", str(tmp_path))
    forget()
    (tmp_path / "mnist-static").mkdir()
    for name in images.FILES["mnist-static"]:
        (tmp_path / name).write_bytes(amat(bits(40)))
    with pytest.raises(UsageError, match="get it again"):
        images.mnist_static()


def test_every_image_file_is_in_the_catalogue() -> None:
    assert {name for names in images.FILES.values() for name in names} <= catalog().keys()


@pytest.mark.skipif(
    not os.environ.get("REPLICATE_DATA") or bool(absent(images.FILES["mnist"])), reason="MNIST is not in REPLICATE_DATA"
)
def test_the_real_mnist_has_the_published_counts() -> None:
    forget()
    task: Task = images.mnist()
    assert task.labels is not None
    counts = torch.bincount(torch.cat(task.labels[:2])).tolist()
    assert counts == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    pixels = torch.cat([task.train, task.valid]) / 255
    assert float(pixels.mean()) == pytest.approx(0.13066, abs=1e-5)
    assert float(pixels.double().std()) == pytest.approx(0.30811, abs=1e-5)
    forget()
