"""Binary sets and small pictures: unpacked as stated, fixed splits, files from anywhere refused in one line."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from hypothesis import given
from hypothesis import strategies as st

from replicate.data.files import find
from replicate.errors import UsageError
from replicate.tasks import binary
from replicate.tasks.base import TaskEntry

BENCHMARKS = {name.replace("_", "-"): getattr(binary, name.upper()) for name in binary.DIMENSIONS}
PICTURES = {
    "caltech-silhouettes": binary.CALTECH_SILHOUETTES,
    "frey-faces": binary.FREY_FACES,
    "omniglot": binary.OMNIGLOT,
}
#: rows of training, validation and test part
SIZES = {
    "nltcs": (16181, 2157, 3236),
    "plants": (17412, 2321, 3482),
    "mushrooms": (2000, 500, 5624),
    "dna": (1600, 400, 1186),
    "nips": (400, 100, 1240),
    "voting": (1214, 200, 350),
    "caltech-silhouettes": (4100, 2264, 2307),
    "omniglot": (17_360, 1_920, 13_180),
    "frey-faces": (1565, 200, 200),
}


def bits(n: int, dim: int, seed: int = 0) -> np.ndarray:
    """n random rows of bits."""
    return np.random.default_rng(seed).integers(0, 2, (n, dim)).astype(np.uint8)


def benchmark(**changed: np.ndarray) -> bytes:
    """A made-up collection with one benchmark, `tiny`, of 11 bits."""
    arrays: dict[str, np.ndarray] = {}
    for i, part in enumerate(binary.PARTS):
        arrays[f"tiny_{part}"] = np.packbits(bits(4 + i, 11, i), axis=-1)
        arrays[f"tiny_{part}_bits"] = np.array(11)
    stream = io.BytesIO()
    np.savez_compressed(stream, allow_pickle=False, **{**arrays, **changed})
    return stream.getvalue()


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(binary.DIMENSIONS, "tiny", 11)


# -- benchmarks


def test_bits_come_back_as_they_were_packed() -> None:
    parts = binary.parse_benchmark(benchmark(), "tiny", "file")
    for i, part in enumerate(parts):
        assert part.dtype == torch.float32
        np.testing.assert_array_equal(part, bits(4 + i, 11, i))


def zipped(name: str, content: bytes) -> bytes:
    """The made-up collection with one member's bytes replaced."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(benchmark())) as old, zipfile.ZipFile(stream, "w") as new:
        for member in old.namelist():
            new.writestr(member, content if member == name else old.read(member))
    return stream.getvalue()


def without(name: str) -> bytes:
    """The made-up collection without one member."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(benchmark())) as old, zipfile.ZipFile(stream, "w") as new:
        for member in old.namelist():
            if member != name:
                new.writestr(member, old.read(member))
    return stream.getvalue()


def header(shape: tuple[int, ...], descr: str = "|u1") -> bytes:
    """An array's header without the array."""
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": descr, "fortran_order": False, "shape": shape})
    return stream.getvalue()


TRAIN = "tiny_train.npy"
OVERHANG = np.full((4, 2), 255, dtype=np.uint8)
BAD_BENCHMARKS: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "it is no .npz file"),
    "cut short": (lambda: benchmark()[:-30], "it is no .npz file"),
    "damaged inside": (lambda: benchmark()[:60] + b"\xff" * 20 + benchmark()[80:], "it is no .npz file|is no array"),
    "no such benchmark": (lambda: without(TRAIN), "it has no array tiny_train"),
    "no number of bits": (lambda: without("tiny_train_bits.npy"), "it has no array tiny_train_bits"),
    "another number of bits": (lambda: benchmark(tiny_valid_bits=np.array(12)), "tiny_valid_bits is 12, and 11 bits"),
    "bits that are no number": (lambda: benchmark(tiny_valid_bits=np.array("x")), "tiny_valid_bits is x"),
    "many numbers of bits": (lambda: benchmark(tiny_test_bits=np.arange(3)), "tiny_test_bits is"),
    "too few bytes a row": (lambda: benchmark(tiny_train=bits(4, 1)), "no rows of 11 packed bits"),
    "not packed": (lambda: benchmark(tiny_train=bits(4, 2).astype(float)), "float64 of shape"),
    "rows of rows": (lambda: benchmark(tiny_train=bits(4, 2)[None]), "no rows of 11 packed bits"),
    "one row's list": (lambda: benchmark(tiny_train=bits(4, 2)[0]), "no rows of 11 packed bits"),
    "no rows": (lambda: benchmark(tiny_train=bits(0, 2)), "no rows of 11 packed bits"),
    "bits beyond a row": (lambda: benchmark(tiny_train=OVERHANG), "bits set beyond the 11"),
    "no array": (lambda: zipped(TRAIN, b"hello"), "tiny_train is no array"),
    "a huge shape": (lambda: zipped(TRAIN, header((10**12, 10**12))), "which is not what follows"),
    "a negative shape": (lambda: zipped(TRAIN, header((-4, -2)) + bytes(8)), "."),
    "pickled": (lambda: zipped(TRAIN, header((1, 2), "|O") + bytes(16)), "object of shape"),
}


@pytest.mark.parametrize("case", BAD_BENCHMARKS)
def test_a_damaged_collection_is_refused_in_one_line_with_its_name_and_the_next_step(case: str) -> None:
    make, message = BAD_BENCHMARKS[case]
    with pytest.raises(UsageError, match=message) as caught:
        binary.parse_benchmark(make(), "tiny", "file")
    assert str(caught.value).startswith("file: ")
    assert str(caught.value).endswith("get the file again.")
    assert "\n" not in str(caught.value)


def test_an_array_that_unpacks_to_too_much_is_refused_before_it_is_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = benchmark(tiny_train=np.zeros((100_000, 2), dtype=np.uint8))
    monkeypatch.setattr(binary, "MOST", 100_000)
    with pytest.raises(UsageError, match="tiny_train has 200128 bytes, and 100000 are allowed"):
        binary.parse_benchmark(bomb, "tiny", "file")


@given(st.binary(max_size=200), st.integers(0, 1000))
def test_a_collection_of_any_bytes_is_read_or_refused(noise: bytes, at: int) -> None:
    whole = benchmark()
    for content in (noise, whole[:at] + noise + whole[at + len(noise) :]):
        try:
            parts = binary.parse_benchmark(content, "tiny", "file")
        except UsageError:
            continue
        assert [part.shape[1] for part in parts] == [11, 11, 11]


# -- pictures


def mat(**arrays: object) -> bytes:
    """A MATLAB file."""
    stream = io.BytesIO()
    scipy.io.savemat(stream, arrays, do_compression=True)
    return stream.getvalue()


def silhouettes(n: int = 3) -> dict[str, np.ndarray]:
    """Made-up parts of n pictures, columns first, as the file has them."""
    pictures = {name: bits(n, 784, i).reshape(n, 28, 28) for i, name in enumerate(binary.SILHOUETTES_PARTS)}
    return {name: p.transpose(0, 2, 1).reshape(n, 784) for name, p in pictures.items()}


def test_silhouettes_are_turned_from_columns_to_rows_and_keep_their_bits() -> None:
    corner = np.ones((1, 28, 28), dtype=np.uint8)
    corner[0, 2:, 5] = 0  # a stroke down column 5
    arrays = {**silhouettes(), "train_data": corner.transpose(0, 2, 1).reshape(1, 784)}
    train, valid, test = binary.parse_silhouettes(mat(**arrays), "file")
    np.testing.assert_array_equal(train.view(28, 28), corner[0])
    assert (valid.shape, test.shape, valid.dtype) == ((3, 784), (3, 784), torch.float32)
    np.testing.assert_array_equal(test.view(3, 28, 28), bits(3, 784, 2).reshape(3, 28, 28))


def faces(n: int = 401) -> np.ndarray:
    """Made-up frames, a column each, frame i of grey i modulo 256."""
    return np.tile(np.arange(n) % 256, (560, 1)).astype(np.uint8)


def test_faces_are_the_columns_of_the_file() -> None:
    x = binary.parse_faces(mat(ff=faces()), "file")
    assert x.shape == (401, 560)
    np.testing.assert_array_equal(x[:, 17], np.arange(401) % 256)


BAD_PICTURES: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "it is no MATLAB file"),
    "another format": (lambda: b"\x89HDF\r\n\x1a\n" + bytes(600), "it is no MATLAB file|it has no matrix"),
    "cut short": (lambda: mat(ff=faces())[:-100], "it is no MATLAB file|it has no matrix"),
    "without the matrix": (lambda: mat(gg=faces()), "it has no matrix ff of bytes"),
    "text": (lambda: mat(ff="hello"), "it has no matrix ff of bytes"),
    "a cell array": (lambda: mat(ff=np.array([["a"]], dtype=object)), "no MATLAB file|no matrix ff of bytes"),
    "other numbers": (lambda: mat(ff=faces().astype(float)), "it has no matrix ff of bytes"),
    "other pixels": (lambda: mat(ff=faces()[1:]), "ff has shape .559, 401., not a column of 560"),
    "too few frames": (lambda: mat(ff=faces(400)), "ff has shape"),
}


@pytest.mark.parametrize("case", BAD_PICTURES)
def test_a_damaged_matlab_file_is_refused_in_one_line(case: str) -> None:
    make, message = BAD_PICTURES[case]
    with pytest.raises(UsageError, match=message) as caught:
        binary.parse_faces(make(), "file")
    assert "\n" not in str(caught.value)


def test_silhouettes_of_another_shape_or_of_grey_are_refused() -> None:
    for changed in (bits(3, 783), 2 * bits(3, 784)):
        with pytest.raises(UsageError, match=r"val_data has shape .* not rows of 784 bits"):
            binary.parse_silhouettes(mat(**{**silhouettes(), "val_data": changed}), "file")


@given(st.binary(min_size=1, max_size=60), st.integers(0, 600))
def test_a_matlab_file_of_any_bytes_is_read_or_refused(noise: bytes, at: int) -> None:
    whole = mat(ff=faces()[:, :1])
    for content in (noise, whole[:at] + noise + whole[at + len(noise) :]):
        with pytest.raises(UsageError):
            binary.parse_faces(content, "file")


def test_a_missing_file_is_named_with_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REPLICATE_DATA", str(tmp_path))
    with pytest.raises(UsageError, match=r"debd/debd.npz .* is missing: .*DEBD"):
        binary.DNA.load()


# -- the real files


@pytest.mark.parametrize("name", SIZES)
def test_real_sets_have_their_sizes_and_shapes(name: str) -> None:
    entry: TaskEntry = {**BENCHMARKS, **PICTURES}[name]
    if any(find(file) is None for file in entry.files):
        pytest.skip(f"REPLICATE_DATA has no {entry.files[0]}")
    task = entry.load()
    assert (task.name, task.about, entry.kind) == (name, entry.about, "data")
    assert tuple(len(part) for part in (task.train, task.valid, task.test)) == SIZES[name]
    assert task.info.levels is not None
    for part in (task.train, task.valid, task.test):
        assert part.shape[1] == task.info.dim
        assert float(part.min()) >= 0
        assert float(part.max()) <= task.info.levels - 1
        assert torch.equal(part, part.round())


def drawings(characters: int = 97, **changed: np.ndarray) -> bytes:
    """A made-up file of Omniglot's layout, two drawings a character, each with one row of ink at its number."""
    arrays: dict[str, np.ndarray] = {}
    for name, n in (("background", characters), ("evaluation", 2)):
        x = np.zeros((n, 2, 105, 105), dtype=np.uint8)
        for i in range(2 * n):
            x[i // 2, i % 2, i % 105] = 1
        arrays |= {name: np.packbits(x, axis=-1), f"{name}_bits": np.array(105)}
    stream = io.BytesIO()
    np.savez_compressed(stream, **{**arrays, **changed})  # type: ignore[arg-type]
    return stream.getvalue()


def test_drawings_are_split_by_character_and_keep_their_bits() -> None:
    train, valid, test = binary.parse_omniglot(drawings(), "file")
    assert [len(part) for part in (train, valid, test)] == [2, 192, 4]
    for part, first in ((train, 0), (valid, 2), (test, 0)):
        assert part.shape[1] == 105 * 105
        rows = part.view(-1, 105, 105)
        inked = rows.all(2).float().argmax(1)
        assert torch.equal(inked, torch.arange(first, first + len(part)) % 105)
        assert torch.equal(rows.sum((1, 2)), torch.full((len(part),), 105.0))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: drawings()[:-40], "it is no .npz file"),
        (lambda: drawings(96), "background has 96 characters, and more than 96 are expected"),
        (lambda: drawings(evaluation_bits=np.array(104)), "evaluation_bits is 104, and 105 bits"),
        (lambda: drawings(evaluation=np.zeros((2, 2, 104, 14), dtype=np.uint8)), "no drawings of 105 rows"),
        (lambda: drawings(background=np.zeros((7, 14), dtype=np.uint8)), "no rows of 105 packed bits"),
    ],
    ids=["cut short", "few characters", "another number of bits", "no drawings", "flat"],
)
def test_a_file_that_is_not_omniglots_is_refused(make: Callable[[], bytes], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        binary.parse_omniglot(make(), "file")
    assert str(caught.value).startswith("file: ")


def test_real_silhouettes_are_white_at_the_border_and_dark_inside() -> None:
    if find(binary.SILHOUETTES_FILE) is None:
        pytest.skip("REPLICATE_DATA has no silhouettes")
    mean = binary.caltech_silhouettes().train.mean(0).view(28, 28)
    assert float(mean[0].mean()) > 0.6
    assert float(mean[10:18, 10:18].mean()) < 0.4


def test_real_faces_vary_less_from_row_to_row_than_a_wrong_shape_would() -> None:
    if find(binary.FACES_FILE) is None:
        pytest.skip("REPLICATE_DATA has no faces")
    x = binary.FREY_FACES.load().train[:200]

    def roughness(height: int, width: int) -> float:
        image = x.view(-1, height, width)
        return float(image.diff(dim=1).abs().mean())

    assert roughness(28, 20) < 0.7 * roughness(20, 28)
