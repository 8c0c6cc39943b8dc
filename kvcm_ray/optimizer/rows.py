"""What an analysis says of one policy at one capacity, and of the trace."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from kvcm_ray.optimizer.economics import Worth
from kvcm_ray.optimizer.replay import Totals


@dataclass(frozen=True, slots=True)
class Row:
    """One policy at one capacity."""

    policy: str
    capacity_blocks: int
    totals: Totals
    optimum_hit_blocks: int | None  #: None if it was not worked out
    capacity_bytes: float | None  #: None if it is not known how large a block is
    worth: Worth | None  #: None without a model

    @property
    def hit_blocks(self) -> int:
        return self.totals.hit_blocks

    @property
    def hit_ratio(self) -> float:
        return self.totals.hit_ratio

    @property
    def token_hit_ratio(self) -> float | None:
        """None if the trace does not say how long prompts are."""
        return self.totals.token_hit_ratio if self.totals.prompt_tokens else None

    @property
    def optimum_gap(self) -> float | None:
        """How much higher the hit ratio of the offline optimum is."""
        if self.optimum_hit_blocks is None:
            return None
        return (self.optimum_hit_blocks - self.hit_blocks) / max(1, self.totals.accessed_blocks)

    def to_dict(self) -> dict[str, Any]:
        row: dict[str, Any] = {
            "policy": self.policy,
            "capacity_blocks": self.capacity_blocks,
            "hit_blocks": self.hit_blocks,
            "hit_ratio": self.hit_ratio,
            "token_hit_ratio": self.token_hit_ratio,
            "optimum_gap": self.optimum_gap,
        }
        if self.totals.held_blocks:
            row["held_hit_blocks"] = self.totals.held_hit_blocks
        if self.capacity_bytes is not None:
            row["capacity_bytes"] = round(self.capacity_bytes)
        return row | (_of_worth(self.worth) if self.worth else {})


def _of_worth(worth: Worth) -> dict[str, Any]:
    """Flat, so that it fits a row of a table; None for what a trace without length does not say."""
    found: dict[str, Any] = {
        name: getattr(worth, name)
        for name in (
            "gpu_hours_saved", "flops_saved", "flops_share", "saved_usd_per_hour", "cache_usd_per_hour",
            "net_usd_per_hour", "net_usd", "worth_loading",
        )
    }  # fmt: skip
    for name, spread in (("ttft", worth.cached_s), ("ttft_change", worth.change_s)):
        found |= {f"{name}_{of}_s": getattr(spread, of) for of in ("mean", "p50", "p99")}
    return {name: None if math.isnan(value) else value for name, value in found.items()}


@dataclass(frozen=True, slots=True)
class Facts:
    """What the trace is. With a sample, all but the first two are estimates."""

    requests: int
    accessed_blocks: int  #: looked up
    unique_blocks: int
    seconds: float | None  #: from the first request to the last; None if the trace was streamed
    block_tokens: int  #: 0 if unknown
    sample_rate: float  #: 1: all of it

    def to_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in Facts.__slots__}
