"""Fill a cache past its quota: cold blocks leave, a pinned system prompt stays.

Start a manager first (`make up`), then run this file. KVCM_URL names another manager. It makes a group
of its own, "full-cache", for 64 blocks, and removes it at the end.
"""

import json
import os
import urllib.request
from typing import Any

import numpy as np

from kvcm_ray.client import connect

URL = os.environ.get("KVCM_URL", "http://127.0.0.1:6382")
BLOCK_BYTES = 64 * 1024
GROUP: dict[str, Any] = {
    "name": "full-cache",
    "global_quota_group_name": "full-cache",
    "quota": {"capacity": 64 * BLOCK_BYTES},
    "cache_config": {
        "data_storage_strategy": "CPS_PREFER_3FS",
        "reclaim_strategy": {"reclaim_policy": "POLICY_ADAPTIVE"},
        "meta_indexer_config": {
            "meta_storage_backend_config": {"storage_type": "local"},
            "meta_cache_policy_config": {"type": "LRU"},
        },
    },
    "version": 1,
}


def call(name: str, /, **fields: Any) -> dict[str, Any]:
    body = json.dumps(fields).encode()
    request = urllib.request.Request(f"{URL}/api/{name}", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        found: dict[str, Any] = json.load(answer)
    status = found["header"]["status"]
    if status["code"] != "OK":
        raise SystemExit(f"{name}: {status['message']}")
    return found


storage = call("listStorage")["storage"][0]["global_unique_name"]
call("createInstanceGroup", instance_group={**GROUP, "storage_candidates": [storage]})
try:
    client = connect(URL)
    cache = client.register("full-cache", block_size=16, specs={"tp0": BLOCK_BYTES}, group="full-cache")
    system = list(range(8 * 16))  # every prompt begins with these tokens: 8 blocks
    cache.pin("system prompt", cache.block_keys(system))  # before or after they are written

    for conversation in range(20):
        keys = cache.block_keys(system + [1_000 + conversation] * (8 * 16))
        cache.put(keys, np.full((len(keys), BLOCK_BYTES), conversation, np.uint8))

    report = call("getCapacity", instance_group="full-cache")["capacity"]
    print("written:    ", 8 + 20 * 8, "blocks into a quota of 64")
    print("there now:  ", report["blocks"], "blocks,", report["reclaim"]["evicted_blocks"], "were evicted")
    print("pinned:     ", report["pinned_bytes"] // BLOCK_BYTES, "blocks")
    print("the prompt: ", cache.match_length(cache.block_keys(system)), "of 8 blocks found")
    assert report["used_bytes"] <= report["quota_bytes"]
    assert cache.match_length(cache.block_keys(system)) == 8
finally:
    call("removeInstanceGroup", name="full-cache", force=True)
