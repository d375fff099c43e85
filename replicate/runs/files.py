"""Files below REPLICATE_DATA that experiments read: found packed or not, hashed by their uncompressed content."""

from __future__ import annotations

import gzip
import hashlib
import lzma
import os
import zlib
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from replicate.errors import UsageError

ENDINGS = ("", ".gz", ".xz")


def find(name: str) -> Path | None:
    """A file of REPLICATE_DATA, as it is named or with .gz or .xz after it; None where there is none."""
    folder = os.environ.get("REPLICATE_DATA")
    paths = (Path(folder, name + end) for end in ENDINGS) if folder else ()
    return next((path for path in paths if path.is_file()), None)


def data_file(name: str, origin: str) -> Path:
    """The same, for who needs it.

    Args:
        name: below REPLICATE_DATA.
        origin: where it comes from, in words.

    Raises:
        UsageError: it is not there; one line with the file, where it comes from and REPLICATE_DATA.
    """
    found = find(name)
    if found is not None:
        return found
    folder = os.environ.get("REPLICATE_DATA")
    where = f"REPLICATE_DATA={folder}" if folder else "REPLICATE_DATA is not set"
    raise UsageError(f"{name} (or {name}.gz) is missing: {where}. It comes from {origin}; put it below REPLICATE_DATA.")


def contents(path: Path) -> bytes:
    """The uncompressed bytes of a file.

    Raises:
        UsageError: its packing is damaged.
    """
    try:
        raw = path.read_bytes()
        if path.suffix == ".gz":
            return gzip.decompress(raw)
        return lzma.decompress(raw) if path.suffix == ".xz" else raw
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise UsageError(f"{path} cannot be read ({error}); get it again") from None


def sha256(name: str) -> str:
    """sha256 of a file's uncompressed content; "" where it is absent."""
    path = find(name)
    return "" if path is None else _digest(path, path.stat().st_mtime_ns)


@cache
def _digest(path: Path, changed: int) -> str:
    return hashlib.sha256(contents(path)).hexdigest()


def read_idx(name: str, origin: str) -> Tensor:
    """The images of an IDX file as uint8, shape (n, rows * columns).

    Raises:
        UsageError: the file is missing or no IDX file of images.
    """
    path = data_file(name, origin)
    content = contents(path)
    if len(content) >= 16:
        magic, n, rows, columns = (int(v) for v in np.frombuffer(content[:16], dtype=">i4"))
        if magic == 0x803 and min(n, rows, columns) > 0 and len(content) == 16 + n * rows * columns:
            return torch.from_numpy(np.frombuffer(content[16:], dtype=np.uint8).reshape(n, -1).copy())
    raise UsageError(f"{path} is no IDX file of images; get it again from {origin}")
