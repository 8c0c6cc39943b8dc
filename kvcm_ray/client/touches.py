"""Reports of reads, sent in the background: they steer eviction and count hits. Some may be lost.

At most `PENDING_MAX` reports wait (older ones are dropped) and one call every `EVERY_S` carries
them, in the order of the reads. `flush` sends them at once, for callers that need to know when the
manager has heard of their reads.
"""

from __future__ import annotations

import collections
import logging
import threading
from collections.abc import Callable, Sequence

from kvcm_ray.core.requests import Touch
from kvcm_ray.errors import KvcmError

log = logging.getLogger(__name__)

EVERY_S = 0.2
PENDING_MAX = 8_192

Send = Callable[[str, Sequence[Touch]], None]


class TouchCollector:
    """Collects touches by group and sends them from a daemon thread, started by the first one."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._pending: collections.deque[tuple[str, Touch]] = collections.deque(maxlen=PENDING_MAX)
        self._wake = threading.Event()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._sending = threading.Lock()  #: held until what was taken has arrived

    def add(self, group: str, touch: Touch) -> None:
        self._pending.append((group, touch))  # atomic; drops the oldest when full
        if self._thread is None:
            self._start()
        self._wake.set()

    def close(self) -> None:
        """Send what is pending, for a second at most."""
        self._closed.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join(timeout=1.0)

    def flush(self) -> None:
        """Send what is pending and wait until it has arrived, what the thread is sending included.

        Raises:
            KvcmError: the reports of some group were lost.
        """
        lost: KvcmError | None = None
        with self._sending:
            for group, touches in self._taken().items():
                try:
                    self._send(group, touches)
                except KvcmError as error:
                    log.debug("%d touches of group %s were lost: %s", len(touches), group, error)
                    lost = lost or error
        if lost is not None:
            raise lost

    def _taken(self) -> dict[str, list[Touch]]:
        """All that is pending, by group."""
        by_group: dict[str, list[Touch]] = {}
        for _ in range(len(self._pending)):  # what is added meanwhile waits for the next time
            group, touch = self._pending.popleft()
            by_group.setdefault(group, []).append(touch)
        return by_group

    def _start(self) -> None:
        with self._lock:
            if self._thread is None and not self._closed.is_set():
                self._thread = threading.Thread(target=self._run, name="kvcm-touches", daemon=True)
                self._thread.start()

    def _run(self) -> None:
        while not self._closed.is_set():
            self._wake.wait()
            self._closed.wait(EVERY_S)
            self._wake.clear()
            try:
                self.flush()
            except Exception as error:  # nothing here may end the thread or disturb a reader
                log.debug("touches were lost: %s", error)
