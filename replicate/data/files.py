"""Files below REPLICATE_DATA that experiments read: found packed or not, checked against the catalogue, and hashed.

A file of the catalogue is used only if its uncompressed content is the published one, byte for byte. What comes from
disk is not trusted to be small: it is unpacked in pieces, and no further than it may be long.
"""

from __future__ import annotations

import hashlib
import io
import lzma
import os
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from gzip import GzipFile
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TypeVar

import numpy as np

from replicate.data.catalog import PACKED, Entry, catalog
from replicate.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
ENDINGS = ("", *PACKED)
#: bytes read or unpacked at once
PIECE = 1 << 18
#: bytes that a file outside the catalogue may have, unpacked
MOST = 2 << 30
#: bytes that unpacking .xz may take; its highest preset needs 65 MiB
XZ_MEMORY = 256 << 20


class Unreadable(ValueError):
    """A file's bytes cannot be unpacked; the message says why, without the file's name."""


def cache_folder() -> Path:
    """Return scoreboard-replicate in the user's cache directory.

    Raises:
        UsageError: the system does not say where that is; it is never below the current folder.
    """
    cache = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(cache):  # the standard ignores a relative one
        return Path(cache, "scoreboard-replicate")
    home = os.path.expanduser("~") if os.environ.get("HOME", "~") else ""
    if not os.path.isabs(home):
        raise UsageError("there is no cache folder, since HOME is not set to a folder; set HOME or REPLICATE_DATA.")
    return Path(home, ".cache", "scoreboard-replicate")


def data_folder() -> Path:
    """REPLICATE_DATA, or scoreboard-replicate in the user's cache directory; raises UsageError as `cache_folder`."""
    folder = os.environ.get("REPLICATE_DATA")
    return Path(folder) if folder else cache_folder()


def where() -> str:
    """Return the folder and how it was chosen, in words."""
    if os.environ.get("REPLICATE_DATA"):
        return f"REPLICATE_DATA={data_folder()}"
    try:
        data_folder()
    except UsageError as error:
        return f"REPLICATE_DATA is not set, and {str(error).removesuffix('.')}"
    return f"REPLICATE_DATA is not set, so it was looked for in {data_folder()}"


def find(name: str) -> Path | None:
    """Find a file of the data folder, as named or with .gz or .xz after it; None where there is none."""
    try:
        folder = data_folder()
    except UsageError:  # `where` says why
        return None
    paths = (folder / (name + ending) for ending in ENDINGS)
    return next((path for path in paths if path.is_file()), None)


def absent(names: Iterable[str]) -> str:
    """Name the first of these files that is missing, in words; "" where all are present."""
    missing = next((name for name in names if find(name) is None), "")
    return f"it reads {missing}, which is not there: {where()}" if missing else ""


def data_file(name: str, origin: str) -> Path:
    """Find a file below the data folder that comes from `origin`.

    Raises:
        UsageError: it is not there; one line with the file, where it comes from, the folder and the next step.
    """
    found = find(name)
    if found is not None:
        return found
    entry = catalog().get(name)
    step = f"`replicate data fetch {name}` gets it" if entry and entry.urls else "put it into that folder"
    raise UsageError(f"{name} (or {name}.gz) is missing: {where()}. It comes from {origin}; {step}.")


def expected(path: Path) -> Entry | None:
    """Return the catalogue's entry of a file of the data folder; None for a file that it does not know."""
    name = os.path.relpath(path, data_folder()).replace(os.sep, "/")
    known = catalog()
    return next((known[name.removesuffix(e)] for e in ENDINGS if name.removesuffix(e) in known), None)


def pieces(path: Path, ending: str, limit: int) -> Iterator[bytes]:
    """Read the uncompressed bytes of a file, piece by piece.

    Args:
        ending: how it is packed: "", ".gz" or ".xz".
        limit: bytes that may come out.

    Raises:
        Unreadable: it cannot be read or unpacked, or more than `limit` bytes come out.
    """
    total = 0
    try:
        with open(path, "rb") as raw:
            for piece in _unpacked(raw, ending):
                total += len(piece)
                if total > limit:
                    raise Unreadable(f"more than {limit} bytes come out of it")
                yield piece
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise Unreadable(f"it cannot be read ({error})") from None


def _unpacked(raw: BinaryIO, ending: str) -> Iterator[bytes]:
    if ending == ".xz":
        yield from _unpacked_xz(raw)
        return
    stream = GzipFile(fileobj=raw) if ending == ".gz" else raw
    while piece := stream.read(PIECE):
        yield piece


def _unpacked_xz(raw: BinaryIO) -> Iterator[bytes]:
    """One stream of .xz; lzma.open has no limit to the memory that a hostile header can ask for."""
    decoder = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=XZ_MEMORY)
    while not decoder.eof:
        packed = raw.read(PIECE) if decoder.needs_input else b""
        if decoder.needs_input and not packed:
            raise EOFError("it ends before its end marker")
        yield decoder.decompress(packed, PIECE)
    if decoder.unused_data or raw.read(1):
        raise lzma.LZMAError("something follows its end marker")


def mismatch(content: Iterable[bytes], entry: Entry) -> str:
    """How content differs from what the catalogue says of an entry, in words; "" where it does not."""
    digest, size = hashlib.sha256(), 0
    try:
        for piece in content:
            digest.update(piece)
            size += len(piece)
    except Unreadable as error:
        return str(error)
    return _difference(digest.hexdigest(), size, entry)


def _difference(sha256: str, size: int, entry: Entry) -> str:
    if (sha256, size) == (entry.sha256, entry.size):
        return ""
    wanted = f"{entry.size} bytes with sha256 {entry.sha256[:12]}.."
    return f"it has {size} bytes with sha256 {sha256[:12]}.., and {wanted} are expected"


def damage(path: Path, entry: Entry) -> str:
    """Return what is wrong with a file of the catalogue, or ""; the file is read whole, every time."""
    return mismatch(pieces(path, _packing(path), entry.size), entry)


def _packing(path: Path) -> str:
    return path.suffix if path.suffix in PACKED else ""


_State = tuple[Path, int, int]
#: sha256 of the content of files that were read and found right, by path, time of last change and size on disk
_seen: dict[_State, str] = {}


def _state(path: Path) -> _State:
    try:
        status = path.stat()
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror})") from None
    return path, status.st_mtime_ns, status.st_size


def contents(path: Path) -> bytes:
    """Read the uncompressed bytes of a file; those of a file of the catalogue are checked.

    They are hashed once a process, as long as the file does not change.

    Raises:
        UsageError: it cannot be read or unpacked, is too large, or is not what the catalogue says.
    """
    return _checked(path)[0]


def _checked(path: Path) -> tuple[bytes, str]:
    """Read the uncompressed bytes of a file, with their sha256."""
    entry, state, whole = expected(path), _state(path), io.BytesIO()
    try:
        for piece in pieces(path, _packing(path), MOST if entry is None else entry.size):
            whole.write(piece)
        content = whole.getvalue()
        if state not in _seen:
            digest = hashlib.sha256(content).hexdigest()
            if entry is not None and (wrong := _difference(digest, len(content), entry)):
                raise Unreadable(wrong)
            _seen[state] = digest
    except Unreadable as error:
        raise UsageError(f"{path} cannot be used: {error}; {_again(entry)}") from None
    return content, _seen[state]


def _again(entry: Entry | None) -> str:
    if entry is None:
        return "get it again."
    return f"`replicate data fetch {entry.name}` gets it again." if entry.urls else f"get it again. {entry.note}"


def sha256(name: str) -> str:
    """sha256 of a file's uncompressed content; "" where it is absent; raises UsageError as in `contents`."""
    path = find(name)
    if path is None:
        return ""
    return _seen.get(_state(path)) or _checked(path)[1]


def read(name: str, origin: str, parse: Callable[..., T]) -> T:
    """Return parse(content, what=) of a file below the data folder, with its name and origin for messages.

    Raises:
        UsageError: the file is missing or damaged, or `parse` refuses it.
    """
    path = data_file(name, origin)
    return parse(contents(path), what=f"{path} (from {origin})")


def parse_idx(content: bytes, what: str) -> Tensor:
    """Read the images of an IDX file's bytes as uint8, shape (n, rows * columns); `what` is its name for messages.

    Raises:
        UsageError: these are not the bytes of an IDX file of images.
    """
    if len(content) < 16:
        raise UsageError(f"{what} is no IDX file of images: it has {len(content)} bytes, its header alone 16.")
    magic, n, rows, columns = struct.unpack(">4I", content[:16])
    if magic != 0x803 or not n * rows * columns:
        raise UsageError(f"{what} is no IDX file of images: its header is {content[:16].hex()}.")
    if n * rows * columns != len(content) - 16:
        header = f"{n} images of {rows} x {columns} pixels"
        raise UsageError(f"{what} is no IDX file of images: {header} are announced, {len(content) - 16} bytes follow.")
    import torch  # here alone: the command looks at files before it has use for torch

    pixels = np.frombuffer(content, dtype=np.uint8, offset=16).reshape(n, rows * columns)
    return torch.from_numpy(pixels.copy())  # frombuffer's is read-only


def parse_idx_labels(content: bytes, what: str) -> Tensor:
    """Read the labels of an IDX file as int64, shape (n,); arguments and errors as in `parse_idx`."""
    magic, n = struct.unpack(">2I", content[:8]) if len(content) > 8 else (0, 0)
    if magic != 0x801 or n != len(content) - 8:
        raise UsageError(f"{what} is no IDX file of labels: its header is {content[:8].hex()}, {len(content)} bytes.")
    import torch  # as above

    return torch.from_numpy(np.frombuffer(content, dtype=np.uint8, offset=8).astype(np.int64))
