"""The parts of the Serve LLM router without Serve: settings, prompts, table, rule, index, places in text."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kvcm_ray.client import connect
from kvcm_ray.connectors.serve_llm import router_config
from kvcm_ray.connectors.serve_llm.choice import Candidate, best
from kvcm_ray.connectors.serve_llm.learning import places_of_pieces
from kvcm_ray.connectors.serve_llm.prompts import PIECE, PIECES_MAX, prompt_of
from kvcm_ray.connectors.serve_llm.running import ENDED_MAX, Running
from kvcm_ray.connectors.serve_llm.settings import router_settings
from kvcm_ray.connectors.serve_llm.shared import SharedIndex
from kvcm_ray.connectors.serve_llm.table import PrefixTable
from kvcm_ray.errors import InvalidArgument
from kvcm_ray.testing.served import Served, served

TEXT = "".join(chr(97 + number * number % 23) for number in range(40 * PIECE))


def completion(prompt: Any, **facts: Any) -> SimpleNamespace:
    return SimpleNamespace(prompt=prompt, model="m", **facts)


def chat(*texts: str, **facts: Any) -> dict[str, Any]:
    roles = ("user", "assistant")
    messages = [{"role": roles[n % 2], "content": text} for n, text in enumerate(texts)]
    return {"messages": messages, "model": "m", **facts}


def hashes(request: Any) -> list[int]:
    prompt = prompt_of([request])
    assert prompt is not None
    return prompt.hashes


def common(one: Any, other: Any) -> int:
    pairs = zip(hashes(one), hashes(other), strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(hashes(one)), len(hashes(other))))


class TestSettings:
    def test_config_names_a_class_that_serve_can_import(self) -> None:
        from ray.serve.config import RequestRouterConfig

        config = RequestRouterConfig(**router_config(queue_chars=10))
        assert config.get_request_router_class().__name__ == "KVCMRequestRouter"
        assert router_settings(config.request_router_kwargs).queue_chars == 10

    @pytest.mark.parametrize(
        ("given", "word"),
        [
            ({"queue": 1}, "queue"),
            ({"kvcm_data_dir": "/d"}, "instance_id"),
            ({"queue_chars": "many"}, "int"),
            ({"shared_worth": 2}, "shared_worth"),
            ({"budget_ms": 0}, "budget_ms"),
            ({"hash_algorithm": "xxhash"}, "hash_algorithm"),
        ],
    )
    def test_wrong_ones_are_refused(self, given: dict[str, Any], word: str) -> None:
        with pytest.raises(InvalidArgument, match=word):
            router_config(**given)


class TestPrompts:
    def test_pieces_of_a_common_prefix_are_common(self) -> None:
        changed = TEXT[: 10 * PIECE + 5] + "!" + TEXT[10 * PIECE + 6 :]
        assert common(completion(TEXT), completion(changed)) == 10
        assert common(completion(TEXT), completion(TEXT + "more")) == 40

    def test_a_next_turn_begins_as_the_one_before(self) -> None:
        first = chat(TEXT[: 5 * PIECE])
        second = chat(TEXT[: 5 * PIECE], "an answer", TEXT)
        assert common(first, second) == len(hashes(first)) == 5

    def test_a_message_cut_in_two_is_another_prompt(self) -> None:
        assert common(chat(TEXT), chat(TEXT[:PIECE], TEXT[PIECE:])) <= 1

    @pytest.mark.parametrize(
        "other",
        [completion(TEXT, cache_salt="x"), SimpleNamespace(prompt=TEXT, model="other")],
    )
    def test_models_and_salts_share_nothing(self, other: Any) -> None:
        assert common(completion(TEXT), other) == 0

    def test_tools_and_images_are_not_looked_up_but_kept_apart(self) -> None:
        with_tools = prompt_of([chat(TEXT, tools=[{"name": "a"}])])
        image = {"role": "user", "content": [{"type": "image_url", "image_url": "a"}]}
        with_image = prompt_of([{"messages": [image, {"role": "user", "content": TEXT}]}])
        assert with_tools is not None
        assert with_image is not None
        assert with_tools.is_special
        assert with_image.is_special
        assert common(chat(TEXT), chat(TEXT, tools=[{"name": "a"}])) == 0

    def test_a_conversation_about_an_image_goes_on_as_it_began(self) -> None:
        image = {"type": "image_url", "image_url": {"url": "http://images/1"}}
        first = {"role": "user", "content": [image, {"type": "text", "text": TEXT}]}
        turns = [first, {"role": "assistant", "content": "I see."}, {"role": "user", "content": [image]}]
        one, two = {"messages": turns[:1]}, {"messages": turns}
        assert common(one, two) == len(hashes(one)) >= 40

    def test_parts_that_are_text_are_text(self) -> None:
        parts = [{"role": "user", "content": [{"type": "text", "text": TEXT}]}]
        prompt = prompt_of([{"messages": parts, "model": "m"}])
        assert prompt is not None
        assert not prompt.is_special
        assert prompt.hashes == hashes(chat(TEXT))

    def test_calls_of_tools_tell_prompts_apart(self) -> None:
        def called(tool: str) -> dict[str, Any]:
            message = {"role": "assistant", "content": None, "tool_calls": [{"name": tool}]}
            return {"messages": [message, {"role": "user", "content": TEXT}]}

        assert common(called("a"), called("a")) == 40
        assert common(called("a"), called("b")) == 0

    def test_token_ids(self) -> None:
        tokens = list(range(100))
        assert len(hashes(completion(tokens))) == 3
        assert common(completion(tokens), completion([*tokens[:70], 5, *tokens[71:]])) == 2
        assert hashes(completion([tokens])) == hashes(completion(tokens))

    @pytest.mark.parametrize(
        "strange",
        [
            None, 7, completion(None), completion(["a", "b"]), completion([1.5]), completion([-1]),
            {"messages": [3]}, {"messages": 3}, {"prompt": {}},
            {"messages": [{"role": None, "content": None}]},
        ],
    )  # fmt: skip
    def test_what_is_not_understood_is_no_prompt(self, strange: Any) -> None:
        prompt = prompt_of([strange])
        assert prompt is None or not prompt.hashes

    def test_odd_characters_and_huge_prompts(self) -> None:
        assert len(hashes(completion("\ud800" * 2 * PIECE))) == 2
        assert len(hashes(completion("a" * PIECE * (PIECES_MAX + 9)))) == PIECES_MAX


class TestTable:
    def test_the_longest_prefix_of_each_replica(self) -> None:
        table = PrefixTable(1000, 60)
        table.served([1, 2, 3], "a", now=0)
        table.served([1, 2, 30, 40], "b", now=0)
        found = table.find([1, 2, 3, 4], now=1)
        assert found.pieces == {"a": 3, "b": 2}
        assert table.find([9], now=1).is_nothing

    def test_a_replica_that_is_gone_is_forgotten(self) -> None:
        table = PrefixTable(1000, 60)
        table.served([1, 2], "a", now=0)
        table.forget("a")
        assert table.find([1, 2], now=1).is_nothing

    def test_what_was_long_ago_does_not_count(self) -> None:
        table = PrefixTable(1000, 60)
        table.served([1, 2, 3], "a", now=0)
        table.served([1, 2], "a", now=50)
        assert table.find([1, 2, 3], now=61).pieces == {"a": 2}

    def test_it_is_bounded_and_drops_the_longest_parts_first(self) -> None:
        table = PrefixTable(5, 60)
        table.served([1, 2, 3], "a", now=0)
        table.served([4, 5, 6], "a", now=0)
        assert len(table) == 5
        assert table.find([1, 2, 3], now=1).pieces == {"a": 2}
        assert table.find([4, 5, 6], now=1).pieces == {"a": 3}

    def test_keys_of_the_longest_known_prefix(self) -> None:
        table = PrefixTable(1000, 60)
        keys = np.arange(7, dtype=np.int64)
        table.learned([1, 2, 3], keys, [2, 4, 7])
        found = table.find([1, 2, 33], now=0)
        assert found.keys.tolist() == [0, 1, 2, 3]
        assert found.keys_pieces == 2


class TestRunning:
    def test_counts(self) -> None:
        running = Running()
        running.began("r", "a")
        running.began("r", "a")
        running.began("s", "a")
        assert running.count("a") == 2
        running.ended("r", "a")
        running.ended("r", "a")
        assert (running.count("a"), running.count("b")) == (1, 0)
        running.gone("a")
        running.ended("s", "a")
        assert running.count("a") == 0

    def test_an_end_before_its_beginning_leaves_nothing_running(self) -> None:
        running = Running()
        running.ended("r", "a")
        running.began("r", "a")
        assert running.count("a") == 0

    def test_a_refusal_ends_nothing_elsewhere(self) -> None:
        running = Running()
        running.began("r", "b")
        running.ended("r", "a")  # which had refused it
        assert running.count("b") == 1

    def test_what_is_remembered_is_bounded(self) -> None:
        running = Running()
        for number in range(ENDED_MAX + 9):
            running.ended(str(number), "a")
        assert len(running._ended) == ENDED_MAX


class TestChoice:
    def pick(self, *candidates: tuple[str, int, int, float], shared: float = 0) -> list[str]:
        given = [Candidate(*one) for one in candidates]
        return best(given, pieces=40, shared=shared, least=2, queue_pieces=16)

    def test_the_longest_match(self) -> None:
        assert self.pick(("a", 0, 10, 0.9), ("b", 0, 30, 0.9)) == ["b"]

    def test_load_outweighs_a_match(self) -> None:
        assert self.pick(("a", 0, 0, 0.9), ("b", 1, 30, 0.9)) == ["b"]
        assert self.pick(("a", 0, 0, 0.9), ("b", 2, 30, 0.9)) == ["a"]

    def test_what_all_can_load_leaves_the_choice_to_load(self) -> None:
        assert self.pick(("a", 1, 30, 0.9), ("b", 0, 0, 0.9), shared=30) == ["b"]
        assert sorted(self.pick(("a", 0, 0, 0.9), ("b", 0, 0, 0.9), shared=30)) == ["a", "b"]

    def test_the_node_of_the_shared_cache_is_preferred(self) -> None:
        assert self.pick(("here", 0, 0, 0.9), ("there", 0, 0, 0.5), shared=30) == ["here"]

    def test_a_short_match_counts_as_none(self) -> None:
        assert self.pick(("a", 0, 1, 0.9), ("b", 0, 0, 0.9)) == []
        assert best([], pieces=4, shared=0, least=1, queue_pieces=1) == []


class TestPlaces:
    def test_of_plain_text(self) -> None:
        prompt = prompt_of([completion(TEXT)])
        assert prompt is not None
        assert list(places_of_pieces(prompt, TEXT))[:2] == [PIECE, 2 * PIECE]

    def test_through_a_template(self) -> None:
        prompt = prompt_of([chat(TEXT[:300], "yes", TEXT[300:900])])
        assert prompt is not None
        rendered = f"<system>\n<user>{TEXT[:300]}<end>\n<assistant>yes<end>\n<user>{TEXT[300:900]}<end>\n"
        places = list(places_of_pieces(prompt, rendered))
        assert len(places) == len(prompt.hashes)
        assert places == sorted(places)
        spoken = prompt.spoken
        for number, place in enumerate(places, 1):
            if spoken[number * PIECE - 9 : number * PIECE] in TEXT:  # it ends within a message
                assert rendered[:place].endswith(spoken[number * PIECE - 9 : number * PIECE])

    def test_a_template_that_changes_the_text_ends_it(self) -> None:
        prompt = prompt_of([chat(TEXT[:300], TEXT[300:900])])
        assert prompt is not None
        assert len(list(places_of_pieces(prompt, f"<{TEXT[:300]}><{TEXT[300:900].upper()}>"))) == 2


@pytest.fixture(scope="module")
def manager(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(tmp_path_factory.mktemp("manager") / "data") as found:
        yield found


class TestSharedIndex:
    def test_lengths_without_a_call(self, manager: Served) -> None:
        data_dir = str(manager.backend.view.data_dir)
        index = SharedIndex(data_dir, "routed", slow_s=1)
        keys = np.arange(1, 11, dtype=np.int64)
        index.open()
        assert (index.length(keys), index.info) == (0, None)
        with connect(manager.url) as client:
            cache = client.register("routed", block_size=16, specs={"tp0": 4096})
            cache.put(keys[:7], np.zeros((7, 4096), np.uint8))
        touched = len(manager.backend.touched)
        index._looked = 0.0
        index.open()
        assert index.length(keys) == 7
        assert index.info is not None
        time.sleep(0.3)
        assert len(manager.backend.touched) == touched  # a router's look-up is no use of the blocks
        index.close()
        assert index.length(keys) == 0

    def test_no_manager(self, tmp_path: Path) -> None:
        index = SharedIndex(str(tmp_path / "none"), "routed", slow_s=1)
        index.open()
        assert index.length(np.arange(3, dtype=np.int64)) == 0
        index.close()

    def test_a_slow_look_up_is_followed_by_a_pause(self, manager: Served) -> None:
        index = SharedIndex(str(manager.backend.view.data_dir), "routed", slow_s=0)
        index.open()
        keys = np.arange(1, 8, dtype=np.int64)
        assert index.length(keys) == 7
        assert index.length(keys) == 0
        index.close()
