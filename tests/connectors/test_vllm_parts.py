"""The parts of the vLLM connector that need no vLLM: settings, names, layouts, saves, reports."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import kvcm_ray.connectors.vllm as package
from kvcm_ray.connectors.vllm import identity, layout
from kvcm_ray.connectors.vllm.layout import Group, Layout
from kvcm_ray.connectors.vllm.memory import Staging
from kvcm_ray.connectors.vllm.orders import Report
from kvcm_ray.connectors.vllm.settings import settings_of
from kvcm_ray.core.model import ModelDeployment
from kvcm_ray.errors import InvalidArgument, Unsupported


class TestSettings:
    def test_types_and_defaults(self) -> None:
        settings = settings_of({"kvcm_data_dir": "/d", "load_timeout_s": 2})
        assert (settings.load_timeout_s, settings.async_load, settings.address) == (2.0, True, "/d")

    @pytest.mark.parametrize(
        ("extra", "word"),
        [
            ({"kvcm_data_dir": "/d", "speed": 1}, "speed"),
            ({"kvcm_data_dir": "/d", "kvcm_url": "http://h:1"}, "either"),
            ({"kvcm_data_dir": "/d", "save": "yes"}, "save"),
            ({"kvcm_data_dir": "/d", "load_timeout_s": 0}, "load_timeout_s"),
            ({"kvcm_data_dir": "/d", "min_load_blocks": 0}, "min_load_blocks"),
            ({"kvcm_data_dir": "/d", "staging_bytes": True}, "staging_bytes"),
        ],
    )
    def test_a_wrong_word_is_named(self, extra: dict[str, Any], word: str) -> None:
        with pytest.raises(InvalidArgument, match=word):
            settings_of(extra)

    def test_the_address_may_come_from_the_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("KVCM_ADDRESS", raising=False)
        monkeypatch.delenv("KVCM_URL", raising=False)
        with pytest.raises(InvalidArgument, match="kvcm_data_dir"):
            settings_of({})
        monkeypatch.setenv("KVCM_URL", "http://host:1")
        assert settings_of({}).kvcm_url == "http://host:1"


class TestIdentity:
    def info(self, **changes: Any) -> Any:
        given: dict[str, Any] = {
            "group": "g", "instance_id": "", "block_tokens": 32, "specs": {"tp1": 8, "tp0": 8},
            "deployment": ModelDeployment(model_name="org/Model X", dtype="f16", tp_size=2),
            "version": "v1", "depends_on": ("a", "b"),
        }  # fmt: skip
        return identity.instance_info(**(given | changes))

    def test_all_that_blocks_depend_on_is_in_the_id(self) -> None:
        first = self.info()
        assert first.instance_id.startswith("org-Model-X-")
        assert [spec.name for spec in first.location_spec_infos] == ["tp0", "tp1"]
        assert self.info(specs={"tp0": 8, "tp1": 8}).instance_id == first.instance_id
        for change in (
            {"version": "v2"},
            {"block_tokens": 16},
            {"specs": {"tp0": 8}},
            {"depends_on": ("ab",)},
        ):
            assert self.info(**change).instance_id != first.instance_id
        assert self.info(instance_id="mine").instance_id == "mine"

    def test_weights_are_told_apart_by_their_content(self, tmp_path: Any) -> None:
        versions = []
        for name, byte in (("one", 1), ("two", 1), ("three", 2)):
            folder = tmp_path / name
            folder.mkdir()
            (folder / "model.safetensors").write_bytes(b"\0" * 300_000 + bytes([byte]) * 300_000)
            versions.append(identity.weights_version(str(folder), None, "auto", 0))
        assert versions[0] == versions[1] != versions[2]
        assert identity.weights_version("org/m", "r1", "auto", 0) != identity.weights_version(
            "org/m", "r2", "auto", 0
        )

    def test_hashes_that_differ_between_processes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("PYTHONHASHSEED", raising=False)
        assert identity.hash_scheme("xxhash") is None
        assert identity.hash_scheme("sha256") is not None
        monkeypatch.setenv("PYTHONHASHSEED", "0")
        assert identity.hash_scheme("xxhash") is not None
        assert os.environ["PYTHONHASHSEED"] in str(identity.hash_scheme("sha256"))


@dataclass
class FullAttentionSpec:
    block_size: int


@dataclass
class SlidingWindowSpec:
    block_size: int


@dataclass
class MambaSpec:
    block_size: int


def config(*specs: Any) -> Any:
    """As much of an engine's KVCacheConfig as is looked at."""
    groups = [SimpleNamespace(kv_cache_spec=spec, layer_names=[f"l{i}"]) for i, spec in enumerate(specs)]
    return SimpleNamespace(kv_cache_groups=groups, hash_block_size=16, num_blocks=100)


class TestLayout:
    def test_our_block_is_whole_in_every_group(self) -> None:
        found = layout.layout_of(config(FullAttentionSpec(32), SlidingWindowSpec(16)), 32)
        assert (found.block_tokens, found.hash_tokens) == (32, 16)
        assert [group.per_block for group in found.groups] == [1, 2]
        assert [found.spec_name("tp3", number) for number in (0, 1)] == ["tp3-g0", "tp3-g1"]

    def test_states_are_refused(self) -> None:
        with pytest.raises(Unsupported, match="MambaSpec"):
            layout.layout_of(config(FullAttentionSpec(32), MambaSpec(32)), 32)

    def test_a_key_is_that_of_the_last_hash(self) -> None:
        found = layout.layout_of(config(FullAttentionSpec(32)), 32)
        hashes = [hashlib.sha256(bytes([i])).digest() for i in range(7)]
        expected = [int.from_bytes(hashes[i][:8], "little", signed=True) for i in (1, 3, 5)]
        assert found.keys(hashes).tolist() == expected
        assert found.keys(hashes, 1).tolist() == expected[1:]
        assert len(found.keys(hashes, 3)) == 0

    def test_tables_become_ids(self) -> None:
        found = layout.layout_of(config(FullAttentionSpec(32), SlidingWindowSpec(16)), 32)
        tables = ([5, 6, 7], [0, 0, 9, 10, 11, 12])
        full, window = found.ids(tables, 0, 3)
        assert full.tolist() == [[5], [6], [7]]
        assert window.tolist() == [[-1, -1], [9, 10], [11, 12]]
        full, window = found.ids(tables, 1, 4, after=48)  # the engine has the first 48 tokens itself
        assert full.tolist() == [[6], [7], [-1]]
        assert window.tolist() == [[-1, 10], [11, 12], [-1, -1]]


def test_reports_of_workers_are_merged() -> None:
    one = Report(written={4: (1, np.array([True, True, False]))}, failed_loads={"a"}, lost=[1])
    one.captured[3] = 1
    other = Report(written={4: (1, np.array([True, False, True]))}, uncaptured={3})
    other.captured[3] = 1
    merged = one.merge(other)
    assert merged.captured == {3: 2}
    assert merged.uncaptured == {3}
    workers, good = merged.written[4]
    assert (workers, good.tolist()) == (2, [True, False, False])
    assert (merged.failed_loads, merged.lost) == ({"a"}, [1])
    assert not Report()


def test_staging_is_bounded_and_reused() -> None:
    staging = Staging(120)
    first = staging.take(80)
    assert first is not None
    assert staging.take(50) is None
    assert len(staging.take_anyway(30)) >= 30
    staging.give(first)
    assert staging.take(60) is first


def test_the_class_is_only_made_when_it_is_asked_for() -> None:
    assert package.__all__ == ["KVCMConnector"]
    with pytest.raises(AttributeError, match="Nothing"):
        _ = package.Nothing


def test_one_group_has_plain_spec_names() -> None:
    assert Layout(16, 16, (Group(0, ("l",), 16, 1),), 10).spec_name("tp0", 0) == "tp0"
