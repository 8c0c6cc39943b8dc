"""Colours by what they mean, for a light and for a dark page.

Charts are drawn in the light colours. Every colour stands for one role, so a drawing becomes a dark
one, or one that follows the page it is on, by exchanging the colours in its text. Series are told
apart by people of all kinds of colour vision (after Okabe and Ito), and also by their labels.
"""

from __future__ import annotations

from collections.abc import Sequence

#: role -> (light, dark). No two roles share a light colour, and none is pure black, which the SVG
#: writer of matplotlib leaves out.
COLOURS = {
    "paper": ("#ffffff", "#14171a"),
    "text": ("#1d2226", "#e8ebed"),
    "quiet": ("#5b646c", "#a3adb5"),
    "grid": ("#e3e6e8", "#2c3238"),
    "optimum": ("#3c444b", "#cdd4d9"),
    "series-1": ("#0068a8", "#58b1ea"),
    "series-2": ("#c44e00", "#ff9457"),
    "series-3": ("#008764", "#3fcf9f"),
    "series-4": ("#9c4f97", "#e29bdd"),
    "series-5": ("#8a6a00", "#e3bf3f"),
    "series-6": ("#6a5acd", "#a9a0ff"),
    "series-7": ("#a8324a", "#ff8fa0"),
    "good": ("#007a5a", "#45d3a2"),
    "bad": ("#b04503", "#ff9a61"),
    # Share of hits, from none to all: pale to strong on paper, and dark to bright on a dark page.
    "share-0": ("#eef0f1", "#23282d"),
    "share-1": ("#d3e4f0", "#1f3647"),
    "share-2": ("#b3d2e8", "#1f4763"),
    "share-3": ("#8abbdc", "#235c85"),
    "share-4": ("#5c9fcd", "#2f76a8"),
    "share-5": ("#2f7fb8", "#4b98cd"),
    "on-strong": ("#fdfefe", "#0b0d0f"),
}
SHARES = 6  #: steps of the scale of shares

_KNOWN = {
    "lru": "series-1",
    "adaptive": "series-2",
    "lfu": "series-3",
    "ttl": "series-4",
    "lru_head_first": "series-5",
}


def light(role: str) -> str:
    """The colour to draw with."""
    return COLOURS[role][0]


def role_of_policy(policy: str, policies: Sequence[str]) -> str:
    """A policy has the same colour in every chart; unknown ones get what the others leave."""
    if policy in _KNOWN:
        return _KNOWN[policy]
    others = [name for name in policies if name not in _KNOWN]
    return ("series-6", "series-7")[others.index(policy) % 2] if policy in others else "series-6"


def share_role(share: float) -> str:
    """The step of the scale for a share between 0 and 1."""
    return f"share-{min(SHARES - 1, int(share * SHARES))}"


def text_role_on(share: float) -> str:
    """What is readable on that step."""
    step = min(SHARES - 1, int(share * SHARES))
    return "on-strong" if step >= SHARES - 1 else "text"


def dark(svg: str) -> str:
    """A drawing in light colours, made dark."""
    return _exchanged(svg, {role: colours[1] for role, colours in COLOURS.items()})


def following(svg: str) -> str:
    """A drawing in light colours, made to take those of the page: the variables of `style`."""
    return _exchanged(svg, {role: f"var(--{role})" for role in COLOURS})


def style() -> str:
    """The variables, light unless the reader prefers dark."""
    lights, darks = (
        " ".join(f"--{role}: {colours[at]};" for role, colours in COLOURS.items()) for at in (0, 1)
    )
    return f":root {{ {lights} }}\n@media (prefers-color-scheme: dark) {{ :root {{ {darks} }} }}"


def _exchanged(svg: str, by_role: dict[str, str]) -> str:
    # Values of the new colours are never among the old ones that are still to come: a dark colour
    # equal to a light one would be exchanged twice.
    marks = {role: f"\0{role}\0" for role in COLOURS}
    for role, (old, _) in COLOURS.items():
        svg = svg.replace(old, marks[role])
    for role, mark in marks.items():
        svg = svg.replace(mark, by_role[role])
    return svg
