"""Tables of real numbers: folds as stated, copies together, and files from anywhere refused in one line."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from replicate.data.files import find
from replicate.errors import UsageError
from replicate.tasks import tables
from replicate.tasks.base import Task, TaskEntry

#: a made-up table: a name, two numbers, a target
TINY = tables.Source("tiny", "a tiny table", "uci/tiny.csv", ",", True, 4, (1, 2))
FOLDED = {"red-wine": (tables.RED_WINE, 1599, 11), "white-wine": (tables.WHITE_WINE, 4898, 11)}
FOLDED["parkinsons"] = (tables.PARKINSONS, 5875, 15)
SINGLE = {"magic": (tables.MAGIC, 19020, 10), "htru2": (tables.HTRU2, 17898, 8)}
WHOLE = {**FOLDED, **SINGLE}


def text(rows: np.ndarray) -> bytes:
    """Rows (n, 2) as the made-up table's file."""
    lines = [f"row{i},{float(a)!r},{float(b)!r},1" for i, (a, b) in enumerate(rows)]
    return "\n".join(["name,a,b,target", *lines, ""]).encode()


def some_rows(n: int = 30) -> np.ndarray:
    """n rows of two numbers, every third a copy of the one before it."""
    rows = np.random.default_rng(0).normal(size=(n, 2)) * [1.0, 50.0] + [3.0, -7.0]
    rows[2::3] = rows[1::3]
    return rows


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """A data folder with the made-up table; its rows."""
    monkeypatch.setenv("REPLICATE_DATA", str(tmp_path))
    (tmp_path / "uci").mkdir()
    (tmp_path / TINY.file).write_bytes(text(some_rows()))
    return some_rows()


def real(entry: TaskEntry, *fold: int) -> Task:
    """A task from real files."""
    if any(find(name) is None for name in entry.files):
        pytest.skip(f"REPLICATE_DATA has no {entry.files[0]}")
    return entry.load(*fold)


# -- the protocol, on the made-up table


def test_columns_that_follow_another_are_dropped_the_first_of_a_pair_first() -> None:
    a, b = np.random.default_rng(1).normal(size=(2, 200))
    kept = tables.without_correlated(np.stack([a, b, 2 * a + 0.01 * b, -a, a + b], 1))
    np.testing.assert_array_equal(kept, np.stack([b, -a, a + b], 1))


@given(st.lists(st.integers(0, 8), min_size=40, max_size=120), st.integers(0, 2**31))
def test_parts_keep_equal_rows_together_and_are_nearly_equal(values: list[int], seed: int) -> None:
    rows = np.array(values, dtype=float)[:, None].repeat(2, 1)
    part = tables.parts_of(rows, 4, seed)
    largest = max(values.count(v) for v in set(values))
    assert set(part) <= {0, 1, 2, 3}
    assert all(len(set(part[rows[:, 0] == v])) == 1 for v in set(values))
    assert all(abs(int((part == p).sum()) - len(rows) / 4) <= largest for p in range(4))


def test_every_row_is_tested_once_and_validated_once_over_the_folds(tiny: np.ndarray) -> None:
    part = tables.parts_of(tiny, tables.FOLDS, tables.FOLD_SEED)
    numbers = np.arange(len(tiny), dtype=float)[:, None]
    tested, validated = [], []
    for fold in range(tables.FOLDS):
        train, valid, test = tables.cut(numbers, fold, part)
        scale = numbers[(part != fold) & (part != (fold + 1) % tables.FOLDS)]
        back = [set(np.rint(x * scale.std() + scale.mean()).astype(int).ravel()) for x in (train, valid, test)]
        assert not back[0] & back[1]
        assert not (back[0] | back[1]) & back[2]
        assert set.union(*back) == set(range(len(tiny)))
        validated += sorted(back[1])
        tested += sorted(back[2])
    assert sorted(tested) == sorted(validated) == list(range(len(tiny)))


def test_columns_are_standardised_by_the_training_part_alone(tiny: np.ndarray) -> None:
    task = tables.load_table(TINY, 2)
    assert (task.name, task.about, task.info.dim, task.info.domain) == ("tiny", "a tiny table", 2, "continuous")
    torch.testing.assert_close(task.train.mean(0), torch.zeros(2), atol=1e-6, rtol=0)
    torch.testing.assert_close(task.train.std(0, correction=0), torch.ones(2))
    everything = torch.cat([task.train, task.valid, task.test])
    assert not torch.allclose(everything.mean(0), torch.zeros(2), atol=1e-3)
    # one affine map a column leads from the file's rows to the task's
    order = np.lexsort(tiny.T)
    sorted_task = everything[np.lexsort(everything.T.numpy())].double().numpy()
    for ours, theirs in zip(sorted_task.T, tiny[order].T, strict=True):
        slope, offset = np.polyfit(theirs, ours, 1)
        np.testing.assert_allclose(slope * theirs + offset, ours, atol=1e-5)


@pytest.mark.usefixtures("tiny")
def test_a_fold_is_the_same_every_time_and_another_fold_is_not() -> None:
    assert tables.load_table(TINY, 4).sha256() == tables.load_table(TINY, 4).sha256()
    assert tables.load_table(TINY, 4).sha256() != tables.load_table(TINY, 5).sha256()
    with pytest.raises(ValueError, match="fold is 10; there are folds 0"):
        tables.load_table(TINY, 10)


# -- files from anywhere


def replaced(old: bytes, new: bytes) -> bytes:
    """The made-up table's file with its first `old` replaced."""
    content = text(some_rows())
    assert old in content
    return content.replace(old, new, 1)


BAD_TABLES: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "tiny: it has 0 rows, too few for 10 parts"),
    "header alone": (lambda: b"name,a,b,target\n", "it has 0 rows"),
    "cut short within a line": (lambda: text(some_rows())[:-8], "line 31: it has [123] fields, and 4 are expected"),
    "blank line": (lambda: replaced(b"\nrow3", b"\n\nrow3"), "line 5: it has 1 fields"),
    "a field too many": (lambda: replaced(b"row3,", b"row3,4,"), "line 5: it has 5 fields"),
    "text": (lambda: replaced(b"row3,", b"row3,x"), "line 5: it does not hold numbers"),
    "missing number": (lambda: replaced(b"row3", b"row3,,7,1\nrow3"), "line 5: it does not hold numbers"),
    "nan": (lambda: replaced(b"row3", b"r,nan,7,1\nrow3"), "line 5: it has a number that is not finite"),
    "overflow": (lambda: replaced(b"row3", b"r,1e999,7,1\nrow3"), "line 5: it has a number that is not finite"),
    "digits of Python": (lambda: replaced(b"row3", b"r,1_0,7,1\nrow3"), "line 5: .*underscore"),
    "other bytes": (lambda: text(some_rows()) + bytes([0xFF, 0xFE]), "it is no ASCII text"),
}


@pytest.mark.parametrize("case", BAD_TABLES)
def test_a_damaged_table_is_refused_in_one_line_with_its_name_and_the_next_step(case: str) -> None:
    make, message = BAD_TABLES[case]
    with pytest.raises(UsageError, match=message) as caught:
        tables.parse_table(make(), TINY, "tiny")
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith("get the file again.")


@given(st.binary(max_size=400))
def test_a_table_of_any_bytes_is_read_or_refused(content: bytes) -> None:
    for candidate in (content, text(some_rows(12)) + content):
        try:
            rows = tables.parse_table(candidate, TINY, "tiny")
        except UsageError:
            continue
        assert rows.shape[1] == 2
        assert np.isfinite(rows).all()


def npy(array: np.ndarray, version: tuple[int, int] | None = None) -> bytes:
    """An .npy file."""
    stream = io.BytesIO()
    np.lib.format.write_array(stream, array, version, allow_pickle=True)
    return stream.getvalue()


MATRIX = np.random.default_rng(2).normal(size=(5, 3))


def announcing(shape: tuple[int, ...]) -> bytes:
    """The file of MATRIX whose header says another shape."""
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "<f8", "fortran_order": False, "shape": shape})
    return stream.getvalue() + MATRIX.tobytes()


def test_a_matrix_is_read_as_it_was_written() -> None:
    np.testing.assert_array_equal(tables.parse_matrix(npy(MATRIX), 3, "m"), MATRIX)


BAD_MATRICES: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "it is no .npy file"),
    "another format": (lambda: b"PK\x03\x04" + bytes(40), "it is no .npy file"),
    "cut short in its header": (lambda: npy(MATRIX)[:40], "it is no .npy file"),
    "cut short": (lambda: npy(MATRIX)[:-1], "has 119 bytes of it; 3 columns"),
    "longer": (lambda: npy(MATRIX) + b"x", "has 121 bytes of it"),
    "a huge shape": (lambda: announcing((10**15, 3)), "3 columns of <f8 are expected"),
    "no rows": (lambda: npy(MATRIX[:0]), "3 columns of <f8 are expected"),
    "other columns": (lambda: npy(MATRIX[:, :2]), "3 columns of <f8 are expected"),
    "single precision": (lambda: npy(MATRIX.astype(np.float32)), "float32 of shape"),
    "by columns": (lambda: npy(np.asfortranarray(MATRIX)), "3 columns of <f8 are expected"),
    "another version": (lambda: npy(MATRIX, (2, 0)), "."),
    "pickled": (lambda: npy(np.array([[None, 1.0, 2.0]], dtype=object)), "object of shape"),
    "infinite": (lambda: npy(np.where(MATRIX[3, 1] == MATRIX, np.inf, MATRIX)), "m, row 4: it has a number that"),
}


@pytest.mark.parametrize("case", BAD_MATRICES)
def test_a_damaged_matrix_is_refused_in_one_line(case: str) -> None:
    make, message = BAD_MATRICES[case]
    with pytest.raises(UsageError, match=message) as caught:
        tables.parse_matrix(make(), 3, "m")
    assert "\n" not in str(caught.value)


@given(st.binary(max_size=300))
def test_a_matrix_of_any_bytes_is_read_or_refused(noise: bytes) -> None:
    for content in (noise, npy(MATRIX)[:80] + noise, b"\x93NUMPY\x01\x00" + noise):
        with pytest.raises(UsageError):
            tables.parse_matrix(content, 3, "m")


def test_a_missing_table_is_named_with_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REPLICATE_DATA", str(tmp_path))
    with pytest.raises(UsageError, match=r"uci/winequality-red.csv .* is missing: .*UCI repository"):
        tables.RED_WINE.load(0)
    with pytest.raises(UsageError, match=r"miniboone-part/val.npy .* is missing: .*Zenodo"):
        tables.MINIBOONE_PART.load()


def test_miniboone_part_keeps_a_tenth_of_its_rows_for_validation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = np.random.default_rng(3).normal(size=(25, 43))
    monkeypatch.setenv("REPLICATE_DATA", str(tmp_path))
    monkeypatch.setattr(tables, "MINIBOONE_FILES", ("a.npy", "b.npy"))
    for name, part in (("a.npy", rows[:20]), ("b.npy", rows[20:])):
        (tmp_path / name).write_bytes(npy(part))
    task = tables.load_miniboone_part()
    for ours, theirs in ((task.train, rows[:18]), (task.valid, rows[18:20]), (task.test, rows[20:])):
        np.testing.assert_array_equal(ours, theirs.astype(np.float32))


# -- the real files


@pytest.mark.parametrize("name", WHOLE)
def test_real_tables_have_the_protocols_dimensions_and_no_row_in_two_parts(name: str) -> None:
    entry, rows, dim = WHOLE[name]
    folds = (0, 9) if entry.folds > 1 else ()
    task = real(entry, *folds[:1])
    assert (task.name, entry.about, entry.kind) == (name, task.about, "data")
    sizes = [len(part) for part in (task.train, task.valid, task.test)]
    assert sum(sizes) == rows
    assert task.info.dim == dim
    assert all(abs(size - share * rows) < 10 for size, share in zip(sizes, (0.8, 0.1, 0.1), strict=True))
    seen: set[bytes] = set()
    for part in (task.train, task.valid, task.test):
        here = {row.numpy().tobytes() for row in part}
        assert not here & seen
        seen |= here


@pytest.mark.parametrize(("source", "copies"), [(tables.RED, 240), (tables.WHITE, 937), (tables.VOICES, 0)])
def test_copies_are_as_many_as_the_module_says(source: tables.Source, copies: int) -> None:
    if find(source.file) is None:
        pytest.skip(f"REPLICATE_DATA has no {source.file}")
    rows = tables.read_rows(source)
    assert len(rows) - len(np.unique(rows, axis=0)) == copies


def test_real_miniboone_part_is_nearly_standardised() -> None:
    task = real(tables.MINIBOONE_PART)
    assert [len(part) for part in (task.train, task.valid, task.test)] == [2956, 328, 3648]
    assert float(task.train.mean(0).abs().max()) < 0.1
    assert float((task.train.std(0) - 1).abs().max()) < 0.5
