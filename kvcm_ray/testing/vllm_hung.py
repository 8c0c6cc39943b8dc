"""The connector on file storages that hang: while the file named in KVCM_TEST_HANGS exists, none answers.

For an engine's process, which imports its connector by the name of a module. (Needs vLLM.)
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvcm_ray.connectors.vllm import connector
from kvcm_ray.storage_adapters.file import FileStorage

VARIABLE = "KVCM_TEST_HANGS"
LONGEST_S = 400.0  #: so that no process hangs for ever


def hanging(call: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(call)
    def late(*args: Any, **kwargs: Any) -> Any:
        switch, end_s = Path(os.environ[VARIABLE]), time.monotonic() + LONGEST_S
        while switch.exists() and time.monotonic() < end_s:
            time.sleep(0.02)
        return call(*args, **kwargs)

    return late


class KVCMConnector(connector.KVCMConnector):
    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        for name in ("read", "write"):
            call = getattr(FileStorage, name)
            if not hasattr(call, "__wrapped__"):
                setattr(FileStorage, name, hanging(call))
        super().__init__(vllm_config, role, kv_cache_config)
