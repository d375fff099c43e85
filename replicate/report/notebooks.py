r"""Parts that the notebooks share: the report's look, the results folder, one picture, and pages without a network.

nbconvert's own HTML page fetches MathJax, require.js and mermaid when it opens. `OfflineHTML` leaves all three out and
draws every formula as SVG paths while it writes the page, by matplotlib's mathtext: a notebook may therefore use the
part of TeX that mathtext knows (no environments, no \tfrac), which a test enforces.

    python -m nbconvert --to replicate.report.notebooks.OfflineHTML --execute notebooks/*.ipynb
"""

import html
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.font_manager import FontProperties
from matplotlib.path import Path as Outline
from matplotlib.textpath import TextPath, text_to_path
from nbconvert.exporters import HTMLExporter
from nbconvert.preprocessors import Preprocessor
from nbformat import NotebookNode
from torch import Tensor
from traitlets import default

from replicate.report.drawing import DENSITY, style
from replicate.runs.evaluate import plane

#: units of a formula's outline in one em, whole numbers: a twelfth of a pixel at the page's size
UNITS = 200
#: points a side of a map
PIXELS = 110
#: code (kept as it is), displayed and inline formulas in Markdown
MATH = re.compile(r"(?P<code>```.*?```|`[^`\n]*`)|\$\$(?P<display>.+?)\$\$|(?<!\\)\$(?P<inline>[^$]+?)\$", re.DOTALL)
_OPERATIONS = {Outline.MOVETO: "m", Outline.LINETO: "l", Outline.CURVE3: "q", Outline.CURVE4: "c"}


def begin() -> None:
    """Set the report's look for all later figures, and one thread, as the suite's own runs have."""
    torch.set_num_threads(1)
    with style():
        look = mpl.rcParams.copy()
    mpl.rcParams.update({key: value for key, value in look.items() if not key.startswith("backend")})


def results_folder() -> Path:
    """Return RESULTS/PROFILE from the environment; by default this checkout's results/standard.

    Raises:
        FileNotFoundError: it has no measurements.csv.
    """
    root = next((p for p in (Path.cwd(), *Path.cwd().parents) if (p / "pyproject.toml").exists()), Path.cwd())
    profile = os.environ.get("PROFILE", "standard")
    folder = Path(os.environ.get("RESULTS") or root / "results") / profile
    if not (folder / "measurements.csv").exists():
        raise FileNotFoundError(f"{folder} holds no results: run `make reproduce PROFILE={profile}`, or set RESULTS")
    return folder


def show_density(ax: Axes, log_density: Callable[[Tensor], Tensor], half_width: float, title: str = "") -> None:
    """Draw a map of exp(log_density) on the square [-half_width, half_width]^2, darkest at its largest value.

    Args:
        log_density: (n, 2) -> (n,), up to a constant.
    """
    x, axis = plane(half_width, PIXELS, torch.device("cpu"))
    with torch.no_grad():
        values = log_density(x).double().view(len(axis), -1)
    density = (values - values.max()).exp()
    extent = (-half_width, half_width, -half_width, half_width)
    ax.imshow(density, origin="lower", extent=extent, cmap=DENSITY, vmin=0, vmax=1, interpolation="bilinear")
    ax.set_title(title, loc="left")
    ax.set_aspect("equal")
    ax.grid(False)


# -- pages that need no network


def formula(tex: str, display: bool = False) -> str:
    """Return a formula as an inline SVG in the colour and size of the text around it.

    Raises:
        ValueError: mathtext does not know a command in it.
    """
    source, prop = f"${' '.join(tex.split())}$", FontProperties(math_fontfamily="stix")
    em = prop.get_size_in_points()
    width, height, depth = (v / em for v in text_to_path.get_text_width_height_descent(source, prop, ismath=True))
    outline = TextPath((0, 0), source, prop=prop)
    box = " ".join(str(round(UNITS * v)) for v in (0, depth - height, width, height))
    name = html.escape(" ".join(tex.split()), quote=True)
    look = f"width:{width:.3f}em;height:{height:.3f}em;vertical-align:{-depth:.3f}em;overflow:visible"
    path = f'<path fill="currentColor" d="{"".join(_path(outline, UNITS / em))}"/>'
    image = f'<svg role="img" aria-label="{name}" viewBox="{box}" style="{look}">{path}</svg>'
    return f'\n\n<div style="text-align:center;margin:0.8em 0;font-size:1.1em">{image}</div>\n\n' if display else image


def _path(outline: Outline, unit: float) -> Iterator[str]:
    """Return the steps of SVG's path data, whole and relative, y downwards."""
    here = (0, 0)
    for vertices, code in outline.iter_segments(simplify=False):
        if code == Outline.CLOSEPOLY:
            yield "z"
            continue
        points = [(round(unit * x), round(-unit * y)) for x, y in vertices.reshape(-1, 2)]
        yield _OPERATIONS[code] + " ".join(f"{x - here[0]} {y - here[1]}" for x, y in points)
        here = points[-1]


def drawn(text: str) -> str:
    """Replace every formula of Markdown outside code by SVG."""

    def replaced(match: re.Match[str]) -> str:
        return match["code"] or formula(match["display"] or match["inline"], bool(match["display"]))

    return MATH.sub(replaced, text)


class DrawnFormulas(Preprocessor):
    """Draw formulas in Markdown cells as SVG, so that no page has to load MathJax."""

    def preprocess_cell(
        self, cell: NotebookNode, resources: dict[str, Any], index: int
    ) -> tuple[NotebookNode, dict[str, Any]]:
        if cell.cell_type == "markdown":
            cell.source = drawn(cell.source)
        return cell, resources


class OfflineHTML(HTMLExporter):
    """nbconvert's page without its three scripts from elsewhere."""

    export_from_notebook = "HTML that needs no network"

    @default("raw_template")
    def _default_raw_template(self) -> str:
        blocks = ("html_head_js", "html_head_js_mathjax", "html_head_js_mermaidjs")
        empty = "".join(f"{{% block {name} %}}{{% endblock {name} %}}" for name in blocks)
        return "{% extends 'lab/index.html.j2' %}" + empty

    @default("preprocessors")
    def _default_preprocessors(self) -> list[type[Preprocessor]]:
        return [DrawnFormulas]
