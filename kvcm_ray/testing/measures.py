"""What tests measure at the points of a sweep; here, so that processes of a pool can import it."""

from __future__ import annotations

import threading

from kvcm_ray.optimizer import Accesses
from kvcm_ray.optimizer.accesses import I32


def hits_and_thread(accesses: Accesses, hits: I32) -> tuple[list[int], str]:
    """The hits of each request, and the name of the thread that works them out."""
    return hits.tolist(), threading.current_thread().name
