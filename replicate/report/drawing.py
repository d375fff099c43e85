"""What all figures share: style, panels, legends, and files that come out the same byte for byte.

Figures are made without pyplot: no global state, no window, no figure left open. Dense artists are rasterised in
the SVG; ids in it come from a fixed salt and no date is written.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray
from PIL import Image

from replicate.report.labels import FAMILY_COLOURS, FAMILY_LABELS, family_key

DPI = 100
#: a picture above this many bytes is reduced to a palette; one still above MAX_PNG is drawn smaller
MAX_FULL, MAX_PNG = 180_000, 250_000
#: largest CSV beside a figure, in bytes
MAX_CSV = 580_000
#: a figure's files
ENDINGS = ("png", "svg", "csv")
INK, QUIET, FRAME = "#22262B", "#5F6670", "#C9CED6"
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p")
DENSITY = LinearSegmentedColormap.from_list(
    "density", ["#FFFFFF", *(to_hex(c) for c in sns.color_palette("mako_r", 7)[1:])]
)


@dataclass(frozen=True)
class Drawing:
    """A finished figure and the data it was drawn from.

    Attributes:
        name: file name without ending.
        title: of the section it stands in.
        caption: what the reader sees and how to read it.
        figure: drawn.
        csv: the data, as CSV text.
        also: names of further figures' CSV files that this one was drawn from.
        runs: ids of the runs whose arrays or plots it shows; none where the records' numbers are enough to draw it.
    """

    name: str
    title: str
    caption: str
    figure: Figure
    csv: str
    also: tuple[str, ...] = ()
    runs: tuple[str, ...] = ()


@contextmanager
def style() -> Iterator[None]:
    """The report's look; everything is as before on leaving."""
    look = {
        **sns.axes_style("whitegrid"),
        **sns.plotting_context("paper", font_scale=1.0),
        "font.family": "DejaVu Sans",  # ships with matplotlib, so that files do not depend on installed fonts
        "axes.edgecolor": FRAME,
        "axes.labelcolor": INK,
        "axes.titlecolor": INK,
        "axes.titlesize": 9,
        "axes.labelsize": 8.5,
        "axes.linewidth": 0.8,
        "grid.color": "#E6E9EE",
        "grid.linewidth": 0.6,
        "legend.fontsize": 8,
        "legend.frameon": False,
        "text.color": INK,
        "xtick.color": QUIET,
        "ytick.color": QUIET,
        "xtick.labelsize": 7.5,
        "ytick.labelsize": 7.5,
        "svg.fonttype": "path",
        "svg.hashsalt": "scoreboard",
        "path.simplify": True,
        "figure.dpi": DPI,
        "savefig.dpi": DPI,
    }
    with mpl.rc_context(look):
        yield


def colour(family: str) -> str:
    """A family's colour."""
    return FAMILY_COLOURS.get(family, "#000000")


def shade(family: str, index: int, count: int) -> str:
    """The index-th of a family's `count` models: the family's colour first, then lighter ones.

    Never darker: dark orange and dark vermilion would be the same brown.
    """
    base = np.array(to_rgb(colour(family)))
    return to_hex(tuple(base + (1 - base) * 0.5 * index / max(1, count - 1)))


def new_figure(width: float, height: float) -> Figure:
    """An empty figure in inches, on white, so that it reads on dark pages too."""
    figure = Figure(figsize=(width, height), facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def panels(count: int, columns: int, size: float, foot: float = 0.42) -> tuple[Figure, list[Axes]]:
    """Square panels in reading order, with room for two title lines above each and a legend below all.

    Args:
        count: panels wanted.
        columns: at most so many side by side.
        size: side of a panel in inches.
        foot: inches below all.
    """
    title_room = 0.44
    columns = max(1, min(columns, count))
    rows = max(1, math.ceil(count / columns))
    gap, left, right = 0.1, 0.4, 0.08
    width = left + columns * size + (columns - 1) * gap + right
    height = rows * (size + title_room) + foot + 0.06
    figure = new_figure(width, height)
    axes = []
    for i in range(count):
        row, at = divmod(i, columns)
        x = left + at * (size + gap)
        y = height - 0.06 - (row + 1) * (size + title_room)
        axes.append(figure.add_axes((x / width, y / height, size / width, size / height)))
    return figure, axes


def panel_title(ax: Axes, name: str, note: str, family: str) -> None:
    """A model's name in its family's colour, and a quiet second line."""
    name = name if len(name) <= 24 else name[:23] + "…"
    small = 8.0 if len(name) <= 18 else 6.6
    ax.text(
        0, 1.115, plain(name), transform=ax.transAxes, fontsize=small, weight="bold", color=darker(family), va="bottom"
    )
    ax.text(0, 1.025, plain(note), transform=ax.transAxes, fontsize=6.8, color=QUIET, va="bottom")


def plain(text: str) -> str:
    """Text that matplotlib takes as it is: a pair of dollar signs would start mathematics."""
    return text.replace("$", r"\$")


def darker(family: str) -> str:
    """A family's colour, dark enough for small text on white."""
    return to_hex(tuple(0.78 * np.array(to_rgb(colour(family)))))


def family_legend(figure: Figure, families: Sequence[str], y: float = 0.0) -> None:
    """One entry a family, centred below the panels."""
    handles = [
        Line2D([], [], color=colour(f), marker="s", linestyle="", markersize=6, label=FAMILY_LABELS.get(f, f))
        for f in sorted(set(families), key=family_key)
    ]
    figure.legend(
        handles=handles,
        loc="lower center",
        bbox_to_anchor=(0.5, y),
        ncol=len(handles),
        handletextpad=0.3,
        columnspacing=1.4,
    )


def palette() -> NDArray[np.int64]:
    """256 colours (256, 3) of the maps and families, to which a large picture is reduced without a change of hue."""
    white, faint = np.ones(3), [(0.55, 52), (1.0, 150)]
    maps = [white + (np.array(DENSITY(t)[:3]) - white) * alpha for alpha, n in faint for t in np.linspace(0, 1, n)]
    inks = [to_rgb(c) for f in FAMILY_COLOURS for c in (colour(f), darker(f))]
    blends = [white + (np.array(c) - white) * t for c in inks for t in (0.5, 1.0)]
    greys = [white * t for t in np.linspace(0, 1, 256 - len(maps) - len(blends))]
    return np.rint(255 * np.clip([*maps, *blends, *greys], 0, 1)).astype(np.int64)


def reduced(image: Image.Image) -> Image.Image:
    """An RGB image with every pixel at the nearest colour of `palette`."""
    pixels = np.asarray(image, dtype=np.int64) @ np.array([1 << 16, 1 << 8, 1])
    met, where = np.unique(pixels, return_inverse=True)
    rgb, colours = np.stack([met >> 16, met >> 8 & 255, met & 255], 1), palette()
    distance = (rgb**2).sum(1)[:, None] - 2 * rgb @ colours.T + (colours**2).sum(1)
    out = Image.fromarray(distance.argmin(1)[where].reshape(pixels.shape).astype(np.uint8), "P")
    out.putpalette(colours.flatten().tolist())
    return out


def png_bytes(figure: Figure, dpi: int = DPI) -> bytes:
    """The figure as PNG without metadata, with the report's palette where it would be large otherwise."""
    raw = io.BytesIO()
    figure.savefig(raw, format="png", dpi=dpi, metadata={"Software": None})
    if raw.tell() <= MAX_FULL:
        return raw.getvalue()
    image, small = Image.open(raw).convert("RGB"), io.BytesIO()
    reduced(image).save(small, "PNG", optimize=True)
    if small.tell() > MAX_PNG and dpi > 40:
        return png_bytes(figure, dpi * 3 // 4)
    return small.getvalue()


def csv_text(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """CSV with Unix line ends."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(rows)
    return out.getvalue()


def fitting(make: Callable[[int], str], sizes: Iterable[int]) -> tuple[int, str]:
    """The first of the sizes whose CSV is small enough to ship, or the last; with its CSV."""
    size, text = 0, ""
    for size in sizes:
        text = make(size)
        if len(text.encode()) <= MAX_CSV:
            break
    return size, text


def save(drawing: Drawing, folder: Path) -> bytes:
    """Write NAME.png, NAME.svg and NAME.csv; returns the PNG."""
    folder.mkdir(parents=True, exist_ok=True)
    png = png_bytes(drawing.figure)
    (folder / f"{drawing.name}.png").write_bytes(png)
    drawing.figure.savefig(folder / f"{drawing.name}.svg", format="svg", metadata={"Date": None})
    (folder / f"{drawing.name}.csv").write_text(drawing.csv, encoding="utf-8", newline="\n")
    return png
