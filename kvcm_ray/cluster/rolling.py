"""``restart``: renew what a manager consists of, one process after another, while requests go on.

The process of `up` does it when it gets SIGHUP, the `Host` when it is asked: they know what the manager
was started with. Each HTTP replica is replaced before the old one ends; an actor that restarts lets its
callers wait for about two seconds. Ray, the HTTP proxy and the process of `up` itself stay.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvcm_ray.actors.names import HOST, NAMESPACE, REGISTRY
from kvcm_ray.actors.paths import resolve
from kvcm_ray.cluster.facts import find
from kvcm_ray.errors import KvcmError, Unavailable

ACTOR_TIMEOUT_S = 60.0
REPLICAS_TIMEOUT_S = 120.0
RESTART_TIMEOUT_S = 600.0

Note = Callable[[str], None]


def restart(data_dir: str | os.PathLike[str]) -> list[str]:
    """Restart the processes of the manager on a data directory; returns what was restarted.

    Raises:
        Unavailable: no manager runs there, or a process did not come back in time.
    """
    folder = resolve(data_dir)
    manager = find(folder)
    if manager is None:
        raise Unavailable(f"no manager runs on {data_dir}")
    if manager.inside:
        from kvcm_ray.cluster.inside import restart_inside

        return restart_inside(manager)
    before = _result(folder)
    os.kill(manager.pid, signal.SIGHUP)
    deadline = time.monotonic() + RESTART_TIMEOUT_S
    while (result := _result(folder)) == before:
        if not manager.alive or time.monotonic() > deadline:
            raise Unavailable(f"the manager on {data_dir} did not restart; see its log")
        time.sleep(0.1)
    if result["failed"]:
        raise Unavailable(f"the restart of the manager on {data_dir} stopped: {result['failed']}")
    return list(result["restarted"])


def report(data_dir: Path, work: Callable[[Note], None]) -> None:
    """Do `work` and leave a result for `restart`, which waits for it."""
    restarted: list[str] = []
    failed = ""
    try:
        work(restarted.append)
    except KvcmError as error:
        failed = error.message
    text = json.dumps({"time_s": time.time(), "restarted": restarted, "failed": failed})
    partial = _result_file(data_dir).with_suffix(".partial")
    partial.write_text(text)
    partial.replace(_result_file(data_dir))


def _result_file(data_dir: Path) -> Path:
    return data_dir / "restart.json"


def _result(data_dir: Path) -> dict[str, Any]:
    try:
        result: dict[str, Any] = json.loads(_result_file(data_dir).read_bytes())
        return result
    except (OSError, ValueError):
        return {}


# ------------------------------------------------------------------ in a process of the manager's Ray


def renew_actors(note: Note) -> None:
    """Restart reclaimers, groups and the registry, in this order. Raises `Unavailable`."""
    import ray

    named = ray.util.list_named_actors(all_namespaces=True)
    names = [each["name"] for each in named if each["namespace"] == NAMESPACE and each["name"] != HOST]
    for name in sorted(names, key=lambda name: (name == REGISTRY, name.startswith("group:"), name)):
        _renew(name)
        note(name)


def _renew(name: str) -> None:
    import ray

    try:
        actor: Any = ray.get_actor(name, namespace=NAMESPACE)
    except ValueError:
        return  # removed meanwhile
    deadline = time.monotonic() + ACTOR_TIMEOUT_S
    before = _pid(actor, deadline)
    ray.kill(actor, no_restart=False)
    while _pid(actor, deadline) == before:
        time.sleep(0.05)


def _pid(actor: Any, deadline: float) -> int:
    """Of an actor's process, as soon as it answers. Raises `Unavailable`."""
    import ray

    while True:
        try:
            left_s = max(deadline - time.monotonic(), 0.1)
            pid: int = ray.get(actor.__ray_call__.remote(lambda _: os.getpid()), timeout=left_s)
            return pid
        except ray.exceptions.RayError as error:
            if time.monotonic() > deadline:
                raise Unavailable(f"{actor} did not answer within {ACTOR_TIMEOUT_S:g} s") from error
            time.sleep(0.05)


def renew_replicas(app: Any, name: str, route_prefix: str, note: Note) -> None:
    """Deploy an application that differs from the running one, and wait for its replicas.

    Raises:
        Unavailable: they did not come in time; the old ones go on.
    """
    from ray import serve

    serve.run(app, name=name, route_prefix=route_prefix, blocking=False)
    deadline = time.monotonic() + REPLICAS_TIMEOUT_S
    while not _settled(serve.status().applications[name]):
        if time.monotonic() > deadline:
            raise Unavailable(f"new replicas of HTTP were not ready within {REPLICAS_TIMEOUT_S:g} s")
        time.sleep(0.2)
    note("gateway")


def _settled(application: Any) -> bool:
    states = [deployment.replica_states for deployment in application.deployments.values()]
    return application.status == "RUNNING" and all(set(state) == {"RUNNING"} for state in states)
