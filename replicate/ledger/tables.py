"""Tables that compare printed numbers with ours, as data: `tables.toml` beside this file.

    [[table]]
    name = "printed-released"           # file name
    title = "..."
    caption = "..."
    heads = ["paper", "as printed", ...]
    rows = [
      ["text", "text", { measure = "TASK/MODEL/METRIC", minus = "TASK/MODEL/METRIC" }],
    ]

A cell is text, or a measure (with `minus` a difference paired by seed) that the report fills from the measurements.
"""

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from replicate.errors import ClaimError
from replicate.ledger.claims import PaperClaims, all_claims


@dataclass(frozen=True)
class MeasureCell:
    """A cell that is a measurement."""

    measure: str
    minus: str = ""


@dataclass(frozen=True)
class MeasureTable:
    """One table before its measures are filled in."""

    name: str
    title: str
    caption: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str | MeasureCell, ...], ...]


def _cell(value: Any, where: str) -> str | MeasureCell:
    if isinstance(value, str):
        return value
    try:
        cell = MeasureCell(**value)
        right = all(m.count("/") == 2 for m in (cell.measure, cell.minus) if m)
    except TypeError:
        right = False
    if not right:
        raise ClaimError(f"{where}: {value!r} is neither text nor {{ measure = TASK/MODEL/METRIC }}")
    return cell


def measure_tables(path: Path | None = None) -> tuple[MeasureTable, ...]:
    """Read a file's tables, by default the one's beside this module; raises ClaimError if it is wrong."""
    path = path or Path(__file__).with_suffix(".toml")
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ClaimError(f"{path} cannot be read: {error}") from None
    out = []
    for table in data.get("table", []):
        where = f"{path.name}, table {table.get('name')}"
        missing = [k for k in ("name", "title", "caption", "heads", "rows") if k not in table]
        if missing:
            raise ClaimError(f"{where}: there is no {', '.join(missing)}")
        rows = tuple(tuple(_cell(c, where) for c in row) for row in table["rows"])
        if any(len(row) != len(table["heads"]) for row in rows):
            raise ClaimError(f"{where}: every row needs {len(table['heads'])} cells, as there are heads")
        out.append(MeasureTable(table["name"], table["title"], table["caption"], tuple(table["heads"]), rows))
    return tuple(out)


@dataclass(frozen=True)
class Claims:
    """What the ledger is written from, beside the measurements."""

    papers: tuple[PaperClaims, ...] = ()
    tables: tuple[MeasureTable, ...] = ()


NO_CLAIMS = Claims()


def read_ledger() -> Claims:
    """Read all papers' claims and the tables of print and released code; raises ClaimError if a file is wrong."""
    return Claims(all_claims(), measure_tables())
