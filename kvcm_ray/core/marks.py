"""Water marks: when reclaiming begins by itself, and how far it goes.

The high mark is the wire's ``trigger_strategy.used_percentage`` (a fraction), the low one is ours. A
group that sets none is reclaimed on demand only, at its quota; but upper tiers then have marks
nevertheless, as a block that goes down in time spares a write the waiting.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvcm_ray.core.limits import RECLAIM_STEP_BLOCKS
from kvcm_ray.core.model import CacheReclaimStrategy, InstanceGroup, ReclaimPolicy

GAP = 0.05  #: between the marks, if the low one is not set
UPPER_TIER_HIGH = 0.95
TTL_DEFAULT_S = 3_600

POLICY_NAMES = {
    ReclaimPolicy.POLICY_UNSPECIFIED: "lru",
    ReclaimPolicy.POLICY_LRU: "lru",
    ReclaimPolicy.POLICY_LFU: "lfu",
    ReclaimPolicy.POLICY_TTL: "ttl",
    ReclaimPolicy.POLICY_ADAPTIVE: "adaptive",
}


@dataclass(frozen=True, slots=True)
class Marks:
    """Fractions of a capacity."""

    high: float
    low: float

    def of(self, capacity: int) -> Levels:
        # Rounded: 0.95 - 0.05 is a little less than 0.9, which is no reason to drop a block.
        return Levels(round(self.high * capacity), round(self.low * capacity))


@dataclass(frozen=True, slots=True)
class Levels:
    """The same in bytes or keys."""

    high: int
    low: int

    def excess(self, held: int, falling: bool) -> int:
        """How much of `held` is to go: down to the low mark, once it was above the high one
        (`falling`), though that takes several steps."""
        return max(held - self.low, 0) if falling or held > self.high else 0


def strategy_of(group: InstanceGroup) -> CacheReclaimStrategy:
    strategy = group.cache_config.reclaim_strategy if group.cache_config else None
    return strategy or CacheReclaimStrategy()


def policy_of(group: InstanceGroup) -> str:
    return POLICY_NAMES.get(strategy_of(group).reclaim_policy, "lru")


def ttl_ms(group: InstanceGroup) -> int:
    """Time after its last touch at which a block expires; 0 = never."""
    strategy = strategy_of(group)
    if strategy.ttl_seconds <= 0 and strategy.reclaim_policy is ReclaimPolicy.POLICY_TTL:
        return TTL_DEFAULT_S * 1_000
    return max(strategy.ttl_seconds, 0) * 1_000


def marks_of(group: InstanceGroup, *, upper_tier: bool = False) -> Marks:
    """Marks of the total, of key counts and of the last tier, or those of a tier above it."""
    strategy = strategy_of(group)
    trigger = strategy.trigger_strategy
    high = min(trigger.used_percentage, 1.0) if trigger else 0.0
    if high <= 0:
        if not upper_tier:
            return Marks(1.0, min(strategy.low_water_percentage, 1.0) or 1.0)
        high = UPPER_TIER_HIGH
    low = strategy.low_water_percentage
    return Marks(high, min(low, high) if low > 0 else max(high - GAP, 0.0))


def total_levels(group: InstanceGroup) -> Levels:
    """Marks of the group as a whole, by percentage or by ``used_size``, whichever is lower."""
    marks = marks_of(group)
    levels = marks.of(group.quota_bytes)
    trigger = strategy_of(group).trigger_strategy
    if trigger and 0 < trigger.used_size < levels.high:
        # The low mark stands in the same proportion to it as to the high one.
        low = min(levels.low, round(trigger.used_size * marks.low / marks.high))
        return Levels(trigger.used_size, low)
    return levels


def step_blocks(group: InstanceGroup, resident: int) -> int:
    """Blocks that one step may evict or move: at least one."""
    strategy = strategy_of(group)
    bounds = [RECLAIM_STEP_BLOCKS]
    if strategy.reclaim_step_size > 0:
        bounds = [strategy.reclaim_step_size]
    if strategy.reclaim_step_percentage > 0:
        bounds.append(resident * min(strategy.reclaim_step_percentage, 100) // 100)
    return max(min(bounds), 1)
