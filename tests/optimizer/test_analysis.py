"""`analyse`: rows against the oracle and the parts it is made of, the knee, samples, refusals."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kvcm_ray.errors import InvalidArgument, NotFound
from kvcm_ray.optimizer import (
    READ,
    WRITE,
    Accesses,
    Costs,
    analyse,
    load,
    of_requests,
    read_catalogue,
    replay,
    save,
    worth,
)  # fmt: skip
from kvcm_ray.optimizer.analysis import Analysis, chosen_capacities, label_of, spread

CAPACITIES = [1_000, 5_000, 10_000, 30_000]
LRU = [10_252, 34_043, 51_669, 76_077]
OPTIMUM = [33_728, 64_139, 75_316, 77_953]


@pytest.fixture(scope="module")
def synthetic() -> Analysis:
    return analyse("synthetic", capacities=CAPACITIES, policies=["lru", "lfu"])


def test_rows_are_those_of_the_oracle(synthetic: Analysis) -> None:
    assert [row.hit_blocks for row in synthetic.rows_of("lru")] == LRU
    assert synthetic.optimum is not None
    assert synthetic.optimum.tolist() == OPTIMUM
    assert synthetic.infinite_hit_blocks == 77_953
    facts = synthetic.facts
    assert (facts.requests, facts.accessed_blocks, facts.unique_blocks) == (3_993, 121_877, 43_924)
    gaps = [row.optimum_gap for row in synthetic.rows_of("lru")]
    assert gaps == [(most - hits) / 121_877 for most, hits in zip(OPTIMUM, LRU, strict=True)]


def test_rows_go_by_policy_then_capacity(synthetic: Analysis) -> None:
    order = [(row.policy, row.capacity_blocks) for row in synthetic.rows]
    assert order == [(policy, capacity) for policy in ("lru", "lfu") for capacity in CAPACITIES]
    assert synthetic.hit_ratios("lfu").tolist() == [row.hit_ratio for row in synthetic.rows[4:]]


def test_hits_of_each_request_are_those_of_a_replay(synthetic: Analysis) -> None:
    row = synthetic.rows_of("lfu")[1]
    hits = synthetic.hits(row)
    assert int(hits.sum()) == row.hit_blocks
    assert np.array_equal(hits, replay(load("synthetic"), "lfu", 5_000))


def test_the_curve_agrees_with_the_rows(synthetic: Analysis) -> None:
    assert synthetic.curve is not None
    assert synthetic.curve.at(synthetic.capacities).tolist() == LRU


def test_parts_add_up_and_are_there_only_if_told_apart() -> None:
    assert analyse(of_requests([[1, 2], [1, 2]]), policies=["lru"]).parts == {}
    found = analyse(turns_and_classes(), capacities=[8], policies=["lru"])
    assert [part.label for part in found.parts["turn"]] == ["1", "2"]
    assert [part.label for part in found.parts["class"]] == ["text", "code"]
    for parts in found.parts.values():
        assert sum(part.totals.hit_blocks for part in parts) == found.knee.hit_blocks
    assert [row["label"] for row in found.to_dict()["by_turn"]] == ["1", "2"]


def turns_and_classes() -> Accesses:
    from dataclasses import replace

    accesses = of_requests([[1, 2], [3, 4], [1, 2, 5], [3, 4, 6]])
    turns, classes = np.array([1, 1, 2, 2]), np.array([0, 1, 0, 1], np.int32)
    return replace(accesses, turns=turns, classes=classes, class_names=("text", "code"))


def test_settings_reach_the_replays() -> None:
    accesses = of_requests([[1], [1], [1]], times_s=[0, 10, 100])
    assert analyse(accesses, policies=["lru"]).rows[-1].hit_blocks == 2
    forgetful = analyse(accesses, policies=["lru"], ttl_s=20)
    assert forgetful.rows[-1].hit_blocks == 1
    assert int(forgetful.hits(forgetful.knee).sum()) == 1


def test_look_ups_without_writes_only_look() -> None:
    accesses = of_requests([[1, 2], [1, 2], [1, 2]], ops=[READ, WRITE, READ])
    found = analyse(accesses, capacities=[1, 2], policies=["lru"])
    assert [row.hit_blocks for row in found.rows] == [1, 2]
    assert (found.facts.requests, found.facts.accessed_blocks) == (3, 4)
    assert found.optimum_exact is False


def test_an_empty_cache_of_a_trace_without_repeats() -> None:
    found = analyse(of_requests([[1], [2], [3]]), policies=["lru"])
    assert found.infinite_hit_blocks == 0
    assert found.knee.hit_ratio == 0
    assert "no cache has any hits" in found.figure("hit_ratio").title
    for name in found.figures:
        found.figure(name).svg()


# -------------------------------------------------------------------------------------------- money


def priced(**more: object) -> Analysis:
    catalogue = read_catalogue()
    costs = Costs(
        gpu=catalogue.gpu("h100"), price_per_hour=3.0, utilisation=0.5, tiers=(catalogue.tier("dram"),)
    )
    return analyse(
        "synthetic", capacities=CAPACITIES, policies=["lru_head_first", "lru"], costs=costs,
        model=catalogue.model("llama-3-8b"), **more,
    )  # type: ignore[arg-type]  # fmt: skip


def test_rows_are_worth_what_the_economics_say() -> None:
    found = priced()
    model, costs = found.model, found.costs
    assert model is not None
    assert costs is not None
    row = found.rows_of("lru")[2]
    expected = worth(load("synthetic"), found.hits(row), model, costs, 10_000)
    assert row.worth == expected
    told = row.to_dict()
    assert told["gpu_hours_saved"] == expected.gpu_hours_saved
    assert told["ttft_change_mean_s"] == expected.change_s.mean < 0
    assert told["capacity_bytes"] == 10_000 * 512 * 2 * 32 * 8 * 128 * 2
    assert (
        found.to_dict()["money"].items() >= {"model": "llama-3-8b", "gpu": "h100", "utilisation": 0.5}.items()
    )
    assert "money" in found.figures
    assert "leave the most" in found.figure("money").title


def test_the_best_is_one_that_a_group_can_have() -> None:
    found = priced()
    assert found.best is not None
    assert found.best.policy == "lru"
    nets = [row.worth.net_usd for row in found.rows_of("lru") if row.worth]
    assert found.best.worth is not None
    assert found.best.worth.net_usd == max(nets)
    update = found.group_update()
    assert (update["policy"], update["quota"]) == ("lru", found.best.capacity_blocks * 67_108_864)
    with pytest.raises(InvalidArgument, match="lru_head_first"):
        found.group_update(found.rows[0])


def test_targets_and_budgets() -> None:
    assert priced(target_hit_ratio=0.4).recommended.capacity_blocks == 10_000
    assert priced(target_hit_ratio=0.4).why_best == "the cheapest that reaches 0.4"
    cheap = priced(budget_usd_per_hour=1.0)
    assert cheap.recommended.capacity_blocks == 1_000
    with pytest.raises(NotFound, match=r"nothing reaches a hit ratio of 0\.9"):
        priced(target_hit_ratio=0.9)


def test_without_prices_a_target_still_finds_the_smallest() -> None:
    found = analyse("synthetic", capacities=CAPACITIES, policies=["lru"], target_hit_ratio=0.4)
    assert (found.recommended.capacity_blocks, found.why_best) == (10_000, "the smallest that reaches 0.4")
    with pytest.raises(InvalidArgument, match="how large a block is"):
        found.group_update()


# ------------------------------------------------------------------------------------------ samples


def test_a_rate_gives_estimates(tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl.gz"
    save(load("synthetic"), file)
    exact = analyse(file, capacities=CAPACITIES, policies=["lru"])
    near = analyse(file, capacities=CAPACITIES, policies=["lru"], rate=0.125)
    assert near.facts.sample_rate == 0.125
    assert near.facts.unique_blocks == pytest.approx(exact.facts.unique_blocks, rel=0.05)
    assert near.hit_ratios("lru") == pytest.approx(exact.hit_ratios("lru"), abs=0.01)
    assert near.figures == ("hit_ratio",)
    assert "estimated from 0.125 of the blocks" in near.about
    with pytest.raises(InvalidArgument, match="not of each"):
        near.hits(near.knee)
    assert {path.name for path in near.write(tmp_path / "out")} == {
        "result.json", "curve.csv", "hit_ratio.svg", "hit_ratio.dark.svg", "report.html",
    }  # fmt: skip


# ----------------------------------------------------------------------------------------- refusals


def test_refusals() -> None:
    accesses = of_requests([[1], [1]])
    for arguments, words in (
        ({"policies": ["fifo"]}, "no policy 'fifo' to replay; there are lru"),
        ({"policies": []}, "at least one name"),
        ({"policies": "lru"}, "a list"),
        ({"capacities": []}, "at least one capacity"),
        ({"capacities": [1 << 64]}, "at most 9,007,199,254,740,992 blocks"),
        ({"capacities": [5, 0]}, "at least one block, got 0"),
        ({"policies": ["lru", "lfu"], "rate": 0.5}, "estimates of lru only"),
        ({"policies": ["lru"], "rate": 0.5, "ttl_s": 3}, "neither a ttl"),
        ({"policies": ["lru"], "rate": 0.0}, "rate"),
        ({"budget_usd_per_hour": 1.0}, "a budget needs a model"),
    ):
        with pytest.raises(InvalidArgument, match=words):
            analyse(accesses, **arguments)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="was not analysed"):
        analyse(accesses, policies=["lru"]).rows_of("lfu")


# ----------------------------------------------------------------------------------------- choices


def test_capacities() -> None:
    assert spread(1, 1000, 4).tolist() == [1, 10, 100, 1000]
    assert chosen_capacities([5, 3, 5], 9).tolist() == [3, 5]
    found = chosen_capacities(None, 64_000)
    assert (len(found), found[0], found[-1]) == (40, 1_000, 64_000)
    assert chosen_capacities(None, 0).tolist() == [1]
    assert chosen_capacities(None, 3).tolist() == [1, 2, 3]


def test_labels() -> None:
    assert label_of("/data/day-1.jsonl.gz") == "day-1"
    assert label_of("conversation") == "conversation"


def test_matplotlib_is_loaded_only_to_draw() -> None:
    code = (
        "import sys; from kvcm_ray.optimizer import analyse\n"
        "analyse('synthetic', policies=['lru']).to_dict()\n"
        "assert 'matplotlib' not in sys.modules and 'ray' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
