"""A trace goes through a live manager, which records it: the recording is the trace, and has its hits."""

from __future__ import annotations

import json
import os
import secrets
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvcm_ray.actors.handles import GroupHandle, RegistryHandle
from kvcm_ray.cli.main import main
from kvcm_ray.client import connect
from kvcm_ray.cluster import Manager
from kvcm_ray.errors import Unavailable
from kvcm_ray.optimizer import READ, WRITE, load, replay, totals
from kvcm_ray.testing.blocks import instance
from kvcm_ray.traces import open_trace

pytestmark = pytest.mark.ray

REQUESTS = 250
CAPACITY = 700  #: blocks; these requests have some 2000
BYTES = 64


def kvcm(capsys: pytest.CaptureFixture[str], running: Manager, *arguments: str) -> Any:
    capsys.readouterr()
    code = main([*arguments, "--data-dir", str(running.data_dir), "--json"])
    out, err = capsys.readouterr()
    assert code == 0, err
    return json.loads(out)


def test_a_recorded_replay_is_the_trace(running: Manager, capsys: pytest.CaptureFixture[str]) -> None:
    group = f"default-lru-{CAPACITY}x{BYTES}"
    run = ("replay", "conversation", "--quota-blocks", str(CAPACITY), "--block-bytes", str(BYTES),
           "--window", "1", "--limit")  # fmt: skip
    kvcm(capsys, running, *run, "0")  # makes the group
    began = kvcm(capsys, running, "trace", "record", group)
    live = kvcm(capsys, running, *run, str(REQUESTS))
    done = kvcm(capsys, running, "trace", "stop", group)
    assert (done["file"], done["state"]) == (began["file"], "stopped")
    assert Path(done["file"]).parent == Path(running.data_dir, "traces")

    recorded = list(open_trace(done["file"]))
    wanted = [request.keys.tolist() for request in open_trace("conversation", REQUESTS)]
    assert [request.keys.tolist() for request in recorded if request.op == READ] == wanted
    assert _writes_follow_their_look_ups(recorded) == done["writes"] > 100
    assert done["missing_requests"] == 0

    accesses = load(done["file"])
    found = totals(accesses, replay(accesses, "lru", CAPACITY))
    assert (found.requests, found.accessed_blocks) == (REQUESTS, live["accessed_blocks"])
    assert found.hit_blocks == live["hit_blocks"] == done["hit_blocks"] > 0
    assert found.hit_blocks < totals(accesses, replay(accesses, "lru", 10_000)).hit_blocks, "it was full"
    assert accesses.block_tokens == 512
    assert done in kvcm(capsys, running, "trace", "list", group)["recordings"]


def _writes_follow_their_look_ups(recorded: list[Any]) -> int:
    """How many writes there are; each must be of the keys that were just looked up."""
    writes = 0
    for before, request in zip([None, *recorded], recorded, strict=False):
        if request.op == WRITE:
            assert before is not None
            assert before.op == READ
            assert request.keys.tolist() == before.keys.tolist()
            writes += 1
    return writes


def test_a_killed_group_leaves_its_recording(running: Manager, registry: RegistryHandle) -> None:
    name = f"r-{secrets.token_hex(4)}"
    registry.call_sync("register_instance", instance(name, "default", BYTES))
    group = GroupHandle("default")
    file = group.ask_sync("record_start", {"instance_id": name})["file"]
    keys = np.arange(1, 9, dtype=np.int64)
    with connect(running.data_dir) as client:
        cache = client.instance(name)
        cache.put(keys, {"tp0": bytes(BYTES * len(keys))})
        cache.match(keys)
        client.flush_touches()
        _until(lambda: group.ask_sync("recordings")["recordings"][-1]["requests"] >= 2)
        os.kill(group.ask_sync("usage")["pid"], signal.SIGKILL)
        assert [request.keys.tolist() for request in open_trace(file)] == [keys.tolist()] * 2
        _until(lambda: cache.match(keys).length == len(keys))
    _until(lambda: _states(group).get(file) == "cut off")
    assert group.ask_sync("record_start", {})["file"] != file
    assert group.ask_sync("record_stop")["state"] == "stopped"


def _states(group: GroupHandle) -> dict[str, str]:
    """Nothing while the group's actor starts again."""
    try:
        return {each["file"]: each["state"] for each in group.ask_sync("recordings")["recordings"]}
    except Unavailable:
        return {}


def _until(true: Any) -> None:
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)
