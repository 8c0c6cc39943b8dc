"""The prefix tree drawn as an icicle: prompts begin at the left, height is look-ups, colour is hits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kvcm_ray.optimizer.report import palette
from kvcm_ray.optimizer.report.chart import Chart, canvas, round_numbers, short_count
from kvcm_ray.optimizer.report.tree import Node, Path, Tree

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LINE = 0.145  #: inches that a line of text needs
_LETTER = 0.068
_COLUMNS = (0.55, 1.1, 1.62)  #: right edges of the table beside the paths, in inches


def prefix_tree(tree: Tree, where: str, *, width: float, height: float) -> Chart:
    """`where` says which trace, policy and capacity."""
    title = _finding(tree)
    figure, (axes,) = canvas(
        title, f"{where}. Height: look-ups. Colour: share of the blocks that were hits.", width=width,
        height=height, left=0.16, right=_COLUMNS[-1] + 0.1, above=0.2, bottom=0.95,
    )  # fmt: skip
    _place_axis(axes, tree)
    rows = sum(path.node.requests for path in tree.paths) or 1
    axes.set_ylim(rows, 0)
    inches = axes.get_position().height * figure.get_figheight() / rows
    for node in tree.trunk:
        _cell(axes, node, 0, rows, inches)
    top = 0
    for path in tree.paths:
        _draw(axes, path.node, top, inches)
        _facts(axes, path, top, inches)
        top += path.node.requests
    _headings(axes, tree)
    _scale(axes)
    about = f"An icicle of {len(tree.paths)} paths, those by which most blocks were looked up."
    return Chart("prefix_tree", title, about, figure)


def _finding(tree: Tree) -> str:
    alike = sum(node.blocks for node in tree.trunk)
    blocks = f"{alike} block{'s' if alike != 1 else ''}"
    if not tree.paths:
        return (
            f"All prompts begin with the same {blocks}; no two go on alike"
            if alike
            else "No two prompts go on alike"
        )
    share = 1 - tree.requests_left / max(1, tree.requests)
    hot = tree.paths[0]
    start = f"Prompts part after {blocks}; the" if alike else "The"
    return (
        f"{start} hottest {len(tree.paths)} paths take {share:.0%} of look-ups, the first alone "
        f"{hot.accessed_blocks:,} blocks, {hot.hit_ratio:.0%} of them hits"
    )


def _place_axis(axes: Axes, tree: Tree) -> None:
    """Logarithmic: most of what is shared is near the beginning."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    most = max([2, *(path.node.end + 1 for path in tree.paths), *(node.end + 1 for node in tree.trunk)])
    axes.set_xscale("log")
    axes.set_xlim(1, most)
    axes.grid(visible=False)
    axes.set_yticks([])
    axes.xaxis.set_major_locator(FixedLocator(round_numbers(1, most)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_count(value)))
    axes.set_xlabel("block of the prompt", fontsize=9, color=palette.light("quiet"))


def _draw(axes: Axes, node: Node, top: float, inches: float) -> None:
    _cell(axes, node, top, node.requests, inches)
    for child in node.children:
        if child.requests * inches >= 0.01:  # thinner ones could not be seen
            _draw(axes, child, top, inches)
        top += child.requests


def _cell(axes: Axes, node: Node, top: float, height: float, inches: float) -> None:
    from matplotlib.patches import Rectangle

    left, right = node.start + 1, node.start + node.blocks + 1
    axes.add_patch(
        Rectangle(
            (left, top), right - left, height, facecolor=palette.light(palette.share_role(node.hit_ratio)),
            edgecolor=palette.light("paper"), linewidth=0.7 if height * inches > 0.05 else 0.2,
        )
    )  # fmt: skip
    label = f"{left:,}" if node.blocks == 1 else f"{left:,}–{right - 1:,}"
    if height == node.requests:
        label += f" · {node.requests}×"
    limits = np.log(axes.get_xlim())
    wide = axes.bbox.width / axes.figure.dpi * np.log(right / left) / (limits[1] - limits[0])
    if height * inches >= _LINE and wide > _LETTER * len(label) + 0.08:
        colour = palette.light(palette.text_role_on(node.hit_ratio))
        axes.annotate(
            label, (left, top + _first_line(height, inches)), xytext=(4, 0),
            textcoords="offset points", color=colour, fontsize=7.8, va="center",
        )  # fmt: skip


def _first_line(height: float, inches: float) -> float:
    """How far below the top of a cell the middle of its first line is, in look-ups."""
    return min(height / 2, (0.5 * _LINE + 0.04) / inches)


def _facts(axes: Axes, path: Path, top: float, inches: float) -> None:
    """The line of the table beside a path."""
    height = path.node.requests
    if height * inches < _LINE * 0.85:
        return
    middle = top + _first_line(height, inches)
    for text, edge in zip(_line(path), _COLUMNS, strict=True):
        _beside(axes, text, edge, middle, palette.light("text"))
    if path.instance and height * inches >= 2 * _LINE:
        _beside(axes, path.instance[:24], _COLUMNS[-1], middle + _LINE / inches, palette.light("quiet"))


def _line(path: Path) -> tuple[str, str, str]:
    return f"{path.node.requests:,}", short_count(path.accessed_blocks), f"{path.hit_ratio:.0%}"


def _beside(axes: Axes, text: str, edge: float, y: float, colour: str) -> None:
    axes.annotate(
        text, (1, y), xycoords=("axes fraction", "data"), xytext=(edge * 72, 0),
        textcoords="offset points", ha="right", va="center", annotation_clip=False,
        fontsize=8.2, color=colour,
    )  # fmt: skip


def _headings(axes: Axes, tree: Tree) -> None:
    for text, edge in zip(("look-ups", "blocks", "hits"), _COLUMNS, strict=True):
        axes.annotate(
            text, (1, 1), xycoords="axes fraction", xytext=(edge * 72, 5), textcoords="offset points",
            ha="right", fontsize=8.2, color=palette.light("quiet"), annotation_clip=False,
        )  # fmt: skip
    if tree.trunk:
        whole = tree.trunk[0]
        axes.annotate(
            f"all: {whole.requests:,}×", (0, 1), xycoords="axes fraction", xytext=(0, 5),
            textcoords="offset points", fontsize=8.2, color=palette.light("quiet"), annotation_clip=False,
        )  # fmt: skip


def _scale(axes: Axes) -> None:
    """Which colour is which share."""
    from matplotlib.patches import Rectangle

    figure = axes.figure
    width, height = figure.get_figwidth(), figure.get_figheight()  # type: ignore[union-attr]
    for step in range(palette.SHARES):
        figure.add_artist(
            Rectangle(
                ((0.72 + 0.3 * step) / width, 0.16 / height), 0.3 / width, 0.13 / height,
                facecolor=palette.light(f"share-{step}"), transform=figure.transFigure,
            )
        )  # fmt: skip
    style: dict[str, Any] = {"fontsize": 8.2, "color": palette.light("quiet"), "va": "center"}
    figure.text(0.16 / width, 0.225 / height, "no hits", **style)
    figure.text((0.78 + 0.3 * palette.SHARES) / width, 0.225 / height, "all hits", **style)
