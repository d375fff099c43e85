"""Files of REPLICATE_DATA: found packed or not, hashed by content, refused in one line when damaged."""

import gzip
import hashlib
import lzma
import struct
from pathlib import Path

import pytest
import torch

from replicate.errors import UsageError
from replicate.runs import files

IDX = struct.pack(">4i", 0x803, 2, 2, 3) + bytes(range(12))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("REPLICATE_DATA", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("ending", "pack"), [("", bytes), (".gz", gzip.compress), (".xz", lzma.compress)], ids=["plain", "gz", "xz"]
)
def test_a_file_is_the_same_however_it_is_packed(folder: Path, ending: str, pack: object) -> None:
    (folder / f"images{ending}").write_bytes(pack(IDX))  # type: ignore[operator]
    assert files.sha256("images") == hashlib.sha256(IDX).hexdigest()
    assert torch.equal(files.read_idx("images", "its place"), torch.arange(12, dtype=torch.uint8).reshape(2, 6))


def test_an_absent_file_is_named_with_its_place(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert files.sha256("images") == ""
    with pytest.raises(UsageError, match=r"images .* is missing: REPLICATE_DATA=.*It comes from its place"):
        files.read_idx("images", "its place")
    monkeypatch.delenv("REPLICATE_DATA")
    with pytest.raises(UsageError, match="REPLICATE_DATA is not set"):
        files.data_file("images", "its place")


@pytest.mark.parametrize("raw", [b"", IDX[:10], IDX[:-1], IDX + b"x", b"\0" * 28, struct.pack(">4i", 0x803, -1, 2, 3)])
def test_what_is_no_idx_file_of_images_is_refused(folder: Path, raw: bytes) -> None:
    (folder / "images").write_bytes(raw)
    with pytest.raises(UsageError, match="is no IDX file of images; get it again from its place"):
        files.read_idx("images", "its place")


@pytest.mark.parametrize(
    ("ending", "raw"),
    [(".gz", gzip.compress(IDX)[:-9]), (".gz", b"no gzip"), (".xz", lzma.compress(IDX)[:-9]), (".xz", b"no xz")],
)
def test_a_damaged_packing_is_one_line(folder: Path, ending: str, raw: bytes) -> None:
    (folder / f"images{ending}").write_bytes(raw)
    with pytest.raises(UsageError, match=r"cannot be read .*; get it again"):
        files.read_idx("images", "its place")
