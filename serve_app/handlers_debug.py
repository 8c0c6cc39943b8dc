"""The debug API: calls that are to fail on purpose. Off unless a manager is started with it."""

from __future__ import annotations

from typing import Any

from kvcm_ray.errors import InvalidArgument
from kvcm_ray.serve_app import debug_messages as d
from kvcm_ray.serve_app.endpoint import Call
from kvcm_ray.serve_app.faults import Faults


def _faults(call: Call) -> Faults:
    assert call.faults is not None, "the debug API is served with a fault table only"
    return call.faults


async def inject_fault(call: Call) -> dict[str, Any]:
    request: d.InjectFaultRequest = call.request
    if not request.api_name:
        raise InvalidArgument("api_name is empty")
    if request.fault_type not in set(d.FaultType):
        raise InvalidArgument(f"fault_type {int(request.fault_type)} is none of FT_INTERNAL_ERROR")
    if request.fault_trigger_strategy not in set(d.FaultTriggerStrategy):
        raise InvalidArgument(
            f"fault_trigger_strategy {int(request.fault_trigger_strategy)} is none of ALWAYS, ONCE"
        )
    if request.trigger_at_call < 0:
        raise InvalidArgument(f"trigger_at_call {request.trigger_at_call} is negative")
    once = request.fault_trigger_strategy == d.FaultTriggerStrategy.ONCE
    _faults(call).inject(request.api_name, once=once, at_call=request.trigger_at_call)
    return {
        "message": f"Inject fault successfully, api_name: {request.api_name}, "
        f"fault_type: internal_error, fault_trigger_strategy: {'once' if once else 'always'}"
    }


async def remove_fault(call: Call) -> dict[str, Any]:
    name = call.request.api_name
    if not _faults(call).remove(name):
        raise InvalidArgument(f"Remove fault fail, api_name:{name}")
    return {"message": f"Remove fault successfully, api_name: {name}"}


async def clear_faults(call: Call) -> dict[str, Any]:
    _faults(call).clear()
    return {}
