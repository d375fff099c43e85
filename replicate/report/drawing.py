"""Figures: style, panels, legends, and files that are the same bytes each time.

The report draws without pyplot: no global state, no window, no open figure. Dense artists are rasterised in the SVG;
ids in it come from a fixed salt, and it has no date.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, to_hex, to_rgb
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D
from numpy.typing import NDArray
from PIL import Image

from replicate.report.labels import FAMILY_COLOURS, FAMILY_LABELS, family_key
from replicate.report.text_table import csv_text

Array = NDArray[np.float64]
DPI = 100
#: a picture above MAX_FULL bytes is reduced to a palette; one that is still above MAX_PNG is drawn smaller
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
class Figure:
    """A figure with its texts: drawn first, then saved.

    Attributes:
        name: file name without ending.
        title: of its section.
        caption: what the reader sees and how to read it.
        canvas: the drawing; None once it is saved.
        csv: the data that it shows, as CSV text.
        also: names of further figures whose CSV files have data that it shows.
        runs: ids of the runs whose arrays or plots it shows; none where the records' numbers are enough to draw it.
        png: the saved picture.
    """

    name: str
    title: str
    caption: str
    canvas: Canvas | None = None
    csv: str = ""
    also: tuple[str, ...] = ()
    runs: tuple[str, ...] = ()
    png: bytes = b""

    @property
    def source(self) -> str:
        """The picture as a data URI."""
        return "data:image/png;base64," + base64.b64encode(self.png).decode("ascii")

    @property
    def width(self) -> int:
        """The width of the picture in pixels."""
        return Image.open(io.BytesIO(self.png)).width

    def scaled(self, factor: float) -> Figure:
        """Return the figure with a smaller picture."""
        image = Image.open(io.BytesIO(self.png)).convert("RGB")
        small = image.resize((int(image.width * factor), int(image.height * factor)), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        small.quantize(128, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
        return replace(self, png=buffer.getvalue())


@contextmanager
def style() -> Iterator[None]:
    """Set the report's look, and restore the earlier one on leaving."""
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
    with mpl.rc_context():
        mpl.rcdefaults()  # a matplotlibrc of the user or the current folder must not change a byte
        mpl.rcParams.update(look)
        yield


def colour(family: str) -> str:
    """Return a family's colour."""
    return FAMILY_COLOURS.get(family, "#000000")


def shade(family: str, index: int, count: int) -> str:
    """Return the colour of the index-th of a family's `count` models: the family's first, then lighter ones.

    None is darker: dark orange and dark vermilion would be the same brown.
    """
    base = np.array(to_rgb(colour(family)))
    return to_hex(tuple(base + (1 - base) * 0.5 * index / max(1, count - 1)))


def new_canvas(width: float, height: float) -> Canvas:
    """Return an empty drawing in inches, on white, so that it reads on dark pages too."""
    canvas = Canvas(figsize=(width, height), facecolor="white")
    FigureCanvasAgg(canvas)
    return canvas


def add_axes(canvas: Canvas, x: float, y: float, width: float, height: float) -> Axes:
    """Add axes of a size, with their lower left corner at (x, y), all in inches."""
    across, up = canvas.get_size_inches()
    return canvas.add_axes((x / across, y / up, width / across, height / up))


def panels(count: int, columns: int, size: float, foot: float = 0.42) -> tuple[Canvas, list[Axes]]:
    """Make `count` square panels in reading order, with room for two title lines above each and a legend below all.

    Args:
        columns: the most panels side by side.
        size, foot: the side of a panel and the room below all, in inches.
    """
    title_room = 0.44
    columns = max(1, min(columns, count))
    rows = max(1, math.ceil(count / columns))
    gap, left, right = 0.1, 0.4, 0.08
    height = rows * (size + title_room) + foot + 0.06
    canvas, axes = new_canvas(left + columns * size + (columns - 1) * gap + right, height), []
    for r, c in (divmod(i, columns) for i in range(count)):
        up = height - 0.06 - (r + 1) * (size + title_room)
        axes.append(add_axes(canvas, left + c * (size + gap), up, size, size))
    return canvas, axes


def panel_title(ax: Axes, name: str, note: str, family: str) -> None:
    """Write a model's name in its family's colour, and a quiet second line."""
    name = name if len(name) <= 24 else name[:23] + "…"
    small = 8.0 if len(name) <= 18 else 6.6
    write = partial(ax.text, 0, transform=ax.transAxes, va="bottom")
    write(1.115, plain(name), fontsize=small, weight="bold", color=darker(family))
    write(1.025, plain(note), fontsize=6.8, color=QUIET)


def plain(text: str) -> str:
    """Escape text for matplotlib: a pair of dollar signs would start mathematics."""
    return text.replace("$", r"\$")


def darker(family: str) -> str:
    """Return a family's colour, dark enough for small text on white."""
    return to_hex(tuple(0.78 * np.array(to_rgb(colour(family)))))


def family_legend(canvas: Canvas, families: Sequence[str], y: float = 0.0) -> None:
    """Draw one entry per family, centred below the panels."""
    handles = [
        Line2D([], [], color=colour(f), marker="s", linestyle="", markersize=6, label=FAMILY_LABELS.get(f, f))
        for f in sorted(set(families), key=family_key)
    ]
    place: dict[str, Any] = {"loc": "lower center", "bbox_to_anchor": (0.5, y), "ncol": len(handles)}
    canvas.legend(handles=handles, handletextpad=0.3, columnspacing=1.4, **place)


def palette() -> NDArray[np.int64]:
    """Return 256 colours (256, 3) of the maps and families, to which a large picture is reduced at the same hues."""
    white, faint = np.ones(3), [(0.55, 52), (1.0, 150)]
    maps = [white + (np.array(DENSITY(t)[:3]) - white) * alpha for alpha, n in faint for t in np.linspace(0, 1, n)]
    inks = [to_rgb(c) for f in FAMILY_COLOURS for c in (colour(f), darker(f))]
    blends = [white + (np.array(c) - white) * t for c in inks for t in (0.5, 1.0)]
    greys = [white * t for t in np.linspace(0, 1, 256 - len(maps) - len(blends))]
    return np.rint(255 * np.clip([*maps, *blends, *greys], 0, 1)).astype(np.int64)


def reduced(image: Image.Image) -> Image.Image:
    """Return an RGB image with every pixel at the nearest colour of `palette`."""
    pixels = np.asarray(image, dtype=np.int64) @ np.array([1 << 16, 1 << 8, 1])
    met, where = np.unique(pixels, return_inverse=True)
    rgb, colours = np.stack([met >> 16, met >> 8 & 255, met & 255], 1), palette()
    distance = (rgb**2).sum(1)[:, None] - 2 * rgb @ colours.T + (colours**2).sum(1)
    out = Image.fromarray(distance.argmin(1)[where].reshape(pixels.shape).astype(np.uint8), "P")
    out.putpalette(colours.flatten().tolist())
    return out


def png_bytes(canvas: Canvas, dpi: int = DPI) -> bytes:
    """Return the drawing as PNG without metadata, with the report's palette where it would be large otherwise."""
    raw = io.BytesIO()
    canvas.savefig(raw, format="png", dpi=dpi, metadata={"Software": None})
    if raw.tell() <= MAX_FULL:
        return raw.getvalue()
    small = io.BytesIO()
    reduced(Image.open(raw).convert("RGB")).save(small, "PNG", optimize=True)
    return png_bytes(canvas, dpi * 3 // 4) if small.tell() > MAX_PNG and dpi > 40 else small.getvalue()


def fitting(rows: Callable[[int], Iterable[Sequence[object]]], sizes: Iterable[int]) -> tuple[int, str]:
    """Return the first of the sizes whose CSV, of its rows with their head, is small enough to ship, or the last."""
    size, text = 0, ""
    for size in sizes:
        text = csv_text(*rows(size))
        if len(text.encode()) <= MAX_CSV:
            break
    return size, text


def save(figure: Figure, folder: Path) -> bytes:
    """Write NAME.png, NAME.svg and NAME.csv of a drawn figure, and return the PNG.

    Raises:
        ValueError: the figure is saved already.
    """
    if figure.canvas is None:
        raise ValueError(f"the figure {figure.name} is saved already")
    folder.mkdir(parents=True, exist_ok=True)
    png = png_bytes(figure.canvas)
    (folder / f"{figure.name}.png").write_bytes(png)
    figure.canvas.savefig(folder / f"{figure.name}.svg", format="svg", metadata={"Date": None})
    (folder / f"{figure.name}.csv").write_text(figure.csv, encoding="utf-8", newline="\n")
    return png
