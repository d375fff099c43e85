"""Binary sets and small pictures with fixed splits: thirteen density benchmarks, silhouettes, drawings, faces.

The density benchmarks are those on which Larochelle, Bengio and Turian 2010, NADE (Larochelle and Murray 2011), its
successors and sum-product networks (Gens and Domingos 2013) are compared; `mushrooms`, `dna` and `nips` are NADE's.
Their splits into training, validation and test part are the collection's own.

Caltech 101 silhouettes (Marlin, Swersky, Chen and de Freitas 2010) are the 28 x 28 pictures of split 1. The file has a
pixel 1 where there is background and runs down the columns; here 1 is background still, and pictures run along the
rows, as every other image of the suite does.

Omniglot (Lake, Salakhutdinov and Tenenbaum 2015) is here at 105 x 105 pixels, as drawn. Likelihoods in print are those
of another file, Burda's at 28 x 28, and do not compare. The background alphabets train, but for their last characters,
which validate; the evaluation alphabets test.

Frey's faces (Roweis, Saul and Hinton 2002) are 1965 frames of one video, 28 x 20 pixels of 256 grey levels, with no
split of their own. They are cut at random under `FACES_SEED` into 1565 / 200 / 200, the sizes of Tomczak and Welling
2018 (1705.07120). Frames next to each other are nearly the same: such a test part says nothing of another video.
"""

import io
import math
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial

import numpy as np
import scipy.io
import torch
from torch import Tensor

from replicate.data.files import read
from replicate.model import DataInfo
from replicate.tasks.base import Task, TaskEntry, refused

Parts = tuple[Tensor, Tensor, Tensor]

PARTS = ("train", "valid", "test")
BENCHMARKS_FILE = "debd/debd.npz"
BENCHMARKS_ORIGIN = "the density estimation benchmark collection, https://github.com/arranger1044/DEBD"
#: name in the collection -> dimensions
DIMENSIONS: dict[str, int] = {
    "nltcs": 16,
    "plants": 69,
    "baudio": 100,
    "jester": 100,
    "bnetflix": 100,
    "accidents": 111,
    "mushrooms": 112,
    "pumsb_star": 163,
    "dna": 180,
    "nips": 500,
    "bbc": 1058,
    "moviereview": 1001,
    "voting": 1359,
}
#: bytes that one array of the collection may take, unpacked
MOST = 64 << 20

SILHOUETTES_FILE = "caltech101-silhouettes/caltech101_silhouettes_28_split1.mat"
SILHOUETTES_ORIGIN = "Marlin et al. 2010, https://people.cs.umass.edu/~marlin/data.shtml"
SILHOUETTES_PARTS = ("train_data", "val_data", "test_data")
SILHOUETTES_SHAPE = (28, 28)

OMNIGLOT_FILE = "omniglot/omniglot105.npz"
OMNIGLOT_ORIGIN = "the drawings of https://github.com/brendenlake/omniglot, packed"
OMNIGLOT_SIDE = 105
#: characters of the background alphabets that validate, about a tenth
OMNIGLOT_VALID = 96

FACES_FILE = "frey-faces/frey_rawface.mat"
FACES_ORIGIN = "Roweis, https://cs.nyu.edu/~roweis/data.html"
FACES_SHAPE = (28, 20)
#: seed of the split; part of the task's definition
FACES_SEED = 170507120
#: frames of the validation and of the test part
FACES_HELD_OUT = 200


def _entry(name: str, about: str, info: DataInfo, file: str, origin: str, parse: Callable[..., Parts]) -> TaskEntry:
    """Declare a task whose file parse(content, what=) cuts into training, validation and test part."""

    def load() -> Task:
        return Task(name, about, info, *read(file, origin, parse))

    return TaskEntry(about, load, "data", files=(file,), info=info)


# -- thirteen benchmarks


def parse_benchmark(content: bytes, name: str, what: str) -> Parts:
    """Return the three parts of one benchmark, each float32 (n, D) of bits.

    The file has, packed to bytes along the rows, NAME_train, NAME_valid and NAME_test, and beside each the number of
    bits of a row, NAME_train_bits.

    Raises:
        UsageError: these are not the bytes of an .npz file, named `what`, with these arrays.
    """
    with _opened(content, what) as archive:
        train, valid, test = (_bits(archive, f"{name}_{part}", DIMENSIONS[name]) for part in PARTS)
    return train, valid, test


@contextmanager
def _opened(content: bytes, what: str) -> Iterator[zipfile.ZipFile]:
    """Open an .npz file to read arrays from; errors name the file."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            yield archive
    except _Wrong as error:
        raise refused(what, str(error)) from None
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError, OSError) as error:
        raise refused(what, f"it is no .npz file ({error})") from None


class _Wrong(ValueError):
    """What is wrong with an array of a file, without the file's name."""


def _bits(archive: zipfile.ZipFile, name: str, dim: int, axes: int = 2) -> Tensor:
    """Unpack an array whose bits are packed along its last axis: float32 (.., dim)."""
    packed, bits = _member(archive, name), _member(archive, f"{name}_bits")
    if bits.shape != () or bits.dtype.kind not in "iu" or int(bits) != dim:
        raise _Wrong(f"{name}_bits is {str(bits)[:40]}, and {dim} bits are expected")
    if packed.dtype != np.uint8 or packed.ndim != axes or packed.shape[-1] != -(-dim // 8) or not packed.size:
        raise _Wrong(f"{name} has {packed.dtype} of shape {packed.shape}, which are no rows of {dim} packed bits")
    rows = np.unpackbits(packed, axis=-1)
    if rows[..., dim:].any():
        raise _Wrong(f"{name} has bits set beyond the {dim} of a row")
    return torch.from_numpy(rows[..., :dim].astype(np.float32))


def _member(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """Read an array of an .npz file, no larger than allowed."""
    try:
        found = archive.getinfo(f"{name}.npy")
    except KeyError:
        raise _Wrong(f"it has no array {name}") from None
    if found.file_size > MOST:
        raise _Wrong(f"{name} has {found.file_size} bytes, and {MOST} are allowed")
    stream = io.BytesIO(archive.read(found))
    try:
        version = np.lib.format.read_magic(stream)
        shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    except (ValueError, EOFError) as error:
        raise _Wrong(f"{name} is no array ({' '.join(str(error).split())[:80]})") from None
    size = math.prod(shape) * dtype.itemsize
    if version != (1, 0) or dtype.hasobject or min(shape, default=0) < 0 or size != found.file_size - stream.tell():
        raise _Wrong(f"{name} announces {dtype} of shape {shape}, which is not what follows")
    stream.seek(0)
    array: np.ndarray = np.load(stream, allow_pickle=False)
    return array


def _benchmark(name: str) -> TaskEntry:
    """Declare a benchmark by its name in the collection."""
    about = f"{name}, {DIMENSIONS[name]} bits, a density benchmark with its own split"
    info, parse = DataInfo(DIMENSIONS[name], "bits", 2), partial(parse_benchmark, name=name)
    return _entry(name.replace("_", "-"), about, info, BENCHMARKS_FILE, BENCHMARKS_ORIGIN, parse)


# -- pictures


def parse_mat(content: bytes, names: tuple[str, ...], what: str) -> list[np.ndarray]:
    """Arrays of whole numbers 0..255 of a MATLAB file, each uint8 (rows, columns).

    Raises:
        UsageError: these are not the bytes of a MATLAB file, named `what`, with these arrays.
    """
    try:
        found = scipy.io.loadmat(io.BytesIO(content), variable_names=list(names), mat_dtype=False)
    except Exception as error:  # scipy's reader raises whatever the damage leads to
        raise refused(what, f"it is no MATLAB file ({' '.join(str(error).split())[:80]})") from None
    for name in names:
        array = found.get(name)
        if not isinstance(array, np.ndarray) or array.dtype != np.uint8 or array.ndim != 2 or not array.size:
            raise refused(what, f"it has no matrix {name} of bytes")
    return [found[name] for name in names]


def parse_silhouettes(content: bytes, what: str) -> Parts:
    """Return the parts, float32 (n, 784) of bits by rows, 1 = background; raises UsageError as in `parse_mat`."""
    parts = []
    for name, array in zip(SILHOUETTES_PARTS, parse_mat(content, SILHOUETTES_PARTS, what), strict=True):
        height, width = SILHOUETTES_SHAPE
        if array.shape[1] != height * width or array.max() > 1:
            found = f"shape {array.shape} and numbers up to {array.max()}"
            raise refused(what, f"{name} has {found}, not rows of 784 bits")
        by_rows = array.reshape(-1, width, height).transpose(0, 2, 1).reshape(array.shape)
        parts.append(torch.from_numpy(by_rows.astype(np.float32)))
    return parts[0], parts[1], parts[2]


def parse_omniglot(content: bytes, what: str) -> Parts:
    """Return the three parts, each float32 (n, 11025) of bits, row by row, 1 = ink.

    The file has, packed to bytes along the rows of a drawing, background and evaluation, (characters, drawings of each,
    105, 14), and beside each the number of bits of a row.

    Raises:
        UsageError: these are not the bytes of such a file.
    """
    with _opened(content, what) as archive:
        background, evaluation = (_bits(archive, name, OMNIGLOT_SIDE, axes=4) for name in ("background", "evaluation"))
        if {background.shape[2], evaluation.shape[2]} != {OMNIGLOT_SIDE}:
            raise _Wrong(f"its rows are no drawings of {OMNIGLOT_SIDE} rows")
        if len(background) <= OMNIGLOT_VALID:
            raise _Wrong(f"background has {len(background)} characters, and more than {OMNIGLOT_VALID} are expected")
    parts = background[:-OMNIGLOT_VALID], background[-OMNIGLOT_VALID:], evaluation
    train, valid, test = (part.reshape(-1, OMNIGLOT_SIDE**2) for part in parts)
    return train, valid, test


def parse_faces(content: bytes, what: str) -> Tensor:
    """All frames in order, float32 (n, 560) of levels 0..255, by rows; raises UsageError as in `parse_mat`."""
    (frames,) = parse_mat(content, ("ff",), what)
    height, width = FACES_SHAPE
    if frames.shape[0] != height * width or frames.shape[1] <= 2 * FACES_HELD_OUT:
        raise refused(what, f"ff has shape {frames.shape}, not a column of {height * width} pixels for each frame")
    return torch.from_numpy(frames.T.astype(np.float32))


def split_faces(content: bytes, what: str) -> Parts:
    """Return 1565 / 200 / 200 frames, drawn at random; UsageError as in `parse_faces`."""
    x = parse_faces(content, what)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(FACES_SEED))
    train, valid, test = x[order].split([len(x) - 2 * FACES_HELD_OUT, FACES_HELD_OUT, FACES_HELD_OUT])
    return train, valid, test


NLTCS, PLANTS, BAUDIO, JESTER, BNETFLIX, ACCIDENTS, MUSHROOMS, PUMSB_STAR, DNA, NIPS, BBC, MOVIEREVIEW, VOTING = map(
    _benchmark, DIMENSIONS
)
#: 4100 / 2264 / 2307 silhouettes
CALTECH_SILHOUETTES = _entry(
    "caltech-silhouettes",
    "Caltech 101 silhouettes, 28x28 bits, split 1",
    DataInfo(math.prod(SILHOUETTES_SHAPE), "bits", 2, SILHOUETTES_SHAPE),
    SILHOUETTES_FILE,
    SILHOUETTES_ORIGIN,
    parse_silhouettes,
)
#: 17,360 / 1,920 / 13,180 drawings of characters, each set of other characters
OMNIGLOT = _entry(
    "omniglot",
    "Omniglot, 105x105 bits as drawn, test on other alphabets",
    DataInfo(OMNIGLOT_SIDE**2, "bits", 2, (OMNIGLOT_SIDE, OMNIGLOT_SIDE)),
    OMNIGLOT_FILE,
    OMNIGLOT_ORIGIN,
    parse_omniglot,
)
FREY_FACES = _entry(
    "frey-faces",
    "Frey's faces, 28x20 pixels of 256 grey levels, a random split",
    DataInfo(math.prod(FACES_SHAPE), "levels", 256, FACES_SHAPE),
    FACES_FILE,
    FACES_ORIGIN,
    split_faces,
)


@cache
def caltech_silhouettes() -> Task:
    """Read the silhouettes once a process; UsageError where the file is missing or damaged."""
    return CALTECH_SILHOUETTES.load()
