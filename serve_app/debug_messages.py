"""Requests of the debug API; its responses are a header only, without a request_id."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from kvcm_ray.core.model import Int32
from kvcm_ray.serve_app.messages import Request


class FaultType(enum.IntEnum):
    FT_INTERNAL_ERROR = 0


class FaultTriggerStrategy(enum.IntEnum):
    ALWAYS = 0  #: at each call
    ONCE = 1  #: at one call, and never again


@dataclass(frozen=True, slots=True)
class InjectFaultRequest(Request):
    api_name: str = ""  #: UpperCamelCase, e.g. GetCacheLocation; any API but the debug API's
    fault_type: FaultType = FaultType.FT_INTERNAL_ERROR
    fault_trigger_strategy: FaultTriggerStrategy = FaultTriggerStrategy.ALWAYS
    trigger_at_call: Int32 = 0  #: ONCE: which call from now on, of all replicas; 0 and 1: the next


@dataclass(frozen=True, slots=True)
class RemoveFaultRequest(Request):
    api_name: str = ""
