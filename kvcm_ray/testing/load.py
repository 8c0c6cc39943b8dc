"""Requests without a pause to a manager's HTTP, from threads, while a test does something to it.

with Load(url) as load:
    ...
assert load.failures == []
"""

from __future__ import annotations

import threading
from types import TracebackType

import httpx

TIMEOUT_S = 15.0


class Load:
    """Look-ups and writes of one instance, each checked.

    Args:
        url: of the manager.
        threads: clients at a time, each with one connection.
    """

    def __init__(self, url: str, threads: int = 2) -> None:
        self._url = url.rstrip("/")
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(n,), daemon=True) for n in range(threads)]
        self.answered = 0
        self.failures: list[str] = []  #: what went wrong; a request that was refused, too

    def __enter__(self) -> Load:
        with httpx.Client(timeout=TIMEOUT_S) as client:
            self._call(client, "registerInstance", {
                "trace_id": "load", "instance_group": "default", "instance_id": "load", "block_size": 16,
                "model_deployment": {"model_name": "m", "dtype": "FP8", "tp_size": 1},
                "location_spec_infos": [{"name": "tp0", "size": 4096}],
            })  # fmt: skip
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(TIMEOUT_S * 2)

    def _run(self, number: int) -> None:
        keys = [number * 1000 + i for i in range(8)]
        with httpx.Client(timeout=TIMEOUT_S) as client:
            while not self._stop.is_set():
                blocks = {"trace_id": "load", "instance_id": "load", "block_keys": keys}
                look = {"query_type": "QT_PREFIX_MATCH", "block_mask": {"offset": 0}}
                self._call(client, "getCacheLocation", blocks | look)
                self._call(client, "startWriteCache", blocks | {"write_timeout_seconds": 5})

    def _call(self, client: httpx.Client, name: str, body: dict[str, object]) -> None:
        try:
            answer = client.post(f"{self._url}/api/{name}", json=body)
            code = answer.json()["header"]["status"]["code"]
        except (httpx.HTTPError, ValueError, KeyError) as error:
            self.failures.append(f"{name}: {type(error).__name__}: {error}")
            return
        if code != "OK":
            self.failures.append(f"{name}: {answer.text[:300]}")
        self.answered += 1
