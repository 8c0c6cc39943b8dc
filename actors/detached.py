"""How every actor of ours is made: named, detached, restarted by Ray without limit, found if it exists.

They run on the node of the data directory, which is where the process runs that makes them. Ray
repeats no call by itself: the handles do, with the same event id.
"""

from __future__ import annotations

from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from kvcm_ray.actors.names import NAMESPACE


def get_or_create(cls: type, name: str, *args: Any, node_id: str | None = None, **options: Any) -> Any:
    """Handle of the actor `name`, made of `cls` and `args` if there is none.

    Args:
        node_id: to run on; this process's node if None.
        options: more of Ray's actor options.
    """
    node_id = node_id or ray.get_runtime_context().get_node_id()
    here = NodeAffinitySchedulingStrategy(node_id, soft=False)
    actor: Any = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=0, **options)(cls)
    named = {"name": name, "namespace": NAMESPACE, "lifetime": "detached", "get_if_exists": True}
    return actor.options(**named, scheduling_strategy=here).remote(*args)
