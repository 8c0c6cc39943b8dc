"""vLLM's CPU build with the connector, end to end: what is computed, what is not, and that it is the same.

Outputs are greedy and compared with an engine that has no connector. The engine's own prefix cache is off
where hits are counted, so that they can only be ours. One engine runs at a time.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvcm_ray.cluster import Manager
from kvcm_ray.testing.engines import Engine, deepseek, engine, lfm2, olmo3, tokens, wait_until

BLOCK = 32
P = tokens(1, 1500)
Q = P[:1100] + tokens(2, 300)
PREFIXES, SUFFIXES = 40, 5


def whole(count: int) -> int:
    """Tokens in the full blocks of so many."""
    return count // BLOCK * BLOCK


def many_prompts() -> list[list[int]]:
    """Every prefix with every suffix; lengths are random."""
    random = np.random.default_rng(7)
    prefixes = [tokens(100 + number, int(random.integers(40, 400))) for number in range(PREFIXES)]
    lengths = random.integers(5, 90, (PREFIXES, SUFFIXES))
    return [
        prefix + tokens(1000 + 10 * number + suffix, int(lengths[number, suffix]))
        for suffix in range(SUFFIXES)
        for number, prefix in enumerate(prefixes)
    ]


@pytest.fixture(scope="module")
def expected(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What an engine without connector says."""
    with engine(tiny_llama, tmp_path_factory.mktemp("reference") / "log") as found:
        turn = P + found.one(P, 80)["tokens"] + tokens(3, 50)
        return {
            "P": found.one(P)["tokens"],
            "Q": found.one(Q)["tokens"],
            "turn": turn,
            "after turn": found.one(turn)["tokens"],
            "many": [answer["tokens"] for answer in found.generate(many_prompts())],
        }


def connector(running: Manager, instance_id: str = "", **more: Any) -> dict[str, Any]:
    return {"kvcm_data_dir": str(running.data_dir), "instance_id": instance_id, **more}


def check_warm(found: Engine, expected: dict[str, Any]) -> None:
    """P is there as a whole, Q in part, and both outputs are right."""
    warm, part = found.one(P), found.one(Q)
    assert (warm["cached"], warm["tokens"]) == (whole(len(P)), expected["P"])
    assert part["cached"] >= whole(1100)
    assert part["tokens"] == expected["Q"]


def full_hit(found: Engine, prompt: list[int]) -> bool:
    """All full blocks were loaded. (vLLM's own figure does not say if a load failed.)"""
    before = found.metrics()["vllm:kvcm_failed_loads"]
    found.reset()
    cached = found.one(prompt, 1)["cached"]
    return cached == whole(len(prompt)) and found.metrics()["vllm:kvcm_failed_loads"] == before


def wait_saved(found: Engine, prompt: list[int], count: int) -> None:
    wait_until(lambda: found.one(prompt, 1)["cached"] == count, what=f"a hit of {count} tokens")


def test_another_request_and_another_process_compute_only_the_rest(
    running: Manager, tiny_llama: Path, tmp_path: Path, expected: dict[str, Any]
) -> None:
    with engine(tiny_llama, tmp_path / "log", connector(running, "same")) as first:
        cold = first.one(P)
        assert (cold["cached"], cold["tokens"]) == (0, expected["P"])
        wait_saved(first, P, whole(len(P)))
        check_warm(first, expected)
        # What was generated is saved too: the next turn of a conversation finds it.
        answer = first.one(P, 80)
        turn = expected["turn"]
        assert P + answer["tokens"] == turn[: len(P) + 80]
        wait_saved(first, turn[: len(P) + 80], whole(len(P) + 79))
        after = first.one(turn)
        assert (after["cached"], after["tokens"]) == (whole(len(P) + 79), expected["after turn"])
        figures = first.metrics()
        assert figures["vllm:kvcm_failed_loads"] == 0
        assert figures["vllm:kvcm_saved_blocks"] >= (len(P) + 79) // BLOCK
        assert figures["vllm:prompt_tokens_cached_by_source{source=host}"] > 0
        assert figures["vllm:kvcm_load_seconds_count"] >= 3
    with engine(tiny_llama, tmp_path / "log", connector(running, "same")) as other:
        check_warm(other, expected)


def test_many_prompts_have_the_same_outputs(
    running: Manager, tiny_llama: Path, tmp_path: Path, expected: dict[str, Any]
) -> None:
    prompts = many_prompts()
    with engine(tiny_llama, tmp_path / "log", connector(running, "many")) as found:
        answers = []
        for start in range(0, len(prompts), PREFIXES):
            answers += found.generate(prompts[start : start + PREFIXES])
        figures = found.metrics()
    assert len(answers) >= 200
    wrong = [i for i, a in enumerate(answers) if a["tokens"] != expected["many"][i]]
    assert not wrong, f"{len(wrong)} of {len(answers)} outputs differ, first {wrong[0]}"
    hits = sum(answer["cached"] > 0 for answer in answers)
    assert hits > 0.7 * (len(answers) - PREFIXES)
    assert figures["vllm:kvcm_failed_loads"] == 0


def test_by_url_alone(running: Manager, tiny_llama: Path, tmp_path: Path, expected: dict[str, Any]) -> None:
    """No data directory: look-ups are calls that the request waits for, not the scheduler."""
    settings = {"kvcm_url": running.url, "instance_id": "by-url", "lookup_timeout_s": 2.0}
    with engine(tiny_llama, tmp_path / "log", settings) as found:
        assert found.one(P)["tokens"] == expected["P"]
        wait_saved(found, P, whole(len(P)))
        check_warm(found, expected)


def test_loads_within_the_step_beside_the_engines_own_cache(
    running: Manager, tiny_llama: Path, tmp_path: Path, expected: dict[str, Any]
) -> None:
    settings = connector(running, "in-step", async_load=False)
    with engine(tiny_llama, tmp_path / "log", settings, enable_prefix_caching=True) as found:
        assert found.one(P)["tokens"] == expected["P"]
        wait_until(lambda: full_hit(found, P))
        found.reset()
        warm = found.one(P)
        assert (warm["cached"], warm["tokens"]) == (whole(len(P)), expected["P"])
        assert found.one(Q)["tokens"] == expected["Q"]
        damage(running, "in-step")
        found.reset()
        assert found.one(P)["tokens"] == expected["P"]
        assert found.metrics()["vllm:kvcm_failed_loads"] >= 1
        # Nothing that was computed upon the bad blocks was saved.
        wait_until(lambda: full_hit(found, P))
        found.reset()
        check_warm(found, expected)


def data_files(running: Manager, instance_id: str) -> list[Path]:
    from kvcm_ray.actors import paths

    roots = [paths.shm_dir(Path(running.data_dir)), Path(running.data_dir) / "tiers"]
    found = [path for root in roots for path in root.glob(f"*/{instance_id}/*/*.dat")]
    assert found, f"{instance_id} has no data files"
    return found


def damage(running: Manager, instance_id: str) -> None:
    """Overwrite every byte of an instance's blocks."""
    for path in data_files(running, instance_id):
        size = path.stat().st_size
        with path.open("r+b") as file:
            for _ in range(0, size, 1 << 20):
                file.write(b"\xa5" * min(1 << 20, size))


def test_two_ranks(running: Manager, tiny_llama: Path, tmp_path: Path, expected: dict[str, Any]) -> None:
    """Each has a spec of its own."""
    more: dict[str, Any] = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    with engine(tiny_llama, tmp_path / "log", connector(running, "two-ranks"), **more) as found:
        assert found.one(P)["tokens"] == expected["P"]
        wait_saved(found, P, whole(len(P)))
        check_warm(found, expected)
        assert {path.stem for path in data_files(running, "two-ranks")} == {"tp0", "tp1"}
        lose_bytes(running, found, "two-ranks", expected["P"])


def test_sliding_windows(running: Manager, tmp_path: Path) -> None:
    """Three groups, two of them with windows of 128 tokens, of which only some blocks are kept."""
    other = P[:1100] + tokens(9, 200)
    with engine(olmo3(tmp_path / "olmo3"), tmp_path / "log", connector(running, "windows")) as found:
        cold = found.generate([P, Q, other])
        assert [answer["cached"] for answer in cold] == [0, 0, 0]
        assert len(set(cold[0]["tokens"])) > 3
        wait_saved(found, P, whole(len(P)))
        forget(running, "windows")
        assert found.one(P)["cached"] == 0
        wait_saved(found, P, whole(len(P)))
        assert found.one(P)["tokens"] == cold[0]["tokens"]
        # P has a window behind 1024 tokens, and where the second prompt parts from it the third goes on.
        second = found.one(Q)
        assert (second["cached"], second["tokens"]) == (1024, cold[1]["tokens"])
        wait_saved(found, Q, whole(len(Q)))
        third = found.one(other)
        assert (third["cached"], third["tokens"]) == (whole(1100), cold[2]["tokens"])
        assert {path.stem for path in data_files(running, "windows")} == {"tp0-g0", "tp0-g1", "tp0-g2"}
        lose_bytes(running, found, "windows", cold[0]["tokens"])


def forget(running: Manager, instance_id: str) -> None:
    from kvcm_ray.client import connect

    with connect(running.url) as client:
        client.instance(instance_id).trim()


def lose_bytes(running: Manager, found: Engine, instance_id: str, correct: list[int]) -> None:
    damage(running, instance_id)  # with several groups the engine computes all of the prompt again
    assert found.one(P)["tokens"] == correct
    assert found.metrics()["vllm:kvcm_failed_loads"] >= 1


def test_latent_attention(running: Manager, tmp_path: Path) -> None:
    """MLA. The CPU build computes a prompt as if nothing was before it, so it is given whole prompts only.

    It also computes a prompt's tokens otherwise than generated ones. So the token behind the loaded prompt
    is one that was generated, and what follows has to be what followed then.
    """
    prompt = tokens(5, 16 * 60)
    with engine(deepseek(tmp_path / "mla"), tmp_path / "log", connector(running, "mla")) as found:
        cold = found.one(prompt, 12)["tokens"]
        wait_saved(found, prompt + cold[:1], len(prompt))
        warm = found.one(prompt + cold[:1], 11)
        assert (warm["cached"], warm["tokens"]) == (len(prompt), cold[1:])
        assert found.one(prompt + tokens(6, 40))["cached"] == 0


def test_a_model_with_states_runs_without_the_cache(running: Manager, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with engine(lfm2(tmp_path / "lfm2"), log, connector(running, "states")) as found:
        first, again = found.one(P), found.one(P)
        assert first["tokens"] == again["tokens"]
        assert (first["cached"], again["cached"]) == (0, 0)
        assert found.metrics().get("vllm:kvcm_lookups", 0) == 0
    assert "runs without the cache: caches of kind MambaSpec are not saved" in log.read_text()


def test_blocks_are_not_reused_before_they_are_copied(
    running: Manager, tiny_llama: Path, tmp_path: Path, expected: dict[str, Any]
) -> None:
    """A cache so small that requests are preempted and blocks are reused at once."""
    prompts = many_prompts()[:PREFIXES]
    with engine(
        tiny_llama, tmp_path / "log", connector(running, "small"), num_gpu_blocks_override=24,
        max_model_len=640, max_num_seqs=16,
    ) as found:  # fmt: skip
        for _ in range(3):
            answers = found.generate(prompts)
            got = [answer["tokens"] for answer in answers]
            assert got == expected["many"][:PREFIXES]
        assert sum(answer["cached"] for answer in answers) > 0
        assert found.metrics()["vllm:kvcm_failed_loads"] == 0
