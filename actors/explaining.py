"""What became of blocks: where they are, or when and why they went. On the loop's thread.

Looked up through a reader of the index, beside what the group's state knows of each block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from kvcm_ray.actors.engine import GroupEngine
from kvcm_ray.actors.facts import Now
from kvcm_ray.actors.journal import Departure
from kvcm_ray.actors.prefixes import Node
from kvcm_ray.actors.statistics import Statistics
from kvcm_ray.core.ledger import Instance
from kvcm_ray.core.requests import Keys
from kvcm_ray.errors import InstanceNotFound, InvalidArgument
from kvcm_ray.index import IndexReader

KEYS_MAX = 16_384  #: of one explanation
NODE_KEYS_MAX = 256  #: of a node of the tree that are looked up, evenly spread


def explain(engine: GroupEngine, statistics: Statistics, instance_id: str, keys: Keys) -> dict[str, Any]:
    """Of every key what `GroupService.explain` says.

    Raises:
        InstanceNotFound
        InvalidArgument: too many keys.
    """
    if len(keys) > KEYS_MAX:
        raise InvalidArgument(f"{len(keys)} keys, more than {KEYS_MAX} at once; explain the prompt in parts")
    if instance_id not in engine.instances:
        raise engine.broken.get(instance_id) or InstanceNotFound(f"instance {instance_id!r} is not open")
    instance, now = engine.state.ledger.instance(instance_id), Now.read()
    present = _present(engine, instance, keys, now)
    departures = statistics.departed.find(instance_id, keys)
    now_s = statistics.now_s()
    blocks = [
        there or _writing(instance, key) or _absent(gone, now_s)
        for key, there, gone in zip(keys.tolist(), present, departures, strict=True)
    ]
    states = [block["state"] == "serving" for block in blocks]
    return {
        "instance_id": instance_id,
        "started_s": statistics.started_s,
        "known_since_s": max(now_s - statistics.started_s, 0.0),
        "matched_blocks": states.index(False) if False in states else len(states),
        "block_size": instance.info.block_size,
        "blocks": blocks,
    }


def _present(engine: GroupEngine, instance: Instance, keys: Keys, now: Now) -> list[dict[str, Any] | None]:
    ledger = engine.state.ledger
    reader = IndexReader(engine.index_path(instance.info.instance_id))
    try:
        hits, found = reader.lookup(keys)
        written_s = reader.written(keys)
    finally:
        reader.close()
    ids = np.where(hits, ledger.table.find(instance.number, found), -1)
    touched, leased = np.zeros((2, len(ids)), np.int64)
    known = ids[ids >= 0]
    touched[ids >= 0], leased[ids >= 0] = ledger.order.touched_ms(known), ledger.order.leased_until(known)
    rows: list[dict[str, Any] | None] = []
    for i, there in enumerate(hits.tolist()):
        if not there:
            rows.append(None)
            continue
        segment = engine.segment(instance.info.instance_id, int(found.segment[i]))
        row: dict[str, Any] = {
            "state": "serving",
            "storage": segment.storage if segment else "",
            "age_s": max(now.s - int(written_s[i]), 0),
        }
        if ids[i] >= 0:
            row |= {
                "storage_type": ledger.kind_of(row["storage"]).name,
                "touched_ago_s": max(now.ms - int(touched[i]), 0) / 1000,
                "pinned": bool(ledger.table.pinned[ids[i]]),
                "leased_s": max(int(leased[i]) - now.ms, 0) / 1000,
                "moving": bool(ledger.table.moving[ids[i]]),
                "copied": bool(ledger.table.copied[ids[i]]),
            }
        rows.append(row)
    return rows


def _writing(instance: Instance, key: int) -> dict[str, Any] | None:
    session = instance.writing.get(key)
    if session is None:
        return None
    return {"state": "writing", "storage": session.record.storage, "session_id": session.record.session_id}


def _absent(gone: Departure | None, now_s: float) -> dict[str, Any]:
    if gone is None:
        return {"state": "absent", "why": "unknown"}
    return {
        "state": "absent",
        "why": str(gone.why),
        "gone_ago_s": max(now_s - gone.time_s, 0.0),
        "needed_bytes": gone.needed_bytes,
        "more_bytes": gone.since_bytes,
    }


def resident(engine: GroupEngine, nodes: Sequence[Node]) -> dict[int, tuple[int, str, int]]:
    """By ``id`` of a node: blocks of it that are there, the storage of most of them, and their bytes.
    Of a long node an evenly spread part is looked up."""
    readers: dict[str, IndexReader] = {}
    rows = {}
    try:
        for node in nodes:
            rows[id(node)] = (0, "", 0)
            if node.instance_id not in engine.instances:
                continue
            if node.instance_id not in readers:
                readers[node.instance_id] = IndexReader(engine.index_path(node.instance_id))
            rows[id(node)] = _resident(engine, readers[node.instance_id], node)
    finally:
        for reader in readers.values():
            reader.close()
    return rows


def _resident(engine: GroupEngine, reader: IndexReader, node: Node) -> tuple[int, str, int]:
    picked = np.unique(
        np.linspace(0, len(node.keys) - 1, min(len(node.keys), NODE_KEYS_MAX)).astype(np.int64)
    )
    hits, found = reader.lookup(node.keys[picked])
    if not hits.any():
        return 0, "", 0
    segments, counts = np.unique(found.segment[hits], return_counts=True)
    segment = engine.segment(node.instance_id, int(segments[counts.argmax()]))
    there = round(len(node.keys) * float(hits.mean()))
    return there, segment.storage if segment else "", there * engine.instances[node.instance_id].block_bytes
