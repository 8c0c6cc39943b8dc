"""``report.html``: one file with charts and tables, for a light or a dark screen, large or small.

It loads nothing: styles and drawings are in it. Charts are drawn twice, wide and for phones; the page
shows the one that fits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING

from kvcm_ray.optimizer.report import palette, text

if TYPE_CHECKING:
    from kvcm_ray.optimizer.analysis import Analysis

_NARROW_WIDTH = 4.4  #: inches

_STYLE = """
:root { color-scheme: light dark; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 64rem; background: var(--paper);
  color: var(--text); font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Arial, sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .25rem; }
h2 { font-size: 1.1rem; margin: 2.5rem 0 .5rem; }
p { margin: .4rem 0; max-width: 46rem; }
.quiet { color: var(--quiet); font-size: .9rem; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .75rem;
  margin: 1.25rem 0; padding: 0; }
.facts div { border-top: 2px solid var(--series-1); padding-top: .4rem; }
.facts dt { color: var(--quiet); font-size: .85rem; }
.facts dd { margin: 0; font-size: 1.35rem; font-variant-numeric: tabular-nums; }
.facts small { display: block; font-size: .8rem; color: var(--quiet); }
figure { margin: 1.5rem -.5rem; }
figure svg { width: 100%; height: auto; display: block; }
figure .narrow { display: none; }
@media (max-width: 34rem) {
  figure .narrow { display: block; } figure .wide { display: none; }
}
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .85rem; }
th, td { padding: .25rem .6rem .25rem 0; text-align: right; white-space: nowrap; }
th { color: var(--quiet); font-weight: 600; border-bottom: 1px solid var(--quiet); }
td { border-bottom: 1px solid var(--grid); }
th:first-child, td:first-child, th:last-child, td:last-child { text-align: left; }
tr.marked td { font-weight: 650; }
"""


def page(analysis: Analysis, drawings: Mapping[str, str]) -> str:
    """The page, with these charts: their names, and their drawings in light colours."""
    title = f"Cache capacity for {analysis.label}"
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="quiet">{escape(analysis.about)}</p>',
        _facts(analysis),
        *(f"<p>{escape(sentence)}</p>" for sentence in text.sentences(analysis)),
        *(_figure(analysis, name, drawing) for name, drawing in drawings.items()),
        *_tables(analysis),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{palette.style()}{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def _facts(analysis: Analysis) -> str:
    knee = analysis.knee
    facts = [
        ("hits at the knee", f"{knee.hit_ratio:.1%}", f"{knee.policy}, {knee.capacity_blocks:,} blocks"),
        ("endless cache", f"{analysis.infinite_hit_ratio:.1%}", f"{analysis.facts.unique_blocks:,} blocks"),
    ]
    if knee.optimum_gap is not None:
        bound = "optimum" if analysis.optimum_exact else "bound of the optimum"
        facts.append((f"to the {bound} there", f"{knee.optimum_gap * 100:.1f} pt", "of hit ratio"))
    if analysis.best is not None:
        best = analysis.best
        facts.append(
            ("best", f"{best.capacity_blocks:,} blocks", f"{best.policy}, {best.hit_ratio:.1%} hits")
        )
    items = (
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}<small>{escape(more)}</small></dd></div>"
        for name, value, more in facts
    )
    return f'<dl class="facts">{"".join(items)}</dl>'


def _figure(analysis: Analysis, name: str, drawing: str) -> str:
    narrow = analysis.figure(name, width=_NARROW_WIDTH)
    narrow.name += "-narrow"  # ids of drawings on one page must differ
    return (
        f'<figure><div class="wide">{palette.following(drawing)}</div>'
        f'<div class="narrow">{narrow.svg("page")}</div></figure>'
    )


def _tables(analysis: Analysis) -> Iterable[str]:
    yield "<h2>Policies and capacities</h2>"
    rows = text.shown(analysis, 14)
    if len(rows) < len(analysis.rows):
        yield '<p class="quiet">Some of the capacities; curve.csv has them all.</p>'
    marked = [bool(text.cells(analysis, row)[-1]) for row in rows]
    yield _table(text.headings(analysis), [text.cells(analysis, row) for row in rows], marked)
    knee = analysis.knee
    for by, parts in text.parts(analysis).items():
        yield f"<h2>By {by}</h2>"
        yield f'<p class="quiet">{escape(knee.policy)} at {knee.capacity_blocks:,} blocks.</p>'
        yield _table([by, *text.PART_HEADINGS, ""], [[*part, ""] for part in parts[:50]], [])


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]], marked: Sequence[bool]) -> str:
    """`marked` rows are bold; those behind its end are not."""
    head = "".join(f"<th>{escape(heading)}</th>" for heading in headings)
    lines = [_line(row, at < len(marked) and marked[at]) for at, row in enumerate(rows)]
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _line(cells: Sequence[str], marked: bool) -> str:
    start = '<tr class="marked">' if marked else "<tr>"
    return start + "".join(f"<td>{escape(str(cell))}</td>" for cell in cells) + "</tr>"
