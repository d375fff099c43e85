"""Downloads from a server on this machine that breaks off, lies or climbs; archives that do; and `replicate data`."""

from __future__ import annotations

import contextlib
import email.message
import functools
import gzip
import hashlib
import io
import json
import lzma
import re
import tarfile
import threading
import urllib.request
import urllib.response
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

from replicate.cli import data as cli
from replicate.data import archives, files
from replicate.data.archives import take
from replicate.data.catalog import Entry
from replicate.data.fetch import fetch, https_only
from replicate.data.files import Unreadable
from replicate.errors import FetchError, UsageError

CONTENT = bytes(i * i % 251 for i in range(300_000))
NAME = "some/file"


# --- a server with faults --------------------------------------------------------------------------------------------


class Site:
    """What a server gives, how it fails, and what it was asked.

    Attributes:
        files: content by path.
        faults: what goes wrong at a path, one a request, the last for ever; "" for nothing.
        asked: (path, Range header) of every request.
    """

    def __init__(self, port: int) -> None:
        self.base = f"http://127.0.0.1:{port}"
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, list[str]] = {}
        self.asked: list[tuple[str, str]] = []
        self.closing = threading.Event()

    def put(self, path: str, content: bytes, *faults: str) -> str:
        """Serve content at a path; returns the URL."""
        self.files[path], self.faults[path] = content, list(faults) or [""]
        return self.base + path


class Handler(BaseHTTPRequestHandler):
    site: Site

    def do_GET(self) -> None:
        asked = self.headers.get("Range", "")
        self.site.asked.append((self.path, asked))
        faults = self.site.faults[self.path]
        fault = faults.pop(0) if len(faults) > 1 else faults[0]
        body = self.site.files[self.path]
        if fault.isdigit():
            self.send_error(int(fault))
        elif fault == "silent":
            self.site.closing.wait(10)
        elif fault.startswith("html"):
            kind = {"html": "text/html; charset=utf-8", "html undeclared": "application/octet-stream"}[fault]
            page = b"\n <!DOCTYPE html><title>Sign in</title>"
            self.answer(200, page, {"Content-Length": str(len(page)), "Content-Type": kind})
        elif fault == "endless":
            self.answer(200, b"", {})
            while not self.site.closing.is_set():
                self.wfile.write(bytes(1 << 16))
        else:
            self.give(body, fault, asked)

    def give(self, body: bytes, fault: str, asked: str) -> None:
        start = int(re.fullmatch("bytes=([0-9]+)-", asked)[1]) if asked and fault != "ignores range" else 0  # type: ignore[index]
        if start and start >= len(body):
            self.send_error(416)
            return
        rest = body[start:]
        headers = {"Content-Length": str(len(rest))}
        if fault == "no length":
            headers = {}
        if fault == "short length":
            rest = rest[: len(rest) // 2]
            headers = {"Content-Length": str(len(rest))}
        if start:
            told = 0 if fault == "wrong range" else start
            headers["Content-Range"] = f"bytes {told}-{len(body) - 1}/{len(body)}"
        self.answer(206 if start else 200, rest[: len(rest) // 2] if fault == "cut" else rest, headers)

    def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *words: Any) -> None:
        """Quiet."""


class Server(ThreadingHTTPServer):
    def handle_error(self, *of: Any) -> None:
        """A client that hangs up is no error here."""


@pytest.fixture
def site() -> Iterator[Site]:
    handler = type("SiteHandler", (Handler,), {})
    server = Server(("127.0.0.1", 0), handler)
    handler.site = Site(server.server_port)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield handler.site
    handler.site.closing.set()
    server.shutdown()
    thread.join()
    server.server_close()


def plain(request: urllib.request.Request, timeout: float = 10) -> Any:
    """Opens what this machine serves."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    return opener.open(request, timeout=timeout)


def entry(*urls: str, content: bytes = CONTENT, **more: Any) -> Entry:
    return Entry(NAME, hashlib.sha256(content).hexdigest(), len(content), "none", urls, **more)


get = functools.partial(fetch, open_url=plain)


def below(folder: Path) -> set[str]:
    """Everything in a folder but the lock."""
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}
    return found - {".fetch.lock"}


# --- downloads -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ending", "pack"), [("", bytes), (".gz", gzip.compress), (".xz", lzma.compress)])
def test_a_file_arrives_as_it_is_packed_and_is_found(
    site: Site, tmp_path: Path, ending: str, pack: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[tuple[int, int]] = []
    packed = pack(CONTENT)
    url = site.put("/file" + ending, packed)
    path = get(entry(url), tmp_path, show=lambda done, total: shown.append((done, total)))
    assert path == tmp_path / (NAME + ending)
    assert below(tmp_path) == {NAME + ending}
    assert shown[-1] == (len(packed), len(packed))
    monkeypatch.setenv("REPLICATE_DATA", str(tmp_path))
    assert files.contents(path) == CONTENT
    assert files.find(NAME) == path


def test_interrupted_download_is_resumed_within_one_call(site: Site, tmp_path: Path) -> None:
    url = site.put("/file", CONTENT, "cut", "cut", "")
    assert get(entry(url), tmp_path).read_bytes() == CONTENT
    assert [asked for _, asked in site.asked] == ["", "bytes=150000-", "bytes=225000-"]


def test_download_stopped_by_the_user_is_resumed_by_the_next_call(site: Site, tmp_path: Path) -> None:
    url = site.put("/file", CONTENT)

    def stop(done: int, total: int) -> None:
        if done > 100_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        get(entry(url), tmp_path, show=stop)
    kept = (tmp_path / f"{NAME}.part").stat().st_size
    assert 0 < kept < len(CONTENT)
    assert below(tmp_path) == {f"{NAME}.part"}
    assert get(entry(url), tmp_path).read_bytes() == CONTENT
    assert site.asked[-1] == ("/file", f"bytes={kept}-")
    assert below(tmp_path) == {NAME}


def test_a_connection_that_is_always_cut_keeps_what_came_and_says_so(site: Site, tmp_path: Path) -> None:
    url = site.put("/file", CONTENT, "cut")
    with pytest.raises(FetchError, match=r"ended after 290625 of 300000 bytes; they are kept") as told:
        get(entry(url), tmp_path)
    assert "\n" not in str(told.value)
    assert (tmp_path / f"{NAME}.part").read_bytes() == CONTENT[:290625]


def test_another_mirror_goes_on_where_the_first_broke_off(site: Site, tmp_path: Path) -> None:
    first, second = site.put("/a", CONTENT, "cut", "500"), site.put("/b", CONTENT)
    assert get(entry(first, second), tmp_path).read_bytes() == CONTENT
    assert site.asked == [("/a", ""), ("/a", "bytes=150000-"), ("/b", "bytes=150000-")]


@pytest.mark.parametrize("beginning", [b"of an older version", bytes(400_000), CONTENT + b"x"])
def test_a_beginning_that_does_not_fit_is_dropped_and_fetched_once_more(
    site: Site, tmp_path: Path, beginning: bytes
) -> None:
    (tmp_path / "some").mkdir()
    (tmp_path / f"{NAME}.part").write_bytes(beginning)
    assert get(entry(site.put("/file", CONTENT)), tmp_path).read_bytes() == CONTENT


def test_a_part_that_was_whole_when_the_process_died_is_used(site: Site, tmp_path: Path) -> None:
    (tmp_path / "some").mkdir()
    (tmp_path / f"{NAME}.part").write_bytes(CONTENT)
    assert get(entry(site.put("/file", CONTENT)), tmp_path).read_bytes() == CONTENT
    assert site.asked == [("/file", "bytes=300000-")]


@pytest.mark.parametrize("fault", ["ignores range", "wrong range", "no length"])
def test_a_server_with_odd_ranges_or_lengths_still_gives_the_right_bytes(
    site: Site, tmp_path: Path, fault: str
) -> None:
    (tmp_path / "some").mkdir()
    (tmp_path / f"{NAME}.part").write_bytes(CONTENT[:1000])
    assert get(entry(site.put("/file", CONTENT, fault)), tmp_path).read_bytes() == CONTENT
    if fault == "wrong range":
        assert [asked for _, asked in site.asked] == ["bytes=1000-", ""]


def test_wrong_checksum_is_refused_with_both_values_and_the_next_mirror_is_tried(site: Site, tmp_path: Path) -> None:
    other = CONTENT[:-1] + b"x"
    wrong, right = site.put("/wrong", other), site.put("/right", CONTENT)
    assert get(entry(wrong, right), tmp_path).read_bytes() == CONTENT
    (tmp_path / NAME).unlink()
    with pytest.raises(FetchError) as told:
        get(entry(wrong), tmp_path)
    for digest in (hashlib.sha256(other).hexdigest(), hashlib.sha256(CONTENT).hexdigest()):
        assert digest[:12] in str(told.value)
    assert below(tmp_path) == set()


@pytest.mark.parametrize("fault", ["html", "html undeclared"])
def test_server_that_sends_html_is_refused_and_the_old_file_is_kept(site: Site, tmp_path: Path, fault: str) -> None:
    url = site.put("/file", CONTENT, fault)
    with pytest.raises(FetchError, match="it sends a web page"):
        get(entry(url), tmp_path)
    assert below(tmp_path) == set()
    (tmp_path / f"{NAME}.part").write_bytes(CONTENT[:1000])
    with pytest.raises(FetchError, match="it sends a web page"):
        get(entry(url), tmp_path)
    assert (tmp_path / f"{NAME}.part").read_bytes() == CONTENT[:1000]


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("404", "it answers HTTP 404"),
        ("500", "it answers HTTP 500"),
        ("204", "it answers HTTP 204"),
        ("endless", "it sends more than 365536 bytes"),
        ("short length", "it sent something else: it has 150000 bytes with sha256"),
        ("silent", "no connection .timed out"),
    ],
)
def test_every_mirrors_reason_stands_in_one_message(site: Site, tmp_path: Path, fault: str, reason: str) -> None:
    urls = [site.put("/a", CONTENT, fault), site.put("/b", CONTENT, "404")]
    with pytest.raises(FetchError, match=f"/a: {reason}.*; .*/b: it answers HTTP 404") as told:
        fetch(entry(*urls), tmp_path, functools.partial(plain, timeout=0.3 if fault == "silent" else 10))
    message = str(told.value)
    assert "\n" not in message
    assert message.endswith(f"put it at {tmp_path / NAME}.")
    assert not any((tmp_path / name).stat().st_size for name in below(tmp_path))


def test_a_file_announced_too_large_is_not_downloaded(site: Site, tmp_path: Path) -> None:
    with pytest.raises(FetchError, match="it announces 300000 bytes, and at most 65546 are expected"):
        get(entry(site.put("/file", CONTENT), content=bytes(10)), tmp_path)
    assert below(tmp_path) == set()


def test_a_bomb_is_refused_and_removed(site: Site, tmp_path: Path) -> None:
    url = site.put("/file.gz", gzip.compress(bytes(30 << 20)))
    with pytest.raises(FetchError, match="more than 300000 bytes come out of it"):
        get(entry(url), tmp_path)
    assert below(tmp_path) == set()


def test_a_fetched_file_replaces_a_damaged_one_however_it_was_packed(site: Site, tmp_path: Path) -> None:
    (tmp_path / "some").mkdir()
    for ending in ("", ".xz", ".xz.part"):
        (tmp_path / (NAME + ending)).write_bytes(b"damaged")
    get(entry(site.put("/file.gz", gzip.compress(CONTENT))), tmp_path)
    assert below(tmp_path) == {f"{NAME}.gz"}


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "some").write_bytes(b"a file where a folder should be")
    with pytest.raises(FetchError, match=f"some/file cannot be written to {tmp_path}: .*mend that and call again"):
        get(entry("https://example.org/file"), tmp_path)


def test_a_full_disk_is_told_from_a_broken_connection(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("replicate.data.fetch._to_disk", full)
    with pytest.raises(FetchError, match=r"cannot be written .* No space left on device; what has come is kept"):
        get(entry(site.put("/file", CONTENT)), tmp_path)
    assert len(site.asked) == 1


def test_a_second_fetch_at_the_same_time_says_so(site: Site, tmp_path: Path) -> None:
    url = site.put("/file", CONTENT)
    refused = []

    def meanwhile(done: int, total: int) -> None:
        with pytest.raises(FetchError, match="another process is fetching into") as told:
            get(entry(url), tmp_path)
        refused.append(told)

    assert get(entry(url), tmp_path, show=meanwhile).read_bytes() == CONTENT
    assert refused


def test_a_file_without_an_address_says_where_it_comes_from(tmp_path: Path) -> None:
    with pytest.raises(FetchError, match=f"no public address. It was at X. Put it at {tmp_path / NAME}"):
        fetch(entry(note="It was at X."), tmp_path)


# --- https alone -----------------------------------------------------------------------------------------------------


def test_without_https_nothing_is_asked(site: Site, tmp_path: Path) -> None:
    with pytest.raises(FetchError, match=r"no connection .*is not https"):
        fetch(entry(site.put("/file", CONTENT)), tmp_path)
    with pytest.raises(FetchError, match="is not https"):
        fetch(entry(Path(__file__).as_uri()), tmp_path)
    assert site.asked == []


class Redirecting(urllib.request.BaseHandler):
    """An https server that sends on."""

    def __init__(self, to: str) -> None:
        self.to = to

    def https_open(self, request: urllib.request.Request) -> Any:
        headers = email.message.Message()
        last = request.full_url.endswith("/last")
        if not last:
            headers["Location"] = self.to
        response = urllib.response.addinfourl(io.BytesIO(CONTENT), headers, request.full_url, 200 if last else 302)
        response.msg = "OK"  # type: ignore[attr-defined]
        return response


def test_redirects_are_followed_only_to_https(site: Site, tmp_path: Path) -> None:
    def opened(to: str) -> Any:
        return lambda request: https_only(request, Redirecting(to))

    for target in (site.put("/file", CONTENT), "ftp://example.org/file", "file:///etc/hostname"):
        with pytest.raises(FetchError, match=r"it redirects to|it answers HTTP 302"):
            fetch(entry("https://example.org/first"), tmp_path, opened(target))
    assert site.asked == []
    assert below(tmp_path) == set()
    path = fetch(entry("https://example.org/first"), tmp_path, opened("https://example.org/last"))
    assert path.read_bytes() == CONTENT


# --- archives --------------------------------------------------------------------------------------------------------

Members = list[tuple[tarfile.TarInfo | str, bytes]]


def tar(members: Members, mode: str = "w:gz") -> bytes:
    """A tar of members, each by name or by its whole header."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as opened:  # type: ignore[call-overload]
        for member, content in members:
            info = tarfile.TarInfo(member) if isinstance(member, str) else member
            info.size = len(content)
            opened.addfile(info, io.BytesIO(content))
    return out.getvalue()


def zipped(members: list[tuple[zipfile.ZipInfo | str, bytes]]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as opened:
        for member, content in members:
            opened.writestr(member, content)
    return out.getvalue()


def special(kind: bytes, name: str = "in/it", linkname: str = "../../outside") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, linkname
    return info


def symlink() -> zipfile.ZipInfo:
    info = zipfile.ZipInfo("in/it")
    info.external_attr = 0o120777 << 16
    return info


GOOD = [("other", b"other"), ("in/it", CONTENT)]
CLIMBING = ["../evil", "in/../../evil", "/tmp/evil", "..\\evil", "C:\\evil", "\\\\host\\evil"]


@pytest.mark.parametrize(
    ("ending", "packed"),
    [
        (".zip", zipped(GOOD)),
        (".tar", tar(GOOD, "w:")),
        (".tar.gz", tar(GOOD)),
        (".tgz", tar(GOOD)),
        (".tar.xz", tar(GOOD, "w:xz")),
    ],
)
def test_one_member_is_taken_out_of_an_archive(site: Site, tmp_path: Path, ending: str, packed: bytes) -> None:
    url = site.put("/archive" + ending, packed, "cut", "")
    wanted = entry(url, member="in/it", archive_limit=10**6)
    assert get(wanted, tmp_path).read_bytes() == CONTENT
    assert below(tmp_path) == {NAME}


def test_what_else_is_wanted_of_an_archive_is_taken_out_on_the_way(site: Site, tmp_path: Path) -> None:
    url = site.put("/archive.tar.gz", tar(GOOD))
    wanted = entry(url, member="in/it", archive_limit=10**6)
    digest = hashlib.sha256(b"other").hexdigest()
    other = replace(wanted, name="else/other", sha256=digest, size=5, member="other")
    wrong = replace(other, name="else/wrong", sha256="0" * 64)
    elsewhere = replace(other, name="else/where", urls=(site.base + "/another.tar.gz",))
    get(wanted, tmp_path, also=[wanted, other, wrong, elsewhere])
    assert len(site.asked) == 1
    assert below(tmp_path) == {NAME, "else/other"}
    assert (tmp_path / "else/other").read_bytes() == b"other"
    with pytest.raises(FetchError, match="it sent something else"):
        get(wrong, tmp_path)


HOSTILE = {
    **{f"zip climbing {name}": (".zip", zipped([(name, b"evil"), *GOOD]), "leads out") for name in CLIMBING[:4]},
    **{f"tar climbing {name}": (".tar.gz", tar([(name, b"evil"), *GOOD]), "leads out") for name in CLIMBING},
    "zip symlink": (".zip", zipped([(symlink(), b"../../outside")]), "is no plain file"),
    "tar symlink": (".tar.gz", tar([(special(tarfile.SYMTYPE), b"")]), "is no plain file"),
    "tar hard link": (".tar.gz", tar([(special(tarfile.LNKTYPE), b"")]), "is no plain file"),
    "tar device": (".tar.gz", tar([(special(tarfile.CHRTYPE), b"")]), "is no plain file"),
    "tar fifo": (".tar.gz", tar([(special(tarfile.FIFOTYPE), b"")]), "is no plain file"),
    "tar folder": (".tar.gz", tar([(special(tarfile.DIRTYPE), b"")]), "is no plain file"),
    "zip bomb": (".zip", zipped([("in/it", bytes(30 << 20))]), "300000 are expected"),
    "tar bomb": (".tar.gz", tar([("in/it", bytes(30 << 20))]), "300000 are expected"),
    "tar of many": (".tar.gz", tar([(str(i), b"") for i in range(archives.MEMBERS + 1)]), "among its first 1000"),
    "zip without it": (".zip", zipped([("other", b"")]), "has no member in/it"),
    "tar without it": (".tar.gz", tar([("other", b"")]), "has no member in/it"),
    "no zip": (".zip", b"PK\x03\x04 and no more", "is no .zip archive"),
    "no tar": (".tar.gz", gzip.compress(b"no tar" * 200), "is no .tar.gz archive"),
    "tar of other bytes": (".tar.gz", tar([("in/it", CONTENT[::-1])]), "are expected"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_archive_is_refused_and_nothing_is_written_outside(site: Site, tmp_path: Path, case: str) -> None:
    ending, packed, reason = HOSTILE[case]
    folder = tmp_path / "deep" / "down" / "data"
    url = site.put("/archive" + ending, packed)
    with pytest.raises(FetchError, match=reason) as told:
        get(entry(url, member="in/it", archive_limit=10**6), folder)
    assert "\n" not in str(told.value)
    assert below(tmp_path) == {"deep/down/data/.fetch.lock"}
    assert not Path("/tmp/evil").exists()


def test_a_zip_whose_header_lies_about_the_size_is_cut_short(tmp_path: Path) -> None:
    packed = bytearray(zipped([("in/it", bytes(1 << 20))]))
    size = (1 << 20).to_bytes(4, "little")
    assert packed.count(size) == 2  # before the member and in the directory
    path = tmp_path / "a.zip"
    path.write_bytes(packed.replace(size, (10).to_bytes(4, "little")))
    got: list[bytes] = []
    with pytest.raises(Unreadable, match=r"is no \.zip archive that can be read"):
        got.extend(take(path, ".zip", "in/it", 10))
    assert sum(map(len, got)) <= 10


def test_a_tar_header_that_announces_a_name_of_gigabytes_is_refused(tmp_path: Path) -> None:
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 4 << 30
    path = tmp_path / "a.tar"
    path.write_bytes(header.tobuf(tarfile.GNU_FORMAT) + bytes(2048))
    with pytest.raises(Unreadable, match="headers is too large"):
        list(take(path, ".tar", "in/it", 10))


ARCHIVED = [(".zip", zipped(GOOD[:1])), (".tar", tar(GOOD[:1], "w:")), (".tar.gz", tar(GOOD[:1]))]


@given(
    st.sampled_from(ARCHIVED),
    st.lists(st.tuples(st.integers(0, 20_000), st.integers(0, 255)), max_size=4),
    st.integers(0, 20_000),
)
def test_any_archive_gives_the_member_or_a_reason(
    tmp_path_factory: pytest.TempPathFactory,
    archive: tuple[str, bytes],
    changes: list[tuple[int, int]],
    cut: int,
) -> None:
    ending, packed = archive[0], bytearray(archive[1])
    for at, value in changes:
        packed[at % len(packed)] = value
    path = tmp_path_factory.getbasetemp() / "archive"
    path.write_bytes(packed[: len(packed) - cut % len(packed)])
    with contextlib.suppress(Unreadable):
        assert len(b"".join(take(path, ending, "other", 5))) <= 5


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def call(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """`replicate data WORDS` on a catalogue of three files; gives (exit code, output)."""
    names = ("one/a", "one/b", "two/c")
    known = {
        name: Entry(name, hashlib.sha256(CONTENT).hexdigest(), len(CONTENT), "MIT; somebody", (f"{site.base}/{name}",))
        for name in names
    }
    known["two/gone"] = Entry("two/gone", "0" * 64, 1, "none stated", note="It was somewhere.")
    for name in names:
        site.put(f"/{name}", CONTENT)
    monkeypatch.setattr("replicate.data.catalog.catalog", lambda: known)
    monkeypatch.setattr("replicate.data.fetch.fetch", get)
    monkeypatch.setenv("REPLICATE_DATA", str(tmp_path))
    app = typer.Typer()
    app.add_typer(cli.data_app, name="data")
    app.command("other")(lambda: None)

    def run(*words: str) -> tuple[int, str]:
        done = CliRunner().invoke(app, ["data", *words])
        if isinstance(done.exception, UsageError):
            return 2, str(done.exception)
        return done.exit_code, done.output

    return run


def statuses(call: Any) -> dict[str, str]:
    code, out = call("files", "--json")
    assert code == 0
    return {name: row["status"] for name, row in json.loads(out).items()}


def test_data_fetch_gets_what_is_not_there_and_files_shows_it(call: Any, site: Site, tmp_path: Path) -> None:
    assert set(statuses(call).values()) == {"absent"}
    code, out = call("fetch", "one")
    assert code == 0
    assert f"one/a is fetched: {tmp_path / 'one' / 'a'}" in out
    assert list(statuses(call).values()) == ["present", "present", "absent", "absent"]
    (tmp_path / "one" / "a").write_bytes(b"damaged")
    assert statuses(call)["one/a"] == "damaged"
    before = len(site.asked)
    code, out = call("fetch")
    assert code == 0
    assert [path for path, _ in site.asked[before:]] == ["/one/a", "/two/c"]
    assert "one/a is damaged: it has 7 bytes" in out
    assert f"one/b is present: {tmp_path / 'one' / 'b'}" in out
    assert "no download address for: two/gone" in out
    assert list(statuses(call).values()) == ["present", "present", "present", "absent"]


def test_data_fetch_goes_on_after_a_failure_and_exits_with_1(call: Any, site: Site) -> None:
    site.faults["/one/a"] = ["404"]
    code, out = call("fetch", "one")
    assert code == 1
    assert "one/a could not be fetched" in out
    assert "one/b is fetched" in out
    code, out = call("fetch", "two/gone")
    assert code == 1
    assert "It was somewhere." in out


def test_a_terminal_sees_a_bar(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr("replicate.cli.data.console", Console(file=out, force_terminal=True, width=120))
    assert call("fetch", "one/a")[0] == 0
    assert "300.0/300.0 kB" in out.getvalue()


def test_data_check_fails_on_damage_alone(call: Any, tmp_path: Path) -> None:
    assert call("check") == (0, f"0 of 0 files in {tmp_path} are as published.\n")
    call("fetch", "one/a", "two/c")
    assert call("check")[0] == 0
    path = tmp_path / "two" / "c"
    flipped = bytearray(CONTENT)
    flipped[1000] ^= 4
    path.write_bytes(flipped)
    code, out = call("check")
    assert code == 1
    assert f"{path}: it has 300000 bytes with sha256" in out
    assert "`replicate data fetch two/c` downloads it again" in out
    assert f"1 of 2 files in {tmp_path} are as published." in out


def test_data_files_is_a_table_for_people(call: Any) -> None:
    code, out = call("files")
    assert code == 0
    assert re.search(r"one/a .* absent .* 300,000 .* MIT ", out)


def test_an_unknown_data_file_is_bad_usage_with_a_suggestion(call: Any) -> None:
    assert call("fetch", "one/aa")[0] == 2
    assert "unknown data file 'one/aa'. Did you mean one/a" in call("fetch", "one/aa")[1]
    assert call("fetch", "tow")[1].startswith("unknown data file 'tow'. Did you mean two")


def test_data_alone_shows_the_tasks(call: Any) -> None:
    code, out = call("--json")
    assert code == 0
    assert {"train", "valid", "test", "dim", "domain", "sha256"} == json.loads(out)["digits"].keys()
    code, out = call()
    assert code == 0
    assert "digits-binary" in out
    assert "`replicate data files`" in out
