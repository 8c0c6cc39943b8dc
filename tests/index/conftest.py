"""Builders shared by the index tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvcm_ray.core.model import Durability, LocationSpecInfo, Segment
from kvcm_ray.core.requests import BlockLocations, Keys
from kvcm_ray.index import IndexReader, IndexWriter


def keys_of(*numbers: int) -> Keys:
    return np.array(numbers, np.int64)


def locations_of(keys: Keys, generation: int = 1, segment: int = 0) -> BlockLocations:
    """Locations that can be told from their key: the slot is its low 32 bits."""
    return BlockLocations(
        np.full(len(keys), segment, np.uint32),
        (keys & 0xFFFFFFFF).astype(np.uint32),
        np.full(len(keys), generation, np.uint32),
    )


def segment_of(number: int, slots: int = 1024) -> Segment:
    return Segment(number, "store", f"i/u-{number:06x}", (LocationSpecInfo("kv", 64),), slots)


def dump(store: Any) -> dict[str, list[tuple[bytes, bytes]]]:
    """Every record of every table."""
    with store._shared.read() as (txn, tables):
        return {
            name: [(bytes(k), bytes(v)) for k, v in txn.cursor(getattr(tables, name))]
            for name in tables.__slots__
        }


@pytest.fixture
def build() -> Any:
    """The builders, since test modules cannot import each other."""

    class Build:
        keys = staticmethod(keys_of)
        locations = staticmethod(locations_of)
        segment = staticmethod(segment_of)
        dump = staticmethod(dump)

    return Build


@pytest.fixture
def open_writer(tmp_path: Path) -> Iterator[Callable[..., IndexWriter]]:
    """Opens writers (of ``tmp_path/index`` unless told otherwise); closes them in the end."""
    opened = []

    def opener(path: Path | None = None, **options: Any) -> IndexWriter:
        options = {"instance_tag": "i-1", "durability": Durability.PROCESS, **options}
        writer = IndexWriter(path or tmp_path / "index", **options)
        opened.append(writer)
        return writer

    yield opener
    for writer in opened:
        writer.close()


@pytest.fixture
def writer(open_writer: Callable[..., IndexWriter]) -> IndexWriter:
    return open_writer()


@pytest.fixture
def reader(writer: IndexWriter) -> Iterator[IndexReader]:
    reader = IndexReader(writer.path)
    yield reader
    reader.close()
