"""Write the KV blocks of a prompt, find them again by prefix, read them back.

Start a manager first (`make up`), then run this file. KVCM_URL names another manager.
"""

import os

import numpy as np

from kvcm_ray.client import connect

BLOCK_BYTES = 64 * 1024

client = connect(os.environ.get("KVCM_URL", "http://127.0.0.1:6382"))
cache = client.register("quickstart", block_size=16, specs={"tp0": BLOCK_BYTES})

prompt = list(range(1000, 1000 + 8 * 16))  # 128 tokens are 8 blocks of 16
keys = cache.block_keys(prompt)
blocks = np.random.default_rng(0).integers(0, 256, (len(keys), BLOCK_BYTES), dtype=np.uint8)
print("blocks written:", cache.put(keys, blocks))

longer = [*prompt, *range(32)]  # the same conversation, one turn later
print("blocks found:  ", cache.match(cache.block_keys(longer)).length, "of", len(longer) // 16)

out = np.zeros_like(blocks)
print("blocks read:   ", cache.get(keys, out))
print("same bytes:    ", bool((out == blocks).all()))
