"""Files of REPLICATE_DATA: found packed or not, checked and hashed by content, refused in one line when damaged."""

import contextlib
import gzip
import hashlib
import lzma
import os
import struct
import tracemalloc
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from replicate.data import catalog, files
from replicate.data.catalog import Entry, read_catalog
from replicate.errors import UsageError

IDX = struct.pack(">4i", 0x803, 2, 2, 3) + bytes(range(12))
NAME = "known/images"
PACKINGS = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty data folder, and a catalogue of one file."""
    monkeypatch.setenv("REPLICATE_DATA", str(tmp_path))
    entry = Entry(NAME, hashlib.sha256(IDX).hexdigest(), len(IDX), "none", ("https://example.org/images.gz",))
    monkeypatch.setattr(files, "catalog", lambda: {NAME: entry})
    (tmp_path / "known").mkdir()
    return tmp_path


# --- finding and reading ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["images", NAME])
@pytest.mark.parametrize("ending", PACKINGS)
def test_a_file_is_the_same_however_it_is_packed(folder: Path, ending: str, name: str) -> None:
    (folder / f"{name}{ending}").write_bytes(PACKINGS[ending](IDX))
    assert files.sha256(name) == hashlib.sha256(IDX).hexdigest()
    assert torch.equal(
        files.read(name, "its place", files.parse_idx), torch.arange(12, dtype=torch.uint8).reshape(2, 6)
    )


def test_an_absent_file_is_named_with_its_place_and_the_next_step(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert files.sha256("images") == ""
    with pytest.raises(UsageError, match=r"images .* is missing: REPLICATE_DATA=.*It comes from its place; put it"):
        files.read("images", "its place", files.parse_idx)
    with pytest.raises(UsageError, match=f"`replicate data fetch {NAME}` gets it"):
        files.read(NAME, "its place", files.parse_idx)
    monkeypatch.delenv("REPLICATE_DATA")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    with pytest.raises(UsageError, match=f"REPLICATE_DATA is not set, so it was looked for in {folder}/cache/score"):
        files.data_file("images", "its place")


def test_without_replicate_data_the_users_cache_directory_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("REPLICATE_DATA", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    for cache, expected in (
        (str(tmp_path / "xdg"), tmp_path / "xdg" / "scoreboard-replicate"),
        ("relative", tmp_path / ".cache" / "scoreboard-replicate"),
        ("", tmp_path / ".cache" / "scoreboard-replicate"),
    ):
        monkeypatch.setenv("XDG_CACHE_HOME", cache)
        assert files.data_folder() == expected
    (expected / "some").mkdir(parents=True)
    (expected / "some" / "images").write_bytes(IDX)
    assert files.find("some/images") == expected / "some" / "images"


def test_a_relative_data_folder_is_checked_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("REPLICATE_DATA", "../" + folder.name)
    (folder / NAME).write_bytes(IDX[:-1])
    with pytest.raises(UsageError, match="27 bytes"):
        files.contents(files.data_file(NAME, ""))
    with pytest.raises(UsageError, match="27 bytes"):
        files.contents(folder / NAME)


# --- damage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", PACKINGS)
def test_truncated_file_is_one_line_with_the_finding_and_the_next_step(folder: Path, ending: str) -> None:
    packed = PACKINGS[ending](IDX)
    for cut in range(len(packed)):
        (folder / f"{NAME}{ending}").write_bytes(packed[:cut])
        with pytest.raises(UsageError) as told:
            files.read(NAME, "its place", files.parse_idx)
        message = str(told.value)
        assert "\n" not in message
        assert f"{folder / NAME}{ending} cannot be used: it" in message
        assert message.endswith(f"`replicate data fetch {NAME}` gets it again.")
        if not ending:
            assert f"{cut} bytes with sha256 {hashlib.sha256(packed[:cut]).hexdigest()[:12]}" in message
            assert f"28 bytes with sha256 {hashlib.sha256(IDX).hexdigest()[:12]}.. are expected" in message


@pytest.mark.parametrize("ending", PACKINGS)
def test_no_flipped_bit_changes_the_data(folder: Path, ending: str) -> None:
    """Refused, or of no effect (as in the time of a gzip header); never other content."""
    packed = PACKINGS[ending](IDX)
    refused = 0
    for bit in range(8 * len(packed)):
        flipped = bytearray(packed)
        flipped[bit // 8] ^= 1 << bit % 8
        (folder / f"{NAME}{ending}").write_bytes(flipped)
        files._seen.clear()  # the clock of the file's last change may be coarser than this loop
        try:
            assert files.contents(folder / f"{NAME}{ending}") == IDX
        except UsageError:
            refused += 1
    assert refused == 8 * len(packed) if ending == "" else refused > 4 * len(packed)


def test_the_hash_of_a_damaged_file_is_refused_every_time(folder: Path) -> None:
    (folder / NAME).write_bytes(IDX[::-1])
    for _ in range(2):
        with pytest.raises(UsageError, match="are expected"):
            files.sha256(NAME)


def test_a_file_is_hashed_once_until_it_changes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / NAME
    path.write_bytes(IDX)
    os.utime(path, ns=(0, 10**9))
    hashed = []
    monkeypatch.setattr(files.hashlib, "sha256", lambda *a: hashed.append(a) or _sha256(*a))
    for _ in range(3):
        files.contents(path)
        files.sha256(NAME)
    assert len(hashed) == 1
    path.write_bytes(IDX[::-1])
    os.utime(path, ns=(0, 2 * 10**9))
    with pytest.raises(UsageError, match="are expected"):
        files.contents(path)


_sha256 = hashlib.sha256


@pytest.mark.parametrize("ending", [".gz", ".xz"])
def test_decompression_bomb_is_unpacked_only_to_the_published_size(folder: Path, ending: str) -> None:
    (folder / f"{NAME}{ending}").write_bytes(PACKINGS[ending](bytes(64 << 20)))
    tracemalloc.start()
    with pytest.raises(UsageError, match="more than 28 bytes come out of it"):
        files.read(NAME, "its place", files.parse_idx)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 << 20  # a dictionary of .xz has 8 MiB


def test_a_bomb_outside_the_catalogue_stops_at_the_general_limit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MOST", 1 << 20)
    (folder / "images.gz").write_bytes(gzip.compress(bytes(8 << 20)))
    with pytest.raises(UsageError, match="more than 1048576 bytes come out of it; get it again"):
        files.read("images", "its place", files.parse_idx)


def test_an_xz_header_cannot_ask_for_gigabytes(folder: Path) -> None:
    packed = bytearray(lzma.compress(IDX))
    block = slice(12, 12 + 4 * (packed[12] + 1))  # after the stream's header: length, flags, filter, .., checksum
    header = packed[block]
    assert header[2:4] == b"\x21\x01"  # LZMA2 with one byte of properties: the dictionary's size
    header[4] = 40  # 4 GiB - 1
    header[-4:] = struct.pack("<I", zlib.crc32(header[:-4]))
    packed[block] = header
    (folder / "images.xz").write_bytes(packed)
    with pytest.raises(UsageError, match="Memory usage limit"):
        files.read("images", "its place", files.parse_idx)


# --- IDX -------------------------------------------------------------------------------------------------------------


def test_what_is_no_idx_file_of_images_is_refused(folder: Path) -> None:
    (folder / "images").write_bytes(IDX[:10])
    with pytest.raises(UsageError, match=r"images \(from its place\) is no IDX file of images: it has 10 bytes"):
        files.read("images", "its place", files.parse_idx)


HEADERS = st.builds(
    lambda magic, sizes: struct.pack(">4I", magic, *sizes),
    st.sampled_from([0x803, 0x801, 0x803 << 8, 0]),
    st.tuples(*[st.one_of(st.integers(0, 3), st.sampled_from([2**31 - 1, 2**31, 2**32 - 1]))] * 3),
)


@given(st.one_of(st.binary(max_size=64), st.builds(lambda head, tail: head + tail, HEADERS, st.binary(max_size=30))))
@example(struct.pack(">4I", 0x803, 2**31, 28, 28))
@example(struct.pack(">4I", 0x803, 2**31, 2**31, 4) + bytes(16))
@example(IDX[:-1])
@example(IDX + b"x")
@example(struct.pack(">4i", 0x803, -1, 2, 3) + bytes(12))
def test_any_bytes_are_images_or_a_usage_error(content: bytes) -> None:
    try:
        images = files.parse_idx(content, "it")
    except UsageError:
        return
    assert images.dtype == torch.uint8
    assert images.numel() == len(content) - 16 > 0
    assert images.numpy().tobytes() == content[16:]


# --- the catalogue ---------------------------------------------------------------------------------------------------

GOOD = f"""
["some/file"]
sha256 = "{"0" * 64}"
size = 3
licence = "MIT"
urls = ["https://example.org/file"]
"""


def test_the_catalogue_is_whole_and_covers_what_experiments_read() -> None:
    from replicate.papers.ssm import tables
    from replicate.runs.paper import papers

    known = catalog.catalog()
    read = {name for paper in papers().values() for e in paper.experiments for name in e.files}
    read |= {source.file for source in tables.SOURCES.values()}
    assert "mnist/train-images-idx3-ubyte" in read
    assert read <= known.keys()
    assert all(entry.urls or entry.note for entry in known.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("size = 3", "sise = 3"), r"\[some/file\] unknown key 'sise', did you mean size\?; .*size is missing"),
        (("size = 3", "size = true"), "size is True; it must be a whole number of bytes"),
        (("size = 3", "size = 0"), "size is 0; it must be"),
        ((f"{'0' * 64}", f"{'0' * 63}"), r"\[some/file\] sha256 is '0+'; it must be 64 digits"),
        ((f"{'0' * 64}", f"{'A' * 64}"), "sha256 is 'A+'; it must be 64 digits"),
        (("https://", "http://"), r"\[some/file\] url 'http://example.org/file' is not of the form https://"),
        (("https://", "https://me@"), "is not of the form https://"),
        (("https://example.org", "file://"), "is not of the form https://"),
        (("org/file", "org/a file"), "is not of the form https://"),
        (('["https://example.org/file"]', '"https://example.org/file"'), "urls must be a list"),
        (('["https://example.org/file"]', "[]"), "needs either urls or a note"),
        (('"MIT"', '""'), "licence is missing"),
        (('"MIT"', "3"), "licence is 3; it must be one line of text"),
        (('"MIT"', '"MIT"\nmember = "a"'), "member is given, and none of its urls is an archive"),
        (("org/file", "org/file.zip"), "member is missing, .*archive_limit is missing"),
        (("some/file", "../file"), r"\[../file\] is no name of a file"),
        (("some/file", "/etc/file"), "is no name of a file"),
        (("some/file", "some/file.gz"), "is no name of a file"),
        (("[", "[["), "is no catalogue"),
        (('["some/file"]', '"other/file" = 3\n["some/file"]'), r"\[other/file\] is no table"),
    ],
)
def test_a_wrong_catalogue_is_one_line_that_names_the_entry(
    change: tuple[str, str], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "catalog.toml"
    path.write_text(GOOD)
    assert read_catalog(path)["some/file"].size == 3
    path.write_text(GOOD.replace(*change))
    with pytest.raises(UsageError, match=message) as told:
        read_catalog(path)
    assert "\n" not in str(told.value)


LINES = st.sampled_from(
    [*GOOD.strip().splitlines(), "urls = [3]", "size = [[", "note = 3", "[a.b]", "sha256 = {}", "é"]
)


@given(st.lists(st.one_of(LINES, st.text(max_size=20)), max_size=8), st.booleans())
@example(["size = " + "[" * 5000], False)
def test_any_text_is_a_catalogue_or_a_usage_error(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], latin: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "catalog.toml"
    path.write_bytes("\n".join(lines).encode("latin-1" if latin else "utf-8", "replace"))
    with contextlib.suppress(UsageError):
        assert all(entry.name == name for name, entry in read_catalog(path).items())
