"""A manager's node as an engine sees it: look-ups in this process, all else by HTTP, no Ray.

An engine must not join the manager's Ray: it may be in another one (Ray Serve), and Ray ends the
processes of a cluster that is gone. So changes go to the URL in ``manager.json``, that of the manager which
runs now. What was looked up here is told to it in the background, by asking the same again.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kvcm_ray.actors import paths
from kvcm_ray.actors.view import RegistryView
from kvcm_ray.client.backend import Backend
from kvcm_ray.client.direct import DirectBackend
from kvcm_ray.client.http import HttpBackend
from kvcm_ray.client.runtime import drive
from kvcm_ray.connectors.vllm.settings import Settings
from kvcm_ray.core.model import InstanceInfo
from kvcm_ray.core.requests import Touch
from kvcm_ray.errors import Unavailable

LOOK_EVERY_S = 0.25  #: at manager.json, for a manager that was started again
TELL_TIMEOUT_S = 2.0
TELL_MAX = 32  #: look-ups told at a time, a few times a second; of more, the last ones stand for all


class NodeBackend(DirectBackend):
    """`Backend` on the index of this node and a manager's URL.

    Raises:
        Unavailable: no manager was ever started on `data_dir`.
    """

    def __init__(self, data_dir: str) -> None:
        super().__init__(RegistryView(data_dir), blocking=True)
        self._http: HttpBackend | None = None
        self._http_lock = threading.Lock()
        self._http_until = 0.0

    async def close(self) -> None:
        await super().close()
        if self._http is not None:
            await self._http.close()

    async def register(self, info: InstanceInfo, timeout_s: float) -> InstanceInfo:
        """As registered: without a call if it is already, in this shape."""
        known = self.view.instances().get(info.instance_id)
        if known is not None and known.same_shape(info) and known.model_version == info.model_version:
            return known
        await super().register(info, timeout_s)
        return self.view.instances().get(info.instance_id, info)

    def _by_http(self) -> HttpBackend:
        """Raises Unavailable while no manager runs."""
        with self._http_lock:
            now = time.monotonic()
            if self._http is None or now >= self._http_until:
                url = _manager_url(self.view.data_dir)
                if self._http is None or self._http.address != url.rstrip("/"):
                    self._http = HttpBackend(url, blocking=True)
                self._http_until = now + LOOK_EVERY_S
            return self._http

    def _send_touches(self, group: str, touches: Sequence[Touch]) -> None:
        http = self._by_http()
        for touch in touches[-TELL_MAX:]:
            prompt = touch.keys if touch.missed is None else np.concatenate([touch.keys, touch.missed])
            body = {
                "instance_id": touch.instance_id, "query_type": "QT_PREFIX_MATCH", "block_keys": prompt,
            }  # fmt: skip
            drive(http.post("getCacheLocation", body, TELL_TIMEOUT_S))


def _manager_url(data_dir: Path) -> str:
    """Raises Unavailable."""
    try:
        url = json.loads(paths.manager_file(data_dir).read_bytes())["url"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Unavailable(f"no manager runs on {data_dir}: {error!r}") from error
    return str(url)


def backend_of(settings: Settings) -> Backend:
    """Raises Unavailable: the data directory was never a manager's."""
    if settings.kvcm_url:
        return HttpBackend(settings.kvcm_url, blocking=True)
    if not Path(settings.kvcm_data_dir).is_dir():
        raise Unavailable(f"there is no data directory {settings.kvcm_data_dir!r}")
    return NodeBackend(settings.kvcm_data_dir)
