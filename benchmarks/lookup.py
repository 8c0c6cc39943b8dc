"""How long a look-up takes in the asking process, beside a flat LMDB table and a TCP round trip.

All keys hit. The index is written as the group actor writes it: commits of 64 blocks, several
prompts at a time. For each number of keys the systems take turns query by query, so that noise of
the machine meets all of them alike. If `dynamo` (ai-dynamo-runtime) can be imported, its RadixTree,
holding the same prompts, is asked for the match length as well.
"""

from __future__ import annotations

import importlib.metadata
import json
import resource
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lmdb
import numpy as np

from kvcm_ray.benchmarks.pingpong import pingpong_p50_us
from kvcm_ray.core.model import Durability
from kvcm_ray.core.requests import BlockLocations, Keys
from kvcm_ray.index import IndexReader, IndexWriter

PROMPT_BLOCKS = 2_048
COMMIT_BLOCKS = 64
PROMPTS_AT_A_TIME = 16
SLOTS = 65_536
WRITTEN_S = 1_700_000_000

Report = Callable[[str], None]


def run(
    blocks: int = 1_000_000,
    keys: tuple[int, ...] = (16, 128, 1024),
    queries: int = 1_000,
    folder: Path | str | None = None,
    seed: int = 1,
    report: Report = lambda _: None,
) -> dict[str, Any]:
    """Build an index of `blocks` blocks below `folder` (a temporary one) and time look-ups.

    Returns JSON: ``blocks``, ``pingpong_p50_us``, ``index_bytes_per_block`` (on disk, log
    included), ``write_blocks_per_s``, ``memory``, ``peer`` and ``rows`` with ``keys``, ``p50_us``,
    ``p99_us`` (match with locations), ``flat_lmdb_p50_us``, ``match_only_p50_us``,
    ``shuffled_p50_us`` (the same keys in an order that no chain has: what runs cannot help) and
    ``peer_match_p50_us``.
    """
    work = Path(tempfile.mkdtemp(prefix="kvcm-bench-lookup-", dir=folder))
    try:
        prompts = _prompts(blocks, seed)
        report(f"writing {blocks} blocks, {COMMIT_BLOCKS} a commit")
        result = {"blocks": blocks, **_write(work / "index", prompts)}
        report("writing the flat table")
        flat = FlatTable(work / "flat", prompts)
        report("timing")
        reader = IndexReader(work / "index")
        peer = peer_tree(prompts)
        result["pingpong_p50_us"] = round(pingpong_p50_us(), 2)
        result["rows"] = [_row(reader, flat, peer, prompts, count, queries, seed) for count in keys]
        result["peer"] = peer.name if peer else None
        result["memory"] = _memory(work / "index")
        reader.close()
        flat.close()
        return result
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _prompts(blocks: int, seed: int) -> list[Keys]:
    keys = np.random.default_rng(seed).integers(-(2**63), 2**63 - 1, blocks)
    return [keys[start : start + PROMPT_BLOCKS] for start in range(0, blocks, PROMPT_BLOCKS)]


def _write(path: Path, prompts: list[Keys]) -> dict[str, Any]:
    """Fill an index; its size and the speed of writing."""
    writer = IndexWriter(path, instance_tag="bench", durability=Durability.PROCESS)
    start, slot, commits = time.perf_counter(), 0, 0
    for first in range(0, len(prompts), PROMPTS_AT_A_TIME):
        together = prompts[first : first + PROMPTS_AT_A_TIME]
        for begin in range(0, PROMPT_BLOCKS, COMMIT_BLOCKS):
            for prompt in together:
                part = prompt[begin : begin + COMMIT_BLOCKS]
                if len(part):
                    parent = int(prompt[begin - 1]) if begin else None
                    commits += 1
                    with writer.begin() as batch:
                        batch.add_blocks(part, _places(slot, len(part), commits), parent, WRITTEN_S)
                    slot += len(part)
    seconds = time.perf_counter() - start
    stats = writer.stats()
    assert stats.key_count == slot
    writer.close()
    return {
        "index_bytes_per_block": round(stats.bytes_on_disk / slot, 2),
        "write_blocks_per_s": round(slot / seconds),
        "commit_blocks": COMMIT_BLOCKS,
    }


def _places(slot: int, count: int, generation: int) -> BlockLocations:
    slots = np.arange(slot, slot + count, dtype=np.uint32)
    return BlockLocations(slots // SLOTS, slots % SLOTS, np.full(count, generation, np.uint32))


class FlatTable:
    """What the index is compared with: one LMDB record a block, one get a key."""

    def __init__(self, path: Path, prompts: list[Keys]) -> None:
        path.mkdir()
        self._env = lmdb.open(str(path), map_size=16 << 30, sync=False, max_spare_txns=4, max_dbs=1)
        self._table = self._env.open_db(b"blocks", integerkey=True)
        keys = np.concatenate(prompts)
        order = np.argsort(keys.view(np.uint64))
        places = np.zeros((len(keys), 4), np.uint32)
        places[:, 1], places[:, 3] = np.arange(len(keys)), WRITTEN_S
        raw, values = keys[order].tobytes(), places[order].tobytes()
        with self._env.begin(self._table, write=True) as txn:
            items = (
                (raw[8 * i : 8 * i + 8], values[16 * i : 16 * i + 16]) for i in range(len(keys))
            )
            txn.cursor().putmulti(items, append=True)

    def match(self, keys: Keys) -> int:
        """Length of the prefix, its values fetched; as quick as Python can."""
        raw, found = keys.tobytes(), []
        with self._env.begin(self._table) as txn:
            get = txn.get
            for start in range(0, len(raw), 8):
                value = get(raw[start : start + 8])
                if value is None:
                    break
                found.append(value)
        return len(found)

    def close(self) -> None:
        self._env.close()


class PeerTree:
    """RadixTree of ai-dynamo-runtime: overlap per worker, no locations, in memory, one process."""

    def __init__(self, tree: Any, prompts: list[Keys]) -> None:
        self.name = f"ai-dynamo-runtime {importlib.metadata.version('ai-dynamo-runtime')} RadixTree"
        self._tree = tree
        for number, prompt in enumerate(prompts):
            blocks = [{"block_hash": key, "tokens_hash": key} for key in self.hashes(prompt)]
            stored = {"parent_hash": None, "blocks": blocks}
            event = {"event_id": number, "data": {"stored": stored}}
            tree.apply_event(1, json.dumps(event).encode())

    @staticmethod
    def hashes(keys: Keys) -> list[int]:
        found: list[int] = keys.view(np.uint64).tolist()
        return found

    def match(self, hashes: list[int]) -> int:
        return max(self._tree.find_matches(hashes).scores.values(), default=0)


def peer_tree(prompts: list[Keys]) -> PeerTree | None:
    """None if ai-dynamo-runtime is not installed."""
    try:
        from dynamo._core import RadixTree
    except ImportError:
        return None
    return PeerTree(RadixTree(), prompts)


def _row(
    reader: IndexReader,
    flat: FlatTable,
    peer: PeerTree | None,
    prompts: list[Keys],
    count: int,
    queries: int,
    seed: int,
) -> dict[str, Any]:
    chance = np.random.default_rng(seed)
    long_enough = [prompt for prompt in prompts if len(prompt) >= count]
    times: dict[str, list[int]] = {}

    def timed(name: str, ask: Callable[[Any], int], question: Any) -> None:
        start = time.perf_counter_ns()
        length = ask(question)
        times.setdefault(name, []).append(time.perf_counter_ns() - start)
        assert length == count, f"{name}: {length} of {count} keys hit"

    for number in range(queries):
        asked = long_enough[chance.integers(len(long_enough))][:count]
        timed("match", lambda keys: reader.match(keys).length, asked)
        timed("match_only", reader.match_length, asked)
        if number % 4 == 0:
            timed("flat", flat.match, asked)
            timed("shuffled", lambda keys: reader.match(keys).length, chance.permutation(asked))
        if peer:
            timed("peer", peer.match, peer.hashes(asked))

    def percentile(name: str, rank: int) -> float:
        return round(float(np.percentile(times[name], rank)) / 1e3, 2)

    row = {
        "keys": count,
        "p50_us": percentile("match", 50),
        "p99_us": percentile("match", 99),
        "flat_lmdb_p50_us": percentile("flat", 50),
        "match_only_p50_us": percentile("match_only", 50),
        "match_only_p99_us": percentile("match_only", 99),
        "shuffled_p50_us": percentile("shuffled", 50),
    }
    return {**row, "peer_match_p50_us": percentile("peer", 50)} if peer else row


def _memory(path: Path) -> dict[str, int]:
    """The index file is page cache, shared by all readers of the machine."""
    return {
        "index_file_bytes": (path / "data.mdb").stat().st_blocks * 512,
        "process_peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
