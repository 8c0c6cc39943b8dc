"""The manager as an engine's process sees it: never through Ray.

An engine must not join the manager's Ray: it may be in another one (Ray Serve), and Ray ends the processes
of a cluster that is gone. So look-ups read the index of this node, and changes are HTTP calls to the
manager that runs now.
"""

from __future__ import annotations

from pathlib import Path

from kvcm_ray.client.backend import Backend
from kvcm_ray.client.connect import open_backend
from kvcm_ray.connectors.vllm.settings import Settings


def backend_of(settings: Settings) -> Backend:
    """Raises Unavailable: there is no such data directory, or no manager was ever started on it."""
    address = settings.kvcm_url or str(Path(settings.kvcm_data_dir).absolute())
    return open_backend(address, blocking=True, ray=False)
