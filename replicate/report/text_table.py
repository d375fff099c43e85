"""One table and its renderers: CSV, Markdown, LaTeX, the terminal; `template.html` renders it on the page.

A cell is either text or a measured `Cell`, which shows the kind and interval of its numbers, or why it has none.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import rich.table

from replicate.report import labels
from replicate.report.records import interval, mean


@dataclass(frozen=True)
class Number:
    """A mean over seeds with its 95 % t-interval (nan below three seeds), and the values it averages."""

    kind: str
    unit: str
    mean: float
    low: float
    high: float
    seeds: tuple[tuple[int, float, str], ...]  # (seed, value, run id)

    @staticmethod
    def of(kind: str, unit: str, seeds: Iterable[tuple[int, float, str]]) -> Number:
        """Average the values of one task, model, metric, kind and unit."""
        ordered = tuple(sorted(seeds, key=lambda s: (s[0], s[2])))
        values = [value for _, value, _ in ordered]
        return Number(kind, unit, mean(values), *interval(values), ordered)


@dataclass(frozen=True)
class Cell:
    """One metric of one model on one task.

    Attributes:
        metric: decides the number format.
        numbers: one per kind that was measured; empty where there is none.
        reason: why there is none ("n/a"), without the prefix.
        lost, tried: failed runs, and all runs of this model on this task.
        best: it is the best of its column.
    """

    metric: str
    numbers: tuple[Number, ...] = ()
    reason: str = ""
    lost: int = 0
    tried: int = 0
    best: bool = False

    def parts(self) -> list[tuple[str, str]]:
        """Return (sign of the kind, number with its interval) of each number."""
        decimals = labels.decimals_for(self.metric, [v for n in self.numbers for v in (n.mean, n.low, n.high)])
        write = partial(labels.fixed, decimals=decimals)
        return [(labels.symbol(n.kind), labels.with_interval(write, n.mean, n.low, n.high)) for n in self.numbers]

    def remark(self) -> str:
        """Return the words beside or instead of a number."""
        if self.lost:
            return f"failed ({self.lost} of {self.tried})"
        if self.numbers:
            return ""
        return "n/a" if self.reason else "-"

    def text(self) -> str:
        """Return the whole cell as plain text."""
        parts = "; ".join(f"{sign} {number}" for sign, number in self.parts())
        return " ".join(p for p in (parts, self.remark()) if p)

    def tip(self) -> str:
        """Return every seed's value with its run id, or the reason."""
        values = (each for n in self.numbers for each in n.seeds)
        lines = [f"seed {seed}: {value:.6g} (run {labels.short(run_id)})" for seed, value, run_id in values]
        lost = f"{self.lost} of {self.tried} runs failed" if self.lost else ""
        return "\n".join(line for line in (*lines, lost, self.reason) if line)

    def fields(self) -> list[str]:
        """Return the cell's fields in CSV, as named in `FIELDS`; several kinds share each field in the same order."""
        ends = [[labels.significant(getattr(n, k), 10) for n in self.numbers] for k in ("mean", "low", "high")]
        others = [[n.kind for n in self.numbers], [str(len(n.seeds)) for n in self.numbers]]
        note = self.reason if self.remark() == "n/a" else self.remark()
        return [*map(";".join, [*ends, *others]), note]


#: endings of the heads of a measured column in CSV: its mean, interval, kind, number of seeds, and a note
FIELDS = ("", "_low", "_high", "_kind", "_seeds", "_note")


@dataclass(frozen=True)
class Column:
    """One column: `key` in CSV, `head` for readers, `unit` in full words; `measured` where it holds `Cell`s."""

    key: str
    head: str
    unit: str = ""
    measured: bool = False

    @property
    def title(self) -> str:
        """The head with the unit."""
        return f"{self.head} ({self.unit})" if self.unit else self.head


@dataclass(frozen=True)
class Row:
    """One row, and the family of its model where it has one."""

    cells: tuple[str | Cell, ...]
    family: str = ""

    @property
    def group(self) -> str:
        """The text of its first cell."""
        return str(self.cells[0])

    def measured(self) -> list[Cell]:
        """Return the cells that are not text."""
        return [c for c in self.cells if isinstance(c, Cell)]


def csv_text(*rows: Sequence[object]) -> str:
    """Write rows, the head first, as CSV with Unix line ends."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(rows)
    return out.getvalue()


@dataclass(frozen=True)
class TextTable:
    """A table before it is rendered.

    Attributes:
        name: file name without ending.
        title, caption: plain text.
        columns, rows: the body.
        grouped: the first column names groups of rows (families, tasks).
    """

    name: str
    title: str
    caption: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    grouped: bool = False

    @staticmethod
    def of_text(name: str, title: str, caption: str, heads: Iterable[str], rows: Iterable[Sequence[str]]) -> TextTable:
        """Make a table whose cells are all text."""
        return TextTable(name, title, caption, tuple(Column(h, h) for h in heads), tuple(Row(tuple(r)) for r in rows))

    def notes(self) -> list[str]:
        """Return the distinct reasons for "n/a", in the order of their first cells."""
        cells = (c for row in self.rows for c in row.measured())
        return list(dict.fromkeys(c.reason for c in cells if c.remark() == "n/a"))

    def renderings(self) -> dict[str, str]:
        """Return the text of each of its files, by file name."""
        return {f"{self.name}.csv": self.csv(), f"{self.name}.md": self.markdown(), f"{self.name}.tex": self.latex()}

    def csv(self) -> str:
        """Write CSV: text as it is, and plain numbers with their interval, kind, number of seeds and a note."""
        head = [f for c in self.columns for f in ([c.key + f for f in FIELDS] if c.measured else [c.key])]
        rows = ([f for c in row.cells for f in ([c] if isinstance(c, str) else c.fields())] for row in self.rows)
        return csv_text(head, *rows)

    def markdown(self) -> str:
        """Write Markdown, caption first; reasons for "n/a" are numbered and listed below."""
        notes = self.notes()

        def write(cell: str | Cell) -> str:
            if isinstance(cell, str):
                return labels.markdown(cell)
            text = cell.text() + (f" ({notes.index(cell.reason) + 1})" if cell.remark() == "n/a" else "")
            return f"**{text}**" if cell.best else text

        lines = [f"### {labels.markdown(self.title)}", ""] if self.grouped else []
        heads = " | ".join(labels.markdown(c.title) for c in self.columns)
        lines += [labels.markdown(self.caption), "", f"| {heads} |", "|" + "---|" * len(self.columns)]
        lines += ["| " + " | ".join(map(write, row.cells)) + " |" for row in self.rows]
        lines += ["", *(f"({i}) {labels.markdown(note)}  " for i, note in enumerate(notes, 1))] if notes else []
        return "\n".join(lines) + "\n"

    def latex(self) -> str:
        """Write LaTeX that needs booktabs; a table of text is longer than a page and needs longtable as well."""
        return self._grouped_latex() if self.grouped else self._long_latex()

    def _grouped_latex(self) -> str:
        notes, width = self.notes(), len(self.columns) - 1
        head = " & ".join(labels.latex(c.title) for c in self.columns[1:])
        lines = [r"% needs \usepackage{booktabs}", r"\begin{table}", r"\centering"]
        lines += [rf"\caption{{{labels.latex(self.caption)}}}", rf"\label{{tab:{self.name}}}"]
        lines += [r"\begin{tabular}{" + "l" * width + "}", r"\toprule", head + r" \\"]
        group = None
        for row in self.rows:
            if row.group != group:
                group = row.group
                lines += [r"\midrule", rf"\multicolumn{{{width}}}{{l}}{{\emph{{{labels.latex(group)}}}}} \\"]
            lines.append(" & ".join(_latex_cell(c, notes) for c in row.cells[1:]) + r" \\")
        lines += [r"\bottomrule", r"\end{tabular}"]
        small = r"\par\smallskip{\footnotesize\textsuperscript"
        lines += [rf"{small}{{{i}}} {labels.latex(note)}}}" for i, note in enumerate(notes, 1)]
        return "\n".join([*lines, r"\end{table}"]) + "\n"

    def _long_latex(self) -> str:
        shares = r"p{%.2f\linewidth}" % (0.92 / len(self.columns)) * len(self.columns)
        lines = ["% needs longtable and booktabs", rf"\begin{{longtable}}{{{shares}}}"]
        lines += [rf"\caption{{{labels.latex(self.caption)}}} \\", r"\toprule"]
        lines += [" & ".join(labels.latex(c.title) for c in self.columns) + r" \\", r"\midrule \endhead"]
        rows = ([_latex_cell(c, []).replace("±", r"$\pm$") for c in row.cells] for row in self.rows)
        lines += [" & ".join(row) + r" \\" for row in rows]
        return "\n".join([*lines, r"\bottomrule", r"\end{longtable}"]) + "\n"

    def rich(self) -> rich.table.Table:
        """Return the table for a terminal."""
        table = rich.table.Table(*(c.title for c in self.columns))
        for row in self.rows:
            table.add_row(*(c if isinstance(c, str) else c.text() for c in row.cells))
        return table


def _latex_cell(cell: str | Cell, notes: list[str]) -> str:
    if isinstance(cell, str):
        return labels.latex(cell)
    parts = "; ".join(f"{labels.LATEX_SYMBOLS[sign]} {labels.latex(number)}" for sign, number in cell.parts())
    remark = labels.latex(cell.remark())
    if remark == "n/a":
        remark += rf"\textsuperscript{{{notes.index(cell.reason) + 1}}}"
    text = " ".join(p for p in (parts, remark) if p)
    return rf"\textbf{{{text}}}" if cell.best else text
