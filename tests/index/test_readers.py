"""Readers in other processes, threads, forks, and beside indexes that come and go."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest

from kvcm_ray.core.requests import BlockLocations
from kvcm_ray.errors import NotFound, Unavailable
from kvcm_ray.index import IndexReader, IndexWriter, environment

CHILDREN = Path(__file__).with_name("children.py")


def test_readers_of_other_processes_beside_a_writer(
    open_writer: Callable[..., IndexWriter], tmp_path: Path
) -> None:
    """Each sees whole commits only, in order, with the right locations, and never waits."""
    path = tmp_path / "index"
    writer = open_writer(path)
    arguments = [sys.executable, str(CHILDREN), "read", str(path), "1.0"]
    readers = [
        subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    number = 0
    while any(reader.poll() is None for reader in readers):
        keys = np.arange(number * 8 + 1, number * 8 + 9, dtype=np.int64)
        column = keys.astype(np.uint32)
        with writer.begin() as batch:
            at = BlockLocations(column * 0, column, column + 1)
            batch.add_blocks(keys, at, int(keys[0]) - 1, 1)
        number += 1
    for reader in readers:
        out, err = reader.communicate()
        assert reader.returncode == 0, err
        assert int(out) > 10


def test_threads_share_one_environment(writer: IndexWriter, reader: IndexReader, build: Any) -> None:
    keys = np.arange(1, 101, dtype=np.int64)
    with writer.begin() as batch:
        batch.add_blocks(keys, build.locations(keys), None, 1)
    wrong = []

    def look() -> None:
        mine = IndexReader(writer.path)
        for _ in range(300):
            if mine.match(keys).length != 100 or reader.match_length(keys) != 100:
                wrong.append(1)
        mine.close()

    threads = [threading.Thread(target=look) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert reader._shared is writer._shared


def test_a_reader_first_then_a_writer(open_writer: Callable[..., IndexWriter], build: Any) -> None:
    """The environment is opened again for writing under a reader that does not notice."""
    first = open_writer()
    first.close()
    reader = IndexReader(first.path)
    assert reader._shared.mode.write is False
    keys = build.keys(4, 5)
    assert reader.match_length(keys) == 0
    writer = open_writer()
    with writer.begin() as batch:
        batch.add_blocks(keys, build.locations(keys), None, 1)
    assert reader.match_length(keys) == 2
    assert reader._shared.mode.write is True
    reader.close()


def test_a_grown_map(open_writer: Callable[..., IndexWriter], tmp_path: Path, build: Any) -> None:
    """Another process wrote beyond the map that this reader opened."""
    writer = open_writer(map_size=1 << 20)
    writer.close()
    reader = IndexReader(writer.path)
    reader._shared.env.close()
    environment_of(reader, map_bytes=1 << 20)
    script = (
        "import sys, numpy as np; from kvcm_ray.index import IndexWriter;"
        "from kvcm_ray.core.requests import BlockLocations;"
        "w = IndexWriter(sys.argv[1], instance_tag='i-1', map_size=1 << 30);"
        "k = np.arange(1, 60001, dtype=np.int64) * 7919;"
        "b = w.begin(); c = b.__enter__();"
        "c.add_blocks(k, BlockLocations.empty(len(k)), None, 1); b.__exit__(None, None, None)"
    )
    subprocess.run([sys.executable, "-c", script, str(writer.path)], check=True)
    keys = np.arange(1, 1001, dtype=np.int64) * 7919
    assert reader.match_length(keys) == 1000
    reader.close()


def environment_of(reader: IndexReader, map_bytes: int) -> None:
    reader._shared._open(environment.Mode(write=False, map_bytes=map_bytes))


def test_no_index(tmp_path: Path, open_writer: Callable[..., IndexWriter]) -> None:
    with pytest.raises(NotFound, match=f"no index at {tmp_path}"):
        IndexReader(tmp_path)
    with pytest.raises(NotFound):
        IndexReader(tmp_path / "nowhere")
    writer = open_writer()
    writer.close()
    env = lmdb.open(str(tmp_path / "bare"), max_dbs=1)
    env.close()
    shutil.copy(writer.path / "index.json", tmp_path / "bare")
    with pytest.raises(NotFound, match="not set up yet"):
        IndexReader(tmp_path / "bare")


def test_a_removed_and_a_replaced_index(open_writer: Callable[..., IndexWriter], build: Any) -> None:
    old = open_writer()
    keys = build.keys(1, 2, 3)
    with old.begin() as batch:
        batch.add_blocks(keys, build.locations(keys), None, 1)
    reader = IndexReader(old.path)
    assert reader.refresh() is True
    old.close()
    shutil.rmtree(old.path)
    assert reader.refresh() is False
    assert reader.match_length(keys) in (0, 3), "no exception; block headers prove locations"
    new = open_writer()
    with new.begin() as batch:
        batch.add_blocks(keys[:2], build.locations(keys[:2], 9), None, 1)
    assert reader.refresh() is True
    found = reader.match(keys)
    assert (found.length, found.locations.generation.tolist()) == (2, [9, 9])
    reader.close()
    reader.close()


def test_a_forked_process_is_told(writer: IndexWriter, reader: IndexReader, build: Any) -> None:
    assert reader.match_length(build.keys(1)) == 0
    pid = os.fork()
    if pid == 0:
        try:
            reader.match_length(build.keys(1))
        except Unavailable as error:
            os._exit(7 if "spawn" in error.message else 8)
        os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    assert reader.match_length(build.keys(1)) == 0


def test_the_environment_is_closed_with_its_last_user(
    open_writer: Callable[..., IndexWriter],
) -> None:
    writer = open_writer()
    name = os.path.realpath(writer.path)
    reader = IndexReader(writer.path)
    writer.close()
    assert name in environment._cache
    reader.close()
    assert name not in environment._cache
