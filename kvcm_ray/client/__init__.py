"""The client: what an engine uses to find, write and read KV blocks.

    from kvcm_ray.client import connect

    client = connect("http://127.0.0.1:6382")
    cache = client.register("llama-8b", block_size=16, specs={"tp0": 65536})
    keys = cache.block_keys(prompt_tokens)
    cache.put(keys, blocks)                 # one buffer for all blocks, or a list of one a block
    found = cache.match(keys).length        # leading blocks that the cache holds
    cache.get(keys, out)                    # reads them, every byte verified

`connect_async` gives the same for an event loop. A cache never breaks serving: trouble reads as a
miss.
"""

from kvcm_ray.client.aio import AsyncClient
from kvcm_ray.client.connect import connect, connect_async
from kvcm_ray.client.instance import AsyncInstance
from kvcm_ray.client.results import GetResult, Lookup, Match, PutResult, WritePlan
from kvcm_ray.client.session import AsyncWriteSession
from kvcm_ray.client.sync import Client, Instance, WriteSession

__all__ = [
    "AsyncClient",
    "AsyncInstance",
    "AsyncWriteSession",
    "Client",
    "GetResult",
    "Instance",
    "Lookup",
    "Match",
    "PutResult",
    "WritePlan",
    "WriteSession",
    "connect",
    "connect_async",
]
