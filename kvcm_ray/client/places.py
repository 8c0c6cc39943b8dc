"""Comparing and combining the places of blocks."""

from __future__ import annotations

import numpy as np

from kvcm_ray.core.requests import BlockLocations, Flags


def differ(one: BlockLocations, other: BlockLocations) -> Flags:
    """Which of the locations, one by one, are not the same."""
    same = (one.segment == other.segment) & (one.slot == other.slot)
    different: Flags = ~(same & (one.generation == other.generation))
    return different


def fill(places: BlockLocations, flags: Flags, found: BlockLocations) -> None:
    """Take over those of `found` that the flags name."""
    for name in ("segment", "slot", "generation"):
        np.copyto(getattr(places, name), getattr(found, name), where=flags)
