"""Requests and responses of our calls for watching groups (additive). Numbers inside are JSON numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kvcm_ray.core.model import Double, Int32, Int64
from kvcm_ray.serve_app.admin_messages import CommonResponse
from kvcm_ray.serve_app.messages import BlocksRequest, MetaResponse, Request


@dataclass(frozen=True, slots=True)
class GetStatisticsRequest(Request):
    instance_group: str = ""  #: "" = all
    without_instances: bool = False  #: sums only, for many groups with many instances


@dataclass(frozen=True, slots=True)
class GetStatisticsResponse(CommonResponse):
    #: gauges, counters, histograms, tiers and instances of each group, or why it does not answer
    statistics: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class GetHistoryRequest(Request):
    instance_group: str = ""
    since_s: Double = 0.0  #: unix seconds; rows that ended later. 0 = the last hour


@dataclass(frozen=True, slots=True)
class GetHistoryResponse(CommonResponse):
    history: dict[str, Any] | None = None  #: step_s, now_s and columns


@dataclass(frozen=True, slots=True)
class GetEventsRequest(Request):
    instance_group: str = ""
    after_id: Int64 = 0  #: `next` of the answer before
    limit: Int32 = 0  #: 0 = 100


@dataclass(frozen=True, slots=True)
class GetEventsResponse(CommonResponse):
    journal: dict[str, Any] | None = None  #: events, next, dropped, incarnation


@dataclass(frozen=True, slots=True)
class ExplainCacheRequest(BlocksRequest):
    pass


@dataclass(frozen=True, slots=True)
class ExplainCacheResponse(MetaResponse):
    explanation: dict[str, Any] | None = None  #: matched_blocks, and blocks: one entry for each key


@dataclass(frozen=True, slots=True)
class GetHotPrefixesRequest(Request):
    instance_group: str = ""
    depth: Int32 = 0  #: levels of the tree; 0 = 8
    limit: Int32 = 0  #: nodes; 0 = 100


@dataclass(frozen=True, slots=True)
class GetHotPrefixesResponse(CommonResponse):
    prefixes: dict[str, Any] | None = None  #: lookups, since_s, nodes
