"""What a worker's threads did, gathered for the scheduler and for the figures."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from kvcm_ray.connectors.vllm.orders import Report


@dataclass(slots=True)
class Moved:
    """Since the last time it was taken."""

    loaded_bytes: int = 0
    loaded_blocks: int = 0
    load_seconds: list[float] = field(default_factory=list)
    saved_bytes: int = 0
    save_seconds: list[float] = field(default_factory=list)
    unsaved_blocks: int = 0


class Notes:
    """`report` and `moved` are changed by several threads: under the lock."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.report = Report()
        self.moved = Moved()

    def take_report(self) -> Report | None:
        with self.lock:
            if not self.report:
                return None
            report, self.report = self.report, Report()
            return report

    def take_moved(self) -> Moved:
        with self.lock:
            moved, self.moved = self.moved, Moved()
            return moved
