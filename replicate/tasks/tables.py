"""Small tables of real numbers: the protocol of RNADE (Uria, Murray, Larochelle 2013, 1306.0186) on UCI's data.

The target and the discrete columns are dropped, then one of each pair of columns whose correlation over all rows is
above 0.98 in size. Rows are cut into ten parts once, under `FOLD_SEED`: fold f tests on part f, validates on the part
after it, a ninth of the rest, and trains on the other eight, by which columns are standardised. The paper leaves open
which of a pair is dropped (here the first, as in the released code of Song et al. 2019, 1905.07088), and its own folds
are not to be had.

Deviation: rows that are equal in all kept columns stand in one part. 240 of red wine's 1599 rows are copies of another,
937 of white wine's 4898, none of Parkinsons' 5875, 115 of MAGIC's 19020, none of HTRU2's 17898, 1756 of CASP's 45730.
Cut at random, 23 % of red wine's test rows and 29 % of white wine's would stand in the training part as well, where any
density that is narrow round its training rows gains nats. Numbers here are therefore harder to reach than those of a
random cut; `replicate.papers.rnade` measures by how much.

What remains are near copies. Wine's columns are rounded, so that a density may put spikes on values that it has seen:
its likelihood has no upper limit. Parkinsons keeps the time and both UPDRS scores, without which 15 columns would not
remain; all recordings of one session, five or six rows in different parts, agree in these three.

MINIBOONE's training rows are not to be had here. `miniboone-part` trains on nine tenths of the 3284 validation rows of
Papamakarios et al. 2017 (1705.07057), validates on the last tenth and tests on their 3648 test rows. It is a task of
its own, and no number on it compares with MINIBOONE's.
"""

import io
import math
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from replicate.data.files import read
from replicate.model import DataInfo
from replicate.tasks.base import Task, TaskEntry, refused

FOLDS = 10
#: seed of the parts; part of the tasks' definition
FOLD_SEED = 13060186
#: of each pair of columns that correlate more than this, the first is dropped
CORRELATED = 0.98
ORIGIN = "the UCI repository (archive.ics.uci.edu)"
MINIBOONE_ORIGIN = "Papamakarios et al. 2017, MINIBOONE as they standardised it (Zenodo 1161203)"
MINIBOONE_FILES = ("miniboone-part/val.npy", "miniboone-part/test.npy")
MINIBOONE_DIM = 43


@dataclass(frozen=True)
class Source:
    """A table of UCI's, text with one row a line.

    Attributes:
        name, about, file: of the task.
        delimiter: between the fields of a line, of which there are `fields`.
        header: the first line has names.
        columns: those that are neither target nor discrete.
    """

    name: str
    about: str
    file: str
    delimiter: str
    header: bool
    fields: int
    columns: tuple[int, ...]


WINE = tuple(range(11))
RED = Source("red-wine", "red wine quality", "uci/winequality-red.csv", ";", True, 12, WINE)
WHITE = Source("white-wine", "white wine quality", "uci/winequality-white.csv", ";", True, 12, WINE)
#: without subject, age and sex
VOICES = Source(
    "parkinsons", "Parkinsons telemonitoring", "uci/parkinsons_updrs.data", ",", True, 22, tuple(range(3, 22))
)
SHOWERS = Source("magic", "MAGIC gamma telescope", "uci/magic04.data", ",", False, 11, tuple(range(10)))
PULSARS = Source("htru2", "HTRU2 pulsar candidates", "uci/HTRU_2.csv", ",", False, 9, tuple(range(8)))
#: without RMSD, the target, and F8, which counts
PROTEINS = Source("casp", "protein structure (CASP)", "uci/CASP.csv", ",", True, 10, (1, 2, 3, 4, 5, 6, 7, 9))


# -- reading


def parse_table(content: bytes, source: Source, what: str) -> np.ndarray:
    """Read the columns of a table, float64 (n, len(source.columns)), from a file's bytes; `what` is its name.

    Raises:
        UsageError: these are not lines of as many fields as the table has, or a number is none or not finite.
    """
    if not content.isascii():
        raise refused(what, "it is no ASCII text")
    lines = content.decode("ascii").splitlines()
    first = 1 if source.header else 0
    if len(lines) - first < FOLDS:
        raise refused(what, f"it has {max(len(lines) - first, 0)} rows, too few for {FOLDS} parts")
    return np.array([_numbers(line, source, f"{what}, line {i + 1}") for i, line in enumerate(lines) if i >= first])


def _numbers(line: str, source: Source, where: str) -> list[float]:
    texts = line.split(source.delimiter)
    if len(texts) != source.fields:
        raise refused(where, f"it has {len(texts)} fields, and {source.fields} are expected")
    try:
        if "_" in line:  # Python reads 1_0 as a number
            raise ValueError(f"{line[:40]!r} has an underscore")
        values = [float(texts[column]) for column in source.columns]
    except ValueError as error:
        raise refused(where, f"it does not hold numbers ({error})") from None
    if not all(map(math.isfinite, values)):
        raise refused(where, "it has a number that is not finite")
    return values


def parse_matrix(content: bytes, columns: int, what: str) -> np.ndarray:
    """Read the matrix of an .npy file's bytes, float64 (n, columns); `what` is the file's name.

    Raises:
        UsageError: these are not the bytes of such a matrix, or a number is not finite.
    """
    stream = io.BytesIO(content)
    try:
        version = np.lib.format.read_magic(stream)
        shape, by_columns, dtype = np.lib.format.read_array_header_1_0(stream)
    except (ValueError, EOFError) as error:
        raise refused(what, f"it is no .npy file ({' '.join(str(error).split())[:80]})") from None
    found, rest = f"version {version} with {dtype} of shape {shape}", len(content) - stream.tell()
    whole = dtype == np.dtype("<f8") and len(shape) == 2 and shape[1] == columns and not by_columns
    if version != (1, 0) or not whole or not rest or shape[0] * columns * 8 != rest:
        raise refused(what, f"it announces {found} and has {rest} bytes of it; {columns} columns of <f8 are expected")
    matrix = np.frombuffer(content, dtype="<f8", offset=stream.tell()).reshape(shape)
    if not np.isfinite(matrix).all():
        row = int(np.isfinite(matrix).all(1).argmin())
        raise refused(f"{what}, row {row + 1}", "it has a number that is not finite")
    return matrix


# -- the protocol


def without_correlated(rows: np.ndarray) -> np.ndarray:
    """Columns dropped one by one, the first of a pair with |correlation| > CORRELATED, until there is none."""
    while True:
        near = (np.abs(np.corrcoef(rows.T)) > CORRELATED).sum(1) > 1
        if not near.any():
            return rows
        rows = np.delete(rows, int(near.argmax()), axis=1)


def parts_of(rows: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Assign each row (n, D) a part 0 .. count - 1, shape (n,); parts are nearly equal, equal rows share one."""
    _, group, sizes = np.unique(rows, axis=0, return_inverse=True, return_counts=True)
    order = torch.randperm(len(sizes), generator=torch.Generator().manual_seed(seed)).numpy()
    before = np.cumsum(sizes[order]) - sizes[order]
    part = np.empty(len(sizes), dtype=np.int64)
    part[order] = before * count // len(rows)
    return part[group.reshape(-1)]


def cut(rows: np.ndarray, fold: int, parts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Training, validation and test rows of a fold, standardised by the first; ValueError if there is none."""
    if not 0 <= fold < FOLDS:
        raise ValueError(f"fold is {fold}; there are folds 0 .. {FOLDS - 1}")
    test, valid = parts == fold, parts == (fold + 1) % FOLDS
    train = rows[~(test | valid)]
    mean, std = train.mean(0), train.std(0)
    return (train - mean) / std, (rows[valid] - mean) / std, (rows[test] - mean) / std


def as_task(name: str, about: str, split: tuple[np.ndarray, np.ndarray, np.ndarray]) -> Task:
    """Training, validation and test rows as a task."""
    train, valid, test = (torch.from_numpy(part.astype(np.float32)) for part in split)
    return Task(name, about, DataInfo(train.shape[1], "continuous"), train, valid, test)


def read_columns(source: Source) -> np.ndarray:
    """Read a table's columns, float64 (n, len(source.columns)); raises UsageError if its file is missing or damaged."""
    return read(source.file, ORIGIN, partial(parse_table, source=source))


def read_rows(source: Source) -> np.ndarray:
    """Read a table without correlated columns, float64 (n, D), not standardised; UsageError as in `read_columns`."""
    return without_correlated(read_columns(source))


def load_table(source: Source, fold: int = 0) -> Task:
    """One fold of a table; raises UsageError as `read_columns`, ValueError if there is no such fold."""
    rows = read_rows(source)
    return as_task(source.name, source.about, cut(rows, fold, parts_of(rows, FOLDS, FOLD_SEED)))


def load_miniboone_part() -> Task:
    """MINIBOONE's validation and test rows as a small task; raises UsageError if a file is missing or damaged."""
    parse = partial(parse_matrix, columns=MINIBOONE_DIM)
    valid, test = (read(name, MINIBOONE_ORIGIN, parse) for name in MINIBOONE_FILES)
    held_out = len(valid) // FOLDS
    return as_task("miniboone-part", MINIBOONE_ABOUT, (valid[:-held_out], valid[-held_out:], test))


MINIBOONE_ABOUT = "43 columns of MINIBOONE, its validation rows to train on; not MINIBOONE"


def _entry(source: Source, dim: int, folds: int = 1) -> TaskEntry:
    """Declare a table of which `dim` columns remain."""
    info = DataInfo(dim, "continuous")
    return TaskEntry(source.about, partial(load_table, source), "data", folds, (source.file,), info)


RED_WINE, WHITE_WINE, PARKINSONS = _entry(RED, 11, FOLDS), _entry(WHITE, 11, FOLDS), _entry(VOICES, 15, FOLDS)
MAGIC, HTRU2, CASP = _entry(SHOWERS, 10), _entry(PULSARS, 8), _entry(PROTEINS, 7)
MINIBOONE_PART = TaskEntry(
    MINIBOONE_ABOUT, load_miniboone_part, "data", files=MINIBOONE_FILES, info=DataInfo(MINIBOONE_DIM, "continuous")
)
