"""Model upgrades: which instance replaces which, and the way back. Pure functions on the registry's records.

Instances of one model form a chain: each names in `supersedes` the one that it replaces, and all but the
newest retire. A retiring instance is served as before while its share of the quota shrinks; how, is the
group's business (`kvcm_ray.core`). A roll back swaps the two at the end of the chain, so that rolling back
the other one goes forward again.

An engine sends its registration each time it starts, also after a roll back. So a registration never ends
a retirement: only a roll back or the removal of the successor does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from kvcm_ray.core.model import InstanceInfo
from kvcm_ray.errors import InstanceMismatch, InstanceNotFound, InvalidArgument, UpgradeConflict

HANDOVER_DEFAULT_S = 3_600

Instances = Mapping[str, InstanceInfo]


def successor_of(instances: Instances, instance_id: str) -> InstanceInfo | None:
    """The registered instance that supersedes this one."""
    return next((i for i in instances.values() if i.supersedes == instance_id), None)


def registered_again(known: InstanceInfo, info: InstanceInfo, instances: Instances) -> InstanceInfo:
    """What is stored after `info` was registered once more.

    `supersedes` counts if the instance superseded none and does not retire, and the other one exists.

    Raises:
        InstanceMismatch: another shape or model version.
    """
    different = "" if known.same_shape(info) else known.difference(info)
    if not different and info.model_version not in ("", known.model_version):
        different = f"model_version {known.model_version!r}, not {info.model_version!r}"
    if different:
        raise InstanceMismatch(f"instance {info.instance_id!r} is registered with another shape: {different}")
    again = dataclasses.replace(known, model_deployment=info.model_deployment)
    if known.supersedes or known.retiring_seconds or info.supersedes not in instances:
        return again
    return dataclasses.replace(again, supersedes=info.supersedes, handover_seconds=info.handover_seconds)


def retire(instances: Instances, successor: InstanceInfo, now_s: int) -> InstanceInfo:
    """The record of the instance that `successor` supersedes, retiring from now on.

    Raises:
        InstanceNotFound: it is not registered.
        InvalidArgument: it is of another group.
        UpgradeConflict: another instance supersedes it already.
    """
    before = instances.get(successor.supersedes)
    if before is None:
        raise InstanceNotFound(f"supersedes: instance {successor.supersedes!r} is not registered")
    if before.instance_group_name != successor.instance_group_name:
        raise InvalidArgument(
            f"supersedes: instance {before.instance_id!r} is of group {before.instance_group_name!r}, "
            f"{successor.instance_id!r} of group {successor.instance_group_name!r}; both share one quota, "
            "so they must be of one group"
        )
    other = successor_of(instances, before.instance_id)
    if other is not None and other.instance_id != successor.instance_id:
        raise UpgradeConflict(
            f"instance {before.instance_id!r} is superseded by {other.instance_id!r} already; "
            "supersede that one, or roll it back first"
        )
    return _retiring(before, successor.handover_seconds or HANDOVER_DEFAULT_S, now_s)


def rolled_back(instances: Instances, successor_id: str, now_s: int) -> tuple[InstanceInfo, InstanceInfo]:
    """Records of the successor, which retires from now on, and of its predecessor, which no longer does.

    Raises:
        InstanceNotFound: one of the two is not registered.
        UpgradeConflict: the instance supersedes none, or is itself superseded.
    """
    successor = instances.get(successor_id)
    if successor is None:
        raise InstanceNotFound(f"instance {successor_id!r} is not registered")
    if not successor.supersedes:
        raise UpgradeConflict(
            f"instance {successor_id!r} supersedes none, so there is nothing to roll back to"
        )
    later = successor_of(instances, successor_id)
    if later is not None:
        raise UpgradeConflict(
            f"instance {successor_id!r} is superseded by {later.instance_id!r}; roll back that one first"
        )
    before = instances.get(successor.supersedes)
    if before is None:
        raise InstanceNotFound(
            f"instance {successor.supersedes!r}, which {successor_id!r} supersedes, was removed"
        )
    seconds = successor.handover_seconds or HANDOVER_DEFAULT_S
    old = dataclasses.replace(successor, supersedes=before.supersedes, handover_seconds=0)
    new = dataclasses.replace(
        before, supersedes=successor_id, handover_seconds=seconds, retiring_since_s=0, retiring_seconds=0
    )
    return _retiring(old, seconds, now_s), new


def after_removal(instances: Instances, removed: InstanceInfo) -> list[InstanceInfo]:
    """Records that change when `removed` goes: what it replaced serves on for good, unless it was the
    middle of a chain."""
    before = instances.get(removed.supersedes)
    if before is None or successor_of(instances, removed.instance_id) is not None:
        return []
    return [dataclasses.replace(before, retiring_since_s=0, retiring_seconds=0)]


def _retiring(info: InstanceInfo, seconds: int, now_s: int) -> InstanceInfo:
    return dataclasses.replace(info, retiring_since_s=now_s, retiring_seconds=seconds)
