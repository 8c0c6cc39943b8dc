"""Order between the engine's computation and our threads' copies, where the cache is on a GPU.

A GPU computes behind the back of the thread that asked for it, and our threads copy on streams of their own
(and return when their copies are done). In host memory a call that has returned has been done.
"""

from __future__ import annotations

from collections.abc import Callable

from kvcm_ray.connectors.vllm.memory import WorkerMemory


def computed(memory: WorkerMemory) -> Callable[[], None]:
    """Call it on the thread that computes; the result waits until all that was asked for is done."""
    if _on_cpu(memory):
        return _nothing
    import torch  # type: ignore[import-not-found,unused-ignore]

    event = torch.cuda.Event()
    event.record()
    synchronize: Callable[[], None] = event.synchronize
    return synchronize


def _on_cpu(memory: WorkerMemory) -> bool:
    return all(group.on_cpu for group in memory.specs.values())


def _nothing() -> None:
    """There is nothing to wait for."""
