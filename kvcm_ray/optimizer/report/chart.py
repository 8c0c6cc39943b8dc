"""One chart: a matplotlib figure, and its SVG for light pages, dark ones, and pages that may be either.

A title says what there is to see, the line below it what was looked at. Matplotlib is imported here and
in the modules that draw, and these only when something is drawn: it takes a good part of a second.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from kvcm_ray.errors import InvalidArgument, Unsupported
from kvcm_ray.optimizer.report import palette

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

THEMES: dict[str, Callable[[str], str]] = {"light": str, "dark": palette.dark, "page": palette.following}
_FONTS = "system-ui, -apple-system, 'Segoe UI', 'Helvetica Neue', Arial, 'DejaVu Sans', sans-serif"
_SETTINGS = {
    "svg.fonttype": "none",  # text stays text: small, searchable, read aloud
    "font.family": "DejaVu Sans",  # as wide as any: what fits in it fits in the reader's
    "font.size": 10,
    "path.simplify_threshold": 0.5,
    "axes.unicode_minus": False,
}
_LEFT, _RIGHT, _BOTTOM = 0.62, 0.3, 0.58  #: inches around the axes
_EDGE = 0.1  #: left and right of the title


@dataclass(slots=True)
class Chart:
    """`figure` can be changed before it is drawn."""

    name: str
    title: str  #: the finding
    about: str  #: what a reader who cannot see it is told
    figure: Figure = field(repr=False)

    def svg(self, theme: str = "light") -> str:
        """The drawing; theme "page" takes the colours that `palette.style` names.

        Raises:
            InvalidArgument: no such theme.
        """
        import matplotlib

        out = io.StringIO()
        with matplotlib.rc_context({**_SETTINGS, "svg.hashsalt": self.name}):
            self.figure.savefig(out, format="svg", metadata={"Date": None})
        return themed(_named(out.getvalue(), self.name, self.title, self.about), theme)

    def _repr_svg_(self) -> str:
        """How notebooks show it."""
        return self.svg()


def themed(svg: str, theme: str) -> str:
    """A drawing in light colours in another theme."""
    if theme not in THEMES:
        raise InvalidArgument(f"no theme {theme!r}; there are {', '.join(THEMES)}")
    return THEMES[theme](svg)


def _named(svg: str, name: str, title: str, about: str) -> str:
    """Without what comes before the drawing, ids of its own, with words for who cannot see it."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r" <metadata>.*?</metadata>\n", "", svg, flags=re.S)
    svg = svg.replace("'DejaVu Sans'", _FONTS)
    svg = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    words = f' role="img" aria-label="{_plain(title)}. {_plain(about)}"'
    return svg.replace("<svg", "<svg" + words, 1)


def _plain(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")


def canvas(
    title: str, subtitle: str, *, width: float, height: float, left: float = _LEFT, right: float = _RIGHT,
    bottom: float = _BOTTOM, above: float = 0.0, panels: int = 1, gap: float = 0.2,
) -> tuple[Figure, list[Axes]]:  # fmt: skip
    """A figure with this many panels side by side, below its title; all lengths in inches.

    Args:
        height: of the panels and what is below them; `above` them more can be free for labels.

    Raises:
        Unsupported: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise Unsupported(
            "charts need matplotlib, which is not installed", hint="pip install 'kvcm-ray[optimizer]'"
        ) from error
    heads = wrapped(title, (width - 2 * _EDGE) / 0.106)
    notes = wrapped(subtitle, (width - 2 * _EDGE) / 0.071)
    top = 0.28 + 0.2 * len(heads) + 0.16 * len(notes) + above
    height += top
    with matplotlib.rc_context(_SETTINGS):
        figure = Figure(figsize=(width, height), facecolor=palette.light("paper"))
        each = (width - left - right - gap * (panels - 1)) / panels
        axes = [
            figure.add_axes(
                (
                    (left + panel * (each + gap)) / width, bottom / height, each / width,
                    (height - top - bottom) / height,
                )
            )
            for panel in range(panels)
        ]  # fmt: skip
    style: dict[str, Any] = {"ha": "left", "va": "top", "linespacing": 1.25}
    figure.text(
        _EDGE / width, 1 - 0.08 / height, "\n".join(heads), fontsize=11.5, fontweight="bold",
        color=palette.light("text"), **style,
    )  # fmt: skip
    figure.text(
        _EDGE / width, 1 - (0.12 + 0.2 * len(heads)) / height, "\n".join(notes), fontsize=9,
        color=palette.light("quiet"), **style,
    )  # fmt: skip
    for one in axes:
        _plain_axes(one)
    return figure, axes


def wrapped(text: str, letters: float) -> list[str]:
    """Lines of at most about so many letters."""
    import textwrap

    return textwrap.wrap(text, max(20, int(letters)), break_on_hyphens=False) or [""]


def _plain_axes(axes: Axes) -> None:
    """Horizontal grid lines, no frame."""
    axes.set_facecolor("none")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(palette.light("quiet"))
    axes.spines["bottom"].set_linewidth(0.8)
    axes.grid(axis="y", color=palette.light("grid"), linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(axis="both", which="both", length=0, labelsize=9, labelcolor=palette.light("quiet"))
    axes.tick_params(axis="x", which="major", length=3, color=palette.light("quiet"))


def percent_axis(axis: Any) -> None:
    """Ticks of ratios as percent."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value * 100:.4g}%"))


def capacity_axis(axes: Axes, least: float, most: float, label: str = "capacity, blocks") -> None:
    """A logarithmic axis with few round numbers."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axes.set_xscale("log")
    axes.set_xlim(least, most)
    ticks = round_numbers(least, most)
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_count(value)))
    axes.set_xlabel(label, fontsize=9, color=palette.light("quiet"))


def round_numbers(least: float, most: float) -> list[float]:
    """Numbers between two, for a logarithmic axis: 1, 2 and 5 of each power of ten, or 1 and 3."""
    powers = 10.0 ** np.arange(np.floor(np.log10(least)), np.log10(most) + 1)
    steps = (1, 2, 5) if most / least < 400 else (1, 3)
    return [n for power in powers for step in steps if least <= (n := float(power * step)) <= most]


def bytes_axis(axes: Axes, block_bytes: float) -> None:
    """The same capacities above, in bytes, at powers of two."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    least, most = (np.log2(limit * block_bytes) for limit in axes.get_xlim())
    powers = np.arange(np.ceil(least), np.floor(most) + 1)
    room = int(axes.bbox.width / axes.figure.dpi / 0.8)  #: for so many labels
    ticks = 2.0 ** powers[:: -(-len(powers) // max(1, room))]

    def to_bytes(blocks: Any) -> Any:
        return blocks * block_bytes

    def to_blocks(size: Any) -> Any:
        return size / block_bytes

    above = axes.secondary_xaxis("top", functions=(to_bytes, to_blocks))
    above.xaxis.set_major_locator(FixedLocator(ticks.tolist()))
    above.xaxis.set_minor_locator(NullLocator())
    above.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_bytes(value)))
    above.tick_params(axis="x", length=0, pad=2, labelsize=8.5, labelcolor=palette.light("quiet"))
    above.spines["top"].set_visible(False)


def short_count(count: float) -> str:
    """``950``, ``1.5k``, ``200k``, ``3M``."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:.3g}"


def short_bytes(count: float) -> str:
    """``512 MiB``, ``1.5 TiB``."""
    for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if count >= 1024**power:
            return f"{count / 1024**power:.3g} {unit}"
    return f"{count:.0f} B"


def backed() -> dict[str, Any]:
    """Keeps a label readable where it crosses a line."""
    return {"facecolor": palette.light("paper"), "edgecolor": "none", "pad": 1.2, "alpha": 0.85}
