"""Downloads of data files: resumed where they broke off, checked before they are put in place, https alone.

What arrives is kept as NAME.part, or NAME.gz.part and so on, until it is whole. It becomes the file,
by a rename, only if its uncompressed content has the catalogue's sha256.
"""

import contextlib
import fcntl
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from http.client import HTTPException
from itertools import chain
from pathlib import Path
from typing import IO, Any, BinaryIO
from urllib import request
from urllib.error import HTTPError, URLError

from replicate.data.archives import take
from replicate.data.catalog import ARCHIVES, Entry, ending_of
from replicate.data.files import ENDINGS, mismatch, pieces
from replicate.errors import FetchError

#: seconds without an answer or a byte
TIMEOUT = 30.0
#: connections to one address that break off with something gained, before the next address is tried
CONNECTIONS = 5
#: bytes read at once
PIECE = 1 << 16
#: bytes that a packing may add to content that does not pack
OVERHEAD = 1 << 16

Show = Callable[[int, int], None]
OpenUrl = Callable[[request.Request], Any]


class _Failed(Exception):
    """What went wrong at one address."""


class _BrokeOff(_Failed):
    """The same, where the next connection may go on from there."""


class _HttpsRedirects(request.HTTPRedirectHandler):
    """Redirects are followed to https alone."""

    def redirect_request(
        self, req: request.Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> request.Request | None:
        if not newurl.lower().startswith("https://"):
            raise URLError(f"it redirects to {newurl[:200]!r}, which is not https")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def https_only(asked: request.Request, *more: request.BaseHandler) -> Any:
    """Open a URL by https, with `more` handlers beside the usual ones; another scheme, here or later, is an error."""
    opener = request.OpenerDirector()  # build_opener would add http, ftp, file and data
    usual = (request.HTTPDefaultErrorHandler(), request.HTTPErrorProcessor(), request.HTTPSHandler())
    for handler in (*more, request.ProxyHandler(), _HttpsRedirects(), request.UnknownHandler(), *usual):
        opener.add_handler(handler)
    if asked.type != "https":
        raise URLError(f"{asked.full_url[:200]!r} is not https")
    return opener.open(asked, timeout=TIMEOUT)


def silent(done: int, total: int) -> None:
    """Show nothing."""


def fetch(
    entry: Entry, folder: Path, open_url: OpenUrl = https_only, show: Show = silent, also: Sequence[Entry] = ()
) -> Path:
    """Download a file of the catalogue, going on where an earlier call was interrupted.

    Args:
        entry: which.
        folder: the data folder.
        open_url: opens a request; tests give one that talks to this machine.
        show: called with the bytes that are there and the bytes in all (0 where the server does not say).
        also: other files that are wanted; those that lie in the same archive are taken out of it on the way.

    Returns:
        The file, whose content is the catalogue's. Other copies of it under the same name are removed.

    Raises:
        FetchError: no address has it, or it cannot be written.
    """
    target = folder / entry.name
    if not entry.urls:
        raise FetchError(f"{entry.name} has no public address. {entry.note} Put it at {target}.")
    reasons = []
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _alone(folder):
            for url in entry.urls:
                try:
                    beside = [other for other in also if url in other.urls and other != entry]
                    return _fetch_from(url, entry, target, open_url, show, beside)
                except _Failed as failed:
                    reasons.append(f"{url}: {failed}")
    except OSError as error:
        why = f"{error.strerror or error}; what has come is kept"
        raise FetchError(f"{entry.name} cannot be written to {folder}: {why}, mend that and call again.") from None
    step = f"Call again later, or get it elsewhere and put it at {target}."
    raise FetchError(f"{entry.name} could not be fetched. {'; '.join(reasons)}. {step}")


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Let one process at a time fetch into a folder; the lock goes with the process, however it ends."""
    with open(folder / ".fetch.lock", "a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FetchError(f"another process is fetching into {folder}; wait for it, then call again.") from None
        yield


def _fetch_from(url: str, entry: Entry, target: Path, open_url: OpenUrl, show: Show, beside: Sequence[Entry]) -> Path:
    """Download from one address and put in place.

    A beginning that is there already may be an older version's or another mirror's: where the whole is wrong, it is
    fetched once more from nothing.
    """
    ending = ending_of(url)
    part = target.with_name(f"{target.name}{ending}.part")
    limit = entry.archive_limit if ending in ARCHIVES else entry.size + OVERHEAD
    while True:
        begun = _size(part) > 0
        _download(url, part, limit, open_url, show)
        try:
            return _install(part, ending, entry, target, beside)
        except _Failed:
            part.unlink()
            if not begun:
                raise


def _install(part: Path, ending: str, entry: Entry, target: Path, beside: Sequence[Entry] = ()) -> Path:
    """Check what was downloaded and rename it, or its member and those `beside` it, into place."""
    if ending in ARCHIVES:
        ready, place = target.with_name(f"{target.name}.member.part"), target
        with open(ready, "wb") as handle:
            wrong = mismatch(_copied(take(part, ending, entry.member, entry.size), handle), entry)
            _to_disk(handle)
    else:
        ready, place = part, target.with_name(target.name + ending)
        wrong = mismatch(pieces(part, ending, entry.size), entry)
    if wrong:
        if ready != part:
            ready.unlink()
        raise _Failed(f"it sent something else: {wrong}")
    os.replace(ready, place)
    if ending in ARCHIVES:
        folder = target.parents[entry.name.count("/")]
        for other in beside:
            with contextlib.suppress(_Failed):  # whoever wants it is told when it is its turn
                (folder / other.name).parent.mkdir(parents=True, exist_ok=True)
                _install(part, ending, other, folder / other.name)
    left = [*ENDINGS, *(ending + ".part" for ending in (*ENDINGS, *ARCHIVES))]
    for copy in (target.with_name(target.name + name) for name in left):
        if copy != place:
            copy.unlink(missing_ok=True)
    return place


def _copied(content: Iterable[bytes], handle: BinaryIO) -> Iterator[bytes]:
    for piece in content:
        handle.write(piece)
        yield piece


def _to_disk(handle: BinaryIO) -> None:
    handle.flush()
    os.fsync(handle.fileno())


def _size(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0


def _download(url: str, part: Path, limit: int, open_url: OpenUrl, show: Show) -> None:
    """Fill the part, over as many connections as gain something."""
    for left in reversed(range(CONNECTIONS)):
        before = _size(part)
        try:
            return _receive(url, part, limit, open_url, show)
        except _BrokeOff:
            if not left or _size(part) == before:
                raise


def _receive(url: str, part: Path, limit: int, open_url: OpenUrl, show: Show) -> None:
    """Go on with the part over one connection; _BrokeOff if it ends early, _Failed if it is of no use."""
    have = _size(part)
    headers = {"User-Agent": "scoreboard-replicate", "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    try:
        response = open_url(request.Request(url, headers=headers))
    except HTTPError as error:
        error.close()
        if error.code == 416 and have:  # there is no more: the part is whole, or will be found wrong
            return
        raise _Failed(f"it answers HTTP {error.code}") from None
    except (OSError, HTTPException, ValueError) as error:
        raise _Failed(f"no connection ({getattr(error, 'reason', error)})") from None
    with response:
        start, total = _extent(response, have, part)
        if total > limit:
            raise _Failed(f"it announces {total} bytes, and at most {limit} are expected")
        body = _body(response)
        first = next(body, b"")
        if start == 0:  # before the part is opened: what it holds is kept if this is no data
            _refuse_page(response, first)
        position = _fill(part, start, chain((first,), body), limit, lambda done: show(done, total))
    if position < total:
        raise _BrokeOff(f"the connection ended after {position} of {total} bytes; they are kept")


def _fill(part: Path, start: int, body: Iterable[bytes], limit: int, show: Callable[[int], None]) -> int:
    """Write the part from `start` on; returns its size."""
    position = start
    with open(part, "r+b" if start else "wb") as handle:
        handle.seek(start)
        for piece in body:
            position += len(piece)
            if position > limit:
                handle.truncate(0)
                raise _Failed(f"it sends more than {limit} bytes")
            handle.write(piece)
            show(position)
        _to_disk(handle)
    return position


def _extent(response: Any, have: int, part: Path) -> tuple[int, int]:
    """Where the body begins, and the bytes in all (0 where the server does not say)."""
    length = response.headers.get("Content-Length", "")
    following = int(length) if re.fullmatch("[0-9]{1,18}", length) else 0
    if response.status == 200:  # also from a server that ignores Range: from the beginning
        return 0, following
    if response.status != 206 or not have:
        raise _Failed(f"it answers HTTP {response.status}")
    told = response.headers.get("Content-Range", "")
    found = re.fullmatch(r"bytes ([0-9]{1,18})-[0-9]{1,18}/([0-9]{1,18}|\*)", told.strip())
    if found is None or int(found[1]) != have:
        part.unlink()
        raise _BrokeOff(f"asked for the bytes from {have} on, it answers {told[:60]!r}")
    return have, have + following if found[2] == "*" else int(found[2])


def _body(response: Any) -> Iterator[bytes]:
    try:
        while piece := response.read(PIECE):
            yield piece
    except (OSError, HTTPException) as error:  # of the network alone: the disk's are raised outside
        raise _BrokeOff(f"the connection broke ({type(error).__name__}); what came is kept") from None


def _refuse_page(response: Any, beginning: bytes) -> None:
    """Refuse a page that reports an error with status 200."""
    kind = response.headers.get("Content-Type", "").lower()
    if "text/html" in kind or beginning.lstrip()[:9].lower().startswith((b"<!doctype", b"<html")):
        raise _Failed("it sends a web page (HTML), not the file")
