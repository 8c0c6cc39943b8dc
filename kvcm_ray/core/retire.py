"""Instances that a successor replaces: their share of the quota goes from all to nothing.

The share falls evenly over the handover, so the successor fills up with what is really asked for
while the old one still serves what it holds.
"""

from __future__ import annotations

from kvcm_ray.core.model import InstanceInfo

HANDOVER_DEFAULT_S = 3_600


def share(info: InstanceInfo, now_s: int) -> float | None:
    """Fraction of the group's quota that the instance may use; None if it is not retiring."""
    if not info.retiring_since_s:
        return None
    return seconds_left(info, now_s) / _duration_s(info)


def allowed_bytes(info: InstanceInfo, capacity: int, now_s: int) -> int | None:
    """Bytes that the instance may hold; None if it is not retiring."""
    if not info.retiring_since_s:
        return None
    return capacity * seconds_left(info, now_s) // _duration_s(info)


def seconds_left(info: InstanceInfo, now_s: int) -> int:
    """Until the share of a retiring instance is nothing."""
    duration_s = _duration_s(info)
    return min(max(info.retiring_since_s + duration_s - now_s, 0), duration_s)


def _duration_s(info: InstanceInfo) -> int:
    return info.retiring_seconds if info.retiring_seconds > 0 else HANDOVER_DEFAULT_S
