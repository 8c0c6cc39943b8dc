"""The manager as an application in a Serve config file, for ``serve deploy`` and KubeRay's RayService.

    applications:
    - name: kvcm
      import_path: kvcm_ray.cluster.serve_config:app
      route_prefix: /kvcm
      args: {data_dir: /data/kvcm, tiers: ["shm:4GiB", "file:64GiB"]}

Serve calls `app` when it builds the application: that starts the manager's actors in this cluster, on the
node that has the data directory, unless they run already. Deploying a changed file replaces the replicas of
HTTP one by one; tiers count for a new data directory only. Taking the application out of the file stops
HTTP; ``kvcm down`` on that node ends the actors too.
"""

from __future__ import annotations

from typing import Any

import ray
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from ray.serve import Application

from kvcm_ray.actors.reclaimer import RECLAIMERS_DEFAULT
from kvcm_ray.cluster import inside
from kvcm_ray.errors import InvalidArgument, Unavailable
from kvcm_ray.serve_app.deployment import REPLICAS, build

HEAD = "node:__internal_head__"  #: Ray's own resource of the head node


class Arguments(BaseModel):
    """``args`` of the application."""

    model_config = ConfigDict(extra="forbid")

    data_dir: str = Field(description="on a disk of the node that `node_resource` names")
    tiers: list[str] = Field([], description="fastest first, for a new data directory")
    node_resource: str = Field(HEAD, description="a resource that only the node of the data directory has")
    route_prefix: str = Field(inside.ROUTE_PREFIX, description="the same as the application's")
    replicas: int = Field(REPLICAS, ge=1, le=64, description="processes that answer HTTP")
    reclaimers: int = Field(RECLAIMERS_DEFAULT, ge=1, description="processes that erase blocks")
    accounts: bool | None = Field(None, description="calls need an account; needed where Serve is public")


def app(args: dict[str, Any]) -> Application:
    """The Serve application of a manager whose actors run in this cluster.

    Args:
        args: as in the file; see `Arguments`.

    Raises:
        InUse: the cluster has a manager on another data directory.
        InvalidArgument: an argument is unknown or wrong.
        Unavailable: no node has the resource, or the actors did not get ready.
    """
    try:
        given = Arguments.model_validate(args)
    except ValidationError as error:
        raise InvalidArgument(f"args of the application: {error}") from error
    node_id = node_with(given.node_resource)
    options = inside.InsideOptions(
        given.data_dir,
        tuple(given.tiers),
        given.route_prefix,
        given.replicas,
        given.reclaimers,
        accounts=given.accounts,
        declared=True,
    )
    inside.start_host(options, node_id)
    return build(given.data_dir, replicas=given.replicas, node_id=node_id)


def node_with(resource: str) -> str:
    """Id of the living node that has `resource`. Raises `Unavailable` unless exactly one has."""
    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get(resource, 0) > 0]
    if len(nodes) != 1:
        raise Unavailable(
            f"{len(nodes)} living nodes of this Ray cluster have the resource {resource!r}; "
            "exactly one must, the one with the data directory",
            hint="Give that node the resource (`ray start --resources`), or name another as node_resource.",
        )
    return str(nodes[0]["NodeID"])
