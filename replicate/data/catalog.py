"""The catalogue of data files: what each must contain and where it can be had, read from `catalog.toml` and checked."""

import difflib
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from replicate.errors import UsageError

#: what a file may be packed as, beside not at all
PACKED = (".gz", ".xz")
#: endings of archives, of which one member is the file
ARCHIVES = (".tar.gz", ".tar.xz", ".tgz", ".tar", ".zip")
CATALOG = Path(__file__).with_name("catalog.toml")


@dataclass(frozen=True)
class Entry:
    """One data file.

    Attributes:
        name: below REPLICATE_DATA, without .gz or .xz.
        sha256: of the uncompressed content.
        size: of the uncompressed content, bytes.
        licence: with what to cite, one line.
        urls: where it can be had, the canonical place first.
        member: its path within those urls that are archives.
        archive_limit: bytes that such an archive may have at most.
        note: where it comes from, where there are no urls.
    """

    name: str
    sha256: str
    size: int
    licence: str
    urls: tuple[str, ...] = ()
    member: str = ""
    archive_limit: int = 0
    note: str = ""


KEYS = tuple(f.name for f in fields(Entry) if f.name != "name")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)*")


def ending_of(url: str) -> str:
    """Return the ending that says how a URL or file is packed: one of ARCHIVES or PACKED, or ""."""
    path = urlsplit(url).path.lower()
    return next((ending for ending in (*ARCHIVES, *PACKED) if path.endswith(ending)), "")


@cache
def catalog() -> Mapping[str, Entry]:
    """Every file that the suite knows, by name."""
    return read_catalog(CATALOG)


def read_catalog(path: Path) -> dict[str, Entry]:
    """Read and check a catalogue.

    Raises:
        UsageError: all that is wrong with it, each problem with the entry's name, in one line.
    """
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # undecodable and malformed text are ValueErrors
        raise UsageError(f"{path} is no catalogue: {error}") from None
    problems = [f"[{name}] {problem}" for name, table in tables.items() for problem in _problems(name, table)]
    if problems:
        raise UsageError(f"{path}: {'; '.join(problems)}")
    return {name: Entry(name, **{**table, "urls": tuple(table.get("urls", ()))}) for name, table in tables.items()}


def _problems(name: str, table: Any) -> list[str]:
    """Note what is wrong with one entry."""
    if not isinstance(table, dict):
        return ["is no table of keys"]
    found = []
    if not _NAME.fullmatch(name) or name.endswith(PACKED):
        found.append("is no name of a file below REPLICATE_DATA, without .gz or .xz")
    for key in table.keys() - set(KEYS):
        near = difflib.get_close_matches(key, KEYS, n=1)
        found.append(f"unknown key {key!r}" + (f", did you mean {near[0]}?" if near else f"; known: {', '.join(KEYS)}"))
    for key in ("sha256", "licence", "member", "note"):
        if not isinstance(table.get(key, ""), str) or "\n" in table.get(key, ""):
            found.append(f"{key} is {table[key]!r}; it must be one line of text")
    for key in ("size", "archive_limit"):
        if key in table and (type(table[key]) is not int or table[key] < 1):
            found.append(f"{key} is {table[key]!r}; it must be a whole number of bytes, at least 1")
    found += [f"{key} is missing" for key in ("sha256", "size", "licence") if not table.get(key)]
    if isinstance(table.get("sha256"), str) and not re.fullmatch("[0-9a-f]{64}", table["sha256"]):
        found.append(f"sha256 is {table['sha256']!r}; it must be 64 digits 0-9a-f")
    return found + _source_problems(table)


def _source_problems(table: Mapping[str, Any]) -> list[str]:
    """Note what is wrong with the addresses of an entry."""
    urls = table.get("urls", [])
    if not isinstance(urls, list) or not all(isinstance(url, str) for url in urls):
        return ["urls must be a list of text"]
    found = [f"url {url!r} is not of the form https://host/path" for url in urls if not _is_https(url)]
    if found:
        return found
    archived = any(ending_of(url) in ARCHIVES for url in urls)
    for key in ("member", "archive_limit"):
        if archived and not table.get(key):
            found.append(f"{key} is missing, and one of its urls is an archive")
        if not archived and table.get(key):
            found.append(f"{key} is given, and none of its urls is an archive")
    if bool(urls) == bool(table.get("note")):
        found.append("needs either urls or a note that says where it comes from")
    return found


def _is_https(url: str) -> bool:
    """Whether a URL is https to a plain host, without a user's name and without characters that need quoting."""
    try:
        parts = urlsplit(url)
        host = parts.hostname
    except ValueError:
        return False
    plain = re.fullmatch("[!-~]+", url) is not None
    return parts.scheme == "https" and bool(host) and "@" not in parts.netloc and plain
