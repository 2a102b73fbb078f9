"""How every plot looks, and its two forms: a PNG file, and an SVG element that takes its colours from the page.

Series differ by marker, line and lightness, so that they can be told apart in grey and by colour-blind readers.
"""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MANY_ROUNDS = 40  # from there on, a marker for each round would be a smear
INK, SOFT, GRID, FIRST, SECOND = "#1f2328", "#59636e", "#d1d9e0", "#00508f", "#d9760a"
ON_PAGE = {INK: "--ink", SOFT: "--soft", GRID: "--line", FIRST: "--plot-first", SECOND: "--plot-second"}
SOLID: dict[str, Any] = {"color": FIRST, "marker": "o", "linestyle": "-", "linewidth": 2, "markersize": 5}
DASHED: dict[str, Any] = {"color": SECOND, "marker": "s", "linestyle": "--", "linewidth": 1.6, "markersize": 4.5}
STYLE: Any = {  # matplotlib's own stubs know each key, and differ between its versions
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": SOFT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.xmargin": 0.04,
    "figure.constrained_layout.w_pad": 0.1,
    "figure.constrained_layout.h_pad": 0.08,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "fedmini",
}


@contextmanager
def own_style() -> Iterator[None]:
    """Whatever this machine's matplotlib settings are, the plots look the same."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


def line(style: dict[str, Any], num_points: int) -> dict[str, Any]:
    """A series' style, with markers only while they can be told apart."""
    return style | {"marker": None} if num_points > MANY_ROUNDS else style


def training_line(num_points: int) -> dict[str, Any]:
    """The noised series: hollow, thin, and faint single points where there are many."""
    many = {"linestyle": "none", "alpha": 0.35, "markersize": 3} if num_points > MANY_ROUNDS else {}
    return DASHED | {"linewidth": 1, "markerfacecolor": "none"} | many


def scale_by_powers(axes: "Axes") -> None:
    """A logarithmic scale with plain numbers on it: 1, 3, 10, 30."""
    from matplotlib.ticker import LogLocator, NullLocator

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 3.0)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")


def png(figure: "Figure") -> bytes:
    """A PNG file on white, for documents; the same bytes for the same figure."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=150, facecolor="white", metadata={"Software": None})
    return content.getvalue()


def svg(figure: "Figure", name: str, title: str) -> str:
    """An <svg> element for a page: ids of its own, colours that follow the page, no address of anything outside."""
    content = io.StringIO()
    figure.savefig(content, format="svg", transparent=True, metadata={"Date": None})
    text = content.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*|<!--.*?-->\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text)
    text = text.replace("xlink:href=", "href=")
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\1{name}-", text)
    text = re.sub(r'<svg [^>]*(viewBox="[^"]*")[^>]*>', rf'<svg \1 role="img" aria-label="{title}">', text, count=1)
    for colour, variable in ON_PAGE.items():
        text = text.replace(colour, f"var({variable})")
    return text
