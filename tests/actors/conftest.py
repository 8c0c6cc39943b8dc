"""A group and a registry in this process, on real LMDB and files, without Ray."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from kvcm_ray.actors.chores import ErasureDone, MoveDone
from kvcm_ray.actors.reclaimer import ReclaimerBody
from kvcm_ray.actors.registry_body import RegistryBody
from kvcm_ray.actors.service import GroupService
from kvcm_ray.actors.view import RegistryView
from kvcm_ray.cluster.defaults import default_group, parse_tiers


class Groups:
    """`GroupControl` and `Pool` that call in this thread."""

    def __init__(self, data_dir: Path) -> None:
        self.data_dir = data_dir
        self.services: dict[str, GroupService] = {}
        self.fenced: list[str] = []
        self.erasing = True

    def refresh(self, group: str) -> None:
        if group not in self.services:
            view = RegistryView(self.data_dir)
            self.body = ReclaimerBody(view)
            self.services[group] = GroupService(view, group, self, lambda why: self.fenced.append(group))
        self.services[group].refresh().result(10)

    def remove(self, group: str) -> None:
        service = self.services.pop(group)
        service.retire().result(10)
        service.stop()

    def resize(self, reclaimers: int) -> None:
        pass

    def erase(
        self, number: int, size: int, index_path: str, trash_ids: Sequence[int], done: ErasureDone
    ) -> None:
        if self.erasing:
            done(*self.body.erase(index_path, trash_ids))
        else:
            done([], "switched off by the test")

    def move(self, number: int, size: int, index_path: str, session_id: str, done: MoveDone) -> None:
        if self.erasing:
            done(self.body.move(index_path, [session_id]).get(session_id), "")
        else:
            done(None, "switched off by the test")


@pytest.fixture
def groups(tmp_path: Path) -> Iterator[Groups]:
    made = Groups(tmp_path)
    yield made
    for service in made.services.values():
        service.stop()


@pytest.fixture
def registry(tmp_path: Path, groups: Groups) -> Iterator[RegistryBody]:
    """With storage nfs_01 and group "default", which erases at once."""
    body = RegistryBody(tmp_path, groups)
    tiers = parse_tiers(["file:64MiB"], tmp_path)
    body.add_storage(tiers[0].storage)
    group = default_group(tiers)
    cache = group.cache_config
    assert cache is not None
    assert cache.reclaim_strategy is not None
    at_once = dataclasses.replace(cache.reclaim_strategy, delay_before_delete_ms=0)
    body.create_group(
        dataclasses.replace(group, cache_config=dataclasses.replace(cache, reclaim_strategy=at_once))
    )
    yield body
    body.close()


@pytest.fixture
def view(registry: RegistryBody, tmp_path: Path) -> RegistryView:
    return RegistryView(tmp_path)
