"""Requests that a router sent and that have not ended, counted by replica.

Serve forgets a queue's length after some seconds without news, and generating may take longer. It tells of
beginnings and ends from several threads, of an end possibly before the beginning, and of a request that a
replica refused under the same name as of the one that another replica then got.
"""

from __future__ import annotations

import threading
from collections import OrderedDict

ENDED_MAX = 1024  #: ends that came before their beginnings, or never get one

_Name = tuple[str, str]  #: request and replica


class Running:
    def __init__(self) -> None:
        self._running: set[_Name] = set()
        self._counts: dict[str, int] = {}
        self._ended: OrderedDict[_Name, None] = OrderedDict()
        self._lock = threading.Lock()

    def began(self, request: str, replica: str) -> None:
        name = (request, replica)
        with self._lock:
            if name in self._ended:
                del self._ended[name]
            elif name not in self._running:
                self._running.add(name)
                self._counts[replica] = self._counts.get(replica, 0) + 1

    def ended(self, request: str, replica: str) -> None:
        name = (request, replica)
        with self._lock:
            if name in self._running:
                self._running.discard(name)
                self._counts[replica] -= 1
            else:
                self._ended[name] = None
                while len(self._ended) > ENDED_MAX:
                    self._ended.popitem(last=False)

    def count(self, replica: str) -> int:
        return self._counts.get(replica, 0)

    def gone(self, replica: str) -> None:
        """Nothing runs on it any more."""
        with self._lock:
            self._counts.pop(replica, None)
            self._running = {name for name in self._running if name[1] != replica}
