"""`KVCMConnector`: vLLM looks up, loads and saves its KV blocks in this cache.

    vllm serve MODEL --kv-transfer-config '{"kv_connector": "KVCMConnector",
        "kv_connector_module_path": "kvcm_ray.connectors.vllm", "kv_role": "kv_both",
        "kv_connector_extra_config": {"kvcm_data_dir": "./kvcm-data"}}'

* `connector`: the class on vLLM's base class; the only module here, with `metrics`, that needs vLLM
* `settings`, `identity`: what the user says, and how instances are named
* `node`, `link`: the manager as this process sees it: look-ups in the index, the rest by HTTP
* `layout`, `windows`: which blocks make one of ours, and which of them are kept
* `memory`, `device`: where their bytes are, and when they are there
* `scheduler`, `saving`: the scheduler's side
* `worker`, `loading`, `copying`, `notes`: a worker's side
* `orders`: what travels between them

A cache never breaks serving: all that goes wrong here is a miss or a block that is not saved.
"""

from __future__ import annotations

from typing import Any

__all__ = ["KVCMConnector"]


def __getattr__(name: str) -> Any:
    """vLLM is imported with the class that needs it, so that the other modules do without."""
    if name == "KVCMConnector":
        from kvcm_ray.connectors.vllm.connector import KVCMConnector

        return KVCMConnector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
