"""What is drawn and written: colours, charts, the prefix tree, over time, text, the page."""

from __future__ import annotations

import csv
import json
import re
import xml.dom.minidom
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kvcm_ray.errors import InvalidArgument
from kvcm_ray.optimizer import READ, WRITE, analyse, of_requests
from kvcm_ray.optimizer.analysis import Analysis
from kvcm_ray.optimizer.report import palette
from kvcm_ray.optimizer.report.chart import canvas, round_numbers, short_bytes, short_count
from kvcm_ray.optimizer.report.overtime import over_time
from kvcm_ray.optimizer.report.text import shown
from kvcm_ray.optimizer.report.tree import hottest

# Two dialogues behind a common block 1: 10.. grows by one block a turn, 20.. is asked for twice; 30 once.
REQUESTS = [
    [1, 10], [1, 20, 21, 22, 23], [1, 10, 11], [1, 20, 21, 22, 23], [1, 10, 11, 12], [1, 30],
]  # fmt: skip


@pytest.fixture(scope="module")
def analysis() -> Analysis:
    return analyse("synthetic", capacities=[1_000, 5_000, 20_000, 43_924], policies=["lru", "lfu"])


# ----------------------------------------------------------------------------------------- colours


def test_every_light_colour_stands_for_one_role_and_survives_exchange() -> None:
    lights = [light for light, _ in palette.COLOURS.values()]
    assert len(set(lights)) == len(lights)
    assert "#000000" not in lights
    drawn = " ".join(lights)
    assert palette.dark(drawn).split() == [dark for _, dark in palette.COLOURS.values()]
    assert palette.following(drawn).split() == [f"var(--{role})" for role in palette.COLOURS]


def luminance(colour: str) -> float:
    channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [0, 1])
@pytest.mark.parametrize(
    "role",
    [
        r
        for r in palette.COLOURS
        if r.startswith("series") or r in ("text", "quiet", "good", "bad", "optimum")
    ],
)
def test_lines_and_text_stand_out_from_the_paper(role: str, theme: int) -> None:
    assert contrast(palette.COLOURS[role][theme], palette.COLOURS["paper"][theme]) >= 4.5


@pytest.mark.parametrize("theme", [0, 1])
@pytest.mark.parametrize("share", [0.0, 0.2, 0.4, 0.6, 0.7, 0.9, 1.0])
def test_text_stands_out_from_the_scale_of_shares(share: float, theme: int) -> None:
    text, step = palette.text_role_on(share), palette.share_role(share)
    assert contrast(palette.COLOURS[text][theme], palette.COLOURS[step][theme]) >= 4.0


def test_policies_have_colours_of_their_own() -> None:
    names = ["lru", "lfu", "adaptive", "ttl", "lru_head_first", "mine", "yours"]
    roles = [palette.role_of_policy(name, names) for name in names]
    assert len(set(roles)) == len(names)


# ------------------------------------------------------------------------------------------ charts


def test_each_chart_is_a_drawing_in_each_theme(analysis: Analysis) -> None:
    assert analysis.figures == ("hit_ratio", "policies", "over_time", "prefix_tree")
    for name in analysis.figures:
        chart = analysis.figure(name)
        light, dark, page = (chart.svg(theme) for theme in ("light", "dark", "page"))
        for svg in (light, dark, page):
            xml.dom.minidom.parseString(svg)
        told = {colour.lower() for colour in re.findall(r"#[0-9a-fA-F]{6}\b", light)}
        assert told <= {pair[0] for pair in palette.COLOURS.values()}, name
        assert not re.search(r"#[0-9a-f]{6}\b", page), f"{name} has a colour that no page can change"
        assert palette.COLOURS["paper"][1] in dark
        assert light == chart.svg("light"), "the same each time"
    with pytest.raises(InvalidArgument, match="no theme 'blue'"):
        chart.svg("blue")


def test_charts_say_what_was_found(analysis: Analysis) -> None:
    svg = analysis.figure("hit_ratio").svg()
    for text in ("offline optimum", "endless cache", "knee of lru", ">lru<", ">lfu<"):
        assert text in svg, text
    assert "ahead of" in analysis.figure("policies").title
    assert analysis.figure("hit_ratio")._repr_svg_() == svg


def test_charts_say_what_policies_are_compared_with(analysis: Analysis) -> None:
    apart = of_requests([[1, 2], [1, 2], [1, 2], [3, 4], [1, 2]], ops=[READ, WRITE, READ, WRITE, READ])
    bound = analyse(apart, capacities=[1, 2, 4], policies=["lru"])
    assert "optimum, at most" in bound.figure("hit_ratio").svg()
    assert "below an upper bound of the optimum at worst" in bound.figure("policies").title
    assert "the optimum" in analysis.figure("policies").svg()


def test_a_knee_at_an_end_is_no_finding() -> None:
    beyond = "beyond that each block brings less"
    assert beyond not in analyse("synthetic", capacities=[1_000], policies=["lru"]).figure("hit_ratio").title


def test_unknown_charts_are_refused(analysis: Analysis) -> None:
    with pytest.raises(InvalidArgument, match="no chart 'pie' here; there are hit_ratio"):
        analysis.figure("pie")


def test_long_titles_are_wrapped_and_make_the_figure_higher() -> None:
    short, _ = canvas("Short", "", width=5, height=3)
    tall, _ = canvas("A finding of many words " * 5, "", width=5, height=3)
    assert tall.get_figheight() > short.get_figheight() + 0.3


def test_round_numbers() -> None:
    assert round_numbers(900, 60_000) == [1000, 2000, 5000, 10_000, 20_000, 50_000]
    assert round_numbers(1, 5_000) == [1, 3, 10, 30, 100, 300, 1000, 3000]
    assert [short_count(n) for n in (7, 950, 1_500, 200_000, 3_000_000)] == ["7", "950", "1.5k", "200k", "3M"]
    assert [short_bytes(n) for n in (12, 512 << 20, 3 << 39)] == ["12 B", "512 MiB", "1.5 TiB"]


# -------------------------------------------------------------------------------------------- tree


def test_tree_of_the_hottest_paths() -> None:
    accesses = of_requests(REQUESTS, block_tokens=16)
    tree = hottest(accesses, np.array([0, 1, 2, 5, 3, 1], np.int32))
    (trunk,) = tree.trunk
    assert (trunk.start, trunk.blocks, trunk.requests, trunk.hit_blocks) == (0, 1, 6, 5)
    first, second = tree.paths
    assert (first.node.start, first.node.blocks, first.node.requests) == (1, 4, 2), "20 to 23"
    assert (first.accessed_blocks, first.hit_blocks, first.hit_ratio) == (8, 4, 0.5)
    assert (second.node.blocks, second.node.requests, second.accessed_blocks) == (1, 3, 6)
    (child,) = second.node.children
    assert (child.start, child.blocks, child.requests) == (2, 1, 2), "11; 12 is asked for only once"
    assert (tree.paths_left, tree.requests_left) == (1, 1), "30"


def test_tree_counts_every_block_once_whatever_is_shown() -> None:
    accesses = of_requests(REQUESTS)
    tree = hottest(accesses, np.zeros(6, np.int32), paths_max=1)
    assert [path.node.requests for path in tree.paths] == [2]
    assert (tree.paths_left, tree.requests_left) == (2, 4)


def test_what_all_prompts_share_is_said_where_nothing_else_is() -> None:
    same = analyse(of_requests([[1, 2], [1, 2]]), policies=["lru"])
    assert same.figure("prefix_tree").title == "All prompts begin with the same 2 blocks; no two go on alike"


def test_a_trace_without_a_tree_is_refused() -> None:
    accesses = of_requests([[1, 2], [2, 1]])
    with pytest.raises(InvalidArgument, match="come after different ones"):
        hottest(accesses, np.zeros(2, np.int32))


# ---------------------------------------------------------------------------------------- over time


def test_over_time_adds_up() -> None:
    accesses = of_requests(REQUESTS, times_s=[0, 1, 2, 3, 4, 10])
    hits = np.array([0, 1, 2, 5, 3, 1], np.int32)
    series = over_time(accesses, hits, windows=5)
    assert series.in_seconds
    assert series.ends.tolist() == [2, 4, 6, 8, 10]
    assert series.accessed.tolist() == [7, 8, 4, 0, 2]
    assert series.hits.tolist() == [1, 7, 3, 0, 1]
    assert np.isnan(series.ratios[3])
    assert series.cumulative[-1] == 12 / 21


def test_over_time_counts_requests_where_times_say_nothing() -> None:
    accesses = replace(of_requests(REQUESTS), times_s=np.zeros(6))
    assert not over_time(accesses, np.zeros(6, np.int32)).in_seconds


# -------------------------------------------------------------------------------------------- files


def test_files(analysis: Analysis, tmp_path: Path) -> None:
    names = {path.name for path in analysis.write(tmp_path / "new" / "folder")}
    drawn = {f"{name}{theme}.svg" for name in analysis.figures for theme in ("", ".dark")}
    assert names == drawn | {"result.json", "curve.csv", "requests.csv", "report.html"}
    folder = tmp_path / "new" / "folder"
    assert json.loads((folder / "result.json").read_text()) == analysis.to_dict()
    with (folder / "curve.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["hit_blocks"]) for row in rows] == [row.hit_blocks for row in analysis.rows]
    assert rows[0]["optimum_hit_blocks"] == "33728"
    with (folder / "requests.csv").open() as file:
        hits = [int(row["hit_blocks"]) for row in csv.DictReader(file)]
    assert sum(hits) == analysis.knee.hit_blocks


def test_the_page_needs_nothing_else(analysis: Analysis, tmp_path: Path) -> None:
    analysis.write(tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "prefers-color-scheme: dark" in page
    assert not re.search(r'(src|href)="(?!#)', page), "something is loaded"
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids)), "drawings share ids"
    assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', page)) <= set(ids)


def test_names_from_a_trace_are_text_on_the_page(analysis: Analysis) -> None:
    from kvcm_ray.optimizer.report.page import page

    named = replace(analysis, label='<b>&"x"')
    html = page(named, {"hit_ratio": named.figure("hit_ratio").svg()})
    assert "<b>&" not in html
    assert "&lt;b&gt;&amp;" in html


def test_a_folder_that_cannot_be_written_is_an_error_with_its_name(
    analysis: Analysis, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidArgument, match="cannot write the report to "):
        analysis.write(tmp_path / "file")


def test_the_table_shows_some_capacities_and_those_that_matter() -> None:
    many = analyse("synthetic", policies=["lru"])
    rows = shown(many, 6)
    capacities = [row.capacity_blocks for row in rows]
    assert capacities[0] == many.capacities[0]
    assert capacities[-1] == many.capacities[-1]
    assert many.knee.capacity_blocks in capacities
    assert len(rows) in (6, 7)
