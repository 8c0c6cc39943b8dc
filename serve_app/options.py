"""What a replica of the gateway is told at its start, beside the data directory."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class GatewayOptions:
    debug_api: bool = False  #: serve the debug API, which makes calls fail on purpose
    requests_per_second: float = 0.0  #: of one account, or one address without accounts; 0 for no limit
    burst: float = 0.0  #: requests that may come at once; 0 for those of two seconds
