"""A worker's side: what the engine says of its steps, for the loads and saves that threads of ours make."""

from __future__ import annotations

from kvcm_ray.client.runtime import SyncRuntime
from kvcm_ray.client.transfer import Transfer
from kvcm_ray.connectors.vllm.copying import Saves
from kvcm_ray.connectors.vllm.loading import LayerLoad, Loads
from kvcm_ray.connectors.vllm.memory import Staging, WorkerMemory
from kvcm_ray.connectors.vllm.notes import Moved, Notes
from kvcm_ray.connectors.vllm.orders import Orders, Report
from kvcm_ray.connectors.vllm.settings import Settings


class WorkerSide:
    """Args:
    writes: this worker writes its specs (another one holds the same bytes otherwise).
    """

    def __init__(self, settings: Settings, memory: WorkerMemory, *, writes: bool) -> None:
        self._writes = writes
        self._transfer = Transfer(SyncRuntime())
        self._notes = Notes()
        staging = Staging(settings.staging_bytes)
        self._loads = Loads(settings, memory, staging, self._transfer, self._notes)
        self._saves = Saves(memory, staging, self._transfer, self._notes)
        self._layers = {name for group in memory.specs.values() for name in group.of_layer}
        self._announced: set[str] = set()  #: layers that the engine waits for, as seen so far
        self._in_step: list[LayerLoad] = []
        self._missing: set[int] = set()
        self._failed_steps = 0

    # ------------------------------------------------------------------------------------ steps

    def begin_step(self, orders: Orders) -> None:
        """Start the loads. A layer that the engine was never seen to wait for must be there now."""
        if orders.info is not None:
            self._loads.info = orders.info
        for load in orders.loads:
            if load.in_step:
                self._in_step.append(self._loads.begin_in_step(load))
            else:
                self._loads.begin(load)
        for name in self._layers - self._announced if self._in_step else ():
            self._wait(name)

    def wait_for_layer(self, name: str) -> None:
        """The step is about to use this layer."""
        self._announced.add(name)
        self._wait(name)

    def _wait(self, name: str) -> None:
        for load in self._in_step:
            load.wait(name)

    def layer_computed(self, orders: Orders, name: str) -> None:
        """The step has used this layer and filled it: copy what is to be saved of it."""
        if self._writes and orders.captures:
            self._saves.layer_computed(orders, name)

    def end_step(self, orders: Orders) -> None:
        """The step is computed."""
        self._end_loads()
        if self._writes:
            # Whatever is computed upon missing blocks is wrong, until the scheduler has heard of it.
            self._saves.end_step(orders, void=orders.failed_steps < self._failed_steps)

    def _end_loads(self) -> None:
        missing: set[int] = set().union(*(load.end() for load in self._in_step))
        self._in_step = []
        if missing:
            self._missing |= missing
            self._failed_steps += 1
            with self._notes.lock:
                self._notes.report.failed_steps += 1

    def take_missing(self) -> set[int]:
        """Engine blocks that a step computed upon and that had not come, since the last call."""
        self._end_loads()
        missing, self._missing = self._missing, set()
        return missing

    def finished_loads(self) -> dict[str, set[int]]:
        """Requests whose loads ended since the last call, and their engine blocks that did not come."""
        return self._loads.finished()

    def report(self) -> Report | None:
        return self._notes.take_report()

    def moved(self) -> Moved:
        return self._notes.take_moved()

    def close(self) -> None:
        """Finish what is being saved, for a moment; the threads are daemons."""
        self._saves.close()
        self._loads.close()
        self._transfer.close()
