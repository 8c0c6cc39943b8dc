"""How fast a group fills up: samples of what it holds, over the last minute."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

from kvcm_ray.core.model import StorageType

WINDOW_MS = 60_000
EVERY_MS = 1_000


class Growth:
    """Bytes held by storage type, a sample a second at most."""

    def __init__(self) -> None:
        self._samples: deque[tuple[int, dict[StorageType, int]]] = deque()

    def due(self, now_ms: int) -> bool:
        return not self._samples or now_ms >= self._samples[-1][0] + EVERY_MS

    def sample(self, now_ms: int, held: Mapping[StorageType, int]) -> None:
        self._samples.append((now_ms, dict(held)))
        while self._samples[0][0] < now_ms - WINDOW_MS:
            self._samples.popleft()

    def bytes_per_s(self, now_ms: int, held: Mapping[StorageType, int], kind: StorageType | None) -> float:
        """Growth of one type, or of all together, since the oldest sample; negative if it shrinks."""
        if not self._samples or now_ms <= self._samples[0][0]:
            return 0.0
        then_ms, then = self._samples[0]
        kinds = set(then) | set(held) if kind is None else {kind}
        grown = sum(held.get(k, 0) - then.get(k, 0) for k in kinds)
        return grown * 1_000 / (now_ms - then_ms)
