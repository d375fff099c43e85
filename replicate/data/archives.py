"""Read one named member of a downloaded zip or tar. No file is written under a name taken from the archive.

The content goes to whoever asked, piece by piece; an archive with a member whose path climbs out of it is refused
whole, since no honest packer made it.
"""

import io
import stat
import tarfile
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path, PureWindowsPath
from typing import IO, cast

from replicate.data.files import MOST, PIECE, Unreadable, pieces

#: members of a tar that are looked at: each costs memory, and hostile ones pack well
MEMBERS = 1000


def take(archive: Path, ending: str, member: str, limit: int) -> Iterator[bytes]:
    """Read the content of one member, of at most `limit` bytes, piece by piece; `ending` is one of catalog.ARCHIVES.

    Raises:
        Unreadable: no such member, none that is a plain file of at most `limit` bytes, a path that leads out of the
            archive, or the archive is damaged.
    """
    try:
        yield from _from_zip(archive, member, limit) if ending == ".zip" else _from_tar(archive, ending, member, limit)
    except Unreadable:
        raise
    except Exception as error:  # the library's parsers raise whatever hostile bytes lead them to
        raise Unreadable(f"it is no {ending} archive that can be read ({error})") from None


def _inside(name: str) -> None:
    """Refuse a path that is absolute or climbs, by the rules of any system."""
    path = PureWindowsPath(name)  # which takes both kinds of slashes, and drives
    if path.anchor or ".." in path.parts:
        raise Unreadable(f"it holds a path that leads out of it, {name[:100]!r}")


def _from_zip(archive: Path, member: str, limit: int) -> Iterator[bytes]:
    with zipfile.ZipFile(archive) as opened:
        for info in opened.infolist():
            _inside(info.filename)
        if member not in opened.NameToInfo:
            raise Unreadable(f"it has no member {member}")
        info = opened.getinfo(member)
        kind = stat.S_IFMT(info.external_attr >> 16)
        if info.is_dir() or kind not in (0, stat.S_IFREG):
            raise Unreadable(f"its member {member} is no plain file")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise Unreadable(f"its member {member} is packed in an unusual way")
        _fits(member, info.file_size, limit)
        with opened.open(info) as handle:
            yield from _read(handle, member, limit)


def _from_tar(archive: Path, ending: str, member: str, limit: int) -> Iterator[bytes]:
    packing = {".tar": "", ".tar.gz": ".gz", ".tgz": ".gz", ".tar.xz": ".xz"}[ending]
    stream = cast(IO[bytes], _Forward(pieces(archive, packing, MOST)))
    with tarfile.open(fileobj=stream, mode="r:") as opened:
        for passed, info in enumerate(opened):
            if passed == MEMBERS:
                raise Unreadable(f"it has no member {member} among its first {MEMBERS}")
            _inside(info.name)
            if info.name != member:
                continue
            if not info.isreg():
                raise Unreadable(f"its member {member} is no plain file")
            # it raises where a path, link or device would reach beyond a folder; ours is never written to
            tarfile.data_filter(info, str(archive.parent.resolve()))
            _fits(member, info.size, limit)
            handle = opened.extractfile(info)
            assert handle is not None  # it is a plain file
            yield from _read(handle, member, limit)
            return
    raise Unreadable(f"it has no member {member}")


def _fits(member: str, size: int, limit: int) -> None:
    if size > limit:
        raise Unreadable(f"its member {member} has {size} bytes, {limit} are expected")


def _read(handle: IO[bytes], member: str, limit: int) -> Iterator[bytes]:
    total = 0
    while piece := handle.read(PIECE):
        total += len(piece)
        _fits(member, total, limit)
        yield piece


class _Forward(io.RawIOBase):
    """Pieces as a file that is read forward alone, and never much of it at once.

    tarfile believes a header that announces a name of 8 GiB and reads it into memory; here it cannot.
    """

    def __init__(self, source: Iterable[bytes]) -> None:
        self._source, self._ready, self._position = iter(source), bytearray(), 0

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1, /) -> bytes:
        if not 0 <= size <= 2 * PIECE:
            raise Unreadable("one of its headers is too large")
        while len(self._ready) < size and (piece := next(self._source, None)) is not None:
            self._ready += piece
        out = bytes(self._ready[:size])
        del self._ready[:size]
        self._position += len(out)
        return out

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        if whence != io.SEEK_SET or offset < self._position:
            raise Unreadable("its members are out of order")
        while self._position < offset and self.read(min(PIECE, offset - self._position)):
            pass
        return self._position

    def tell(self) -> int:
        return self._position
