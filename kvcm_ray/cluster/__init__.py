"""Start and stop a manager on this machine, and find a running one.

up(options)                          in the foreground, until SIGINT or SIGTERM
up_detached(data_dir, port, tiers)   in the background; returns when it is ready
up_inside(data_dir)                  in a Ray cluster that runs already
find(data_dir)                       the running `Manager`, or None
attach(data_dir)                     connect this process to its Ray, for actor handles
restart(data_dir)                    renew its processes, while requests go on
down(data_dir, purge=False)          stop it
"""

from __future__ import annotations

from kvcm_ray.cluster.background import attach, down, leftovers, up_detached
from kvcm_ray.cluster.defaults import DEFAULT_GROUP, DEFAULT_TIERS, parse_size, parse_tiers
from kvcm_ray.cluster.facts import Manager, find
from kvcm_ray.cluster.inside import up_inside
from kvcm_ray.cluster.launch import up
from kvcm_ray.cluster.options import Options
from kvcm_ray.cluster.rolling import restart

__all__ = [
    "DEFAULT_GROUP",
    "DEFAULT_TIERS",
    "Manager",
    "Options",
    "attach",
    "down",
    "find",
    "leftovers",
    "parse_size",
    "parse_tiers",
    "restart",
    "up",
    "up_detached",
    "up_inside",
]
