"""The client's metadata by HTTP alone: no Ray, no index, only the protocol.

Bytes still go straight to the storages: each location URI names a segment's directory below the
root path that registerInstance told in ``storage_configs``, and the directory holds its
description. (A storage below /dev/shm is listed as a file storage there; it is mapped, not read.)

`HttpBackend` is the `Channel` of clients that read the index themselves, too.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import orjson

from kvcm_ray import errors, tracing
from kvcm_ray.client.backend import NO_SEGMENT, NewBlocks, new_id, no_blocks
from kvcm_ray.client.credentials import Credentials
from kvcm_ray.client.places import differ, fill
from kvcm_ray.client.results import Lookup, WritePlan
from kvcm_ray.client.runtime import drive
from kvcm_ray.client.transfer import Blocks
from kvcm_ray.core.limits import KEYS_PER_CALL_MAX, LOOK_UPS_PER_TOUCH_MAX
from kvcm_ray.core.mask import BlockMask
from kvcm_ray.core.model import (
    InstanceInfo,
    NfsSpec,
    Segment,
    ShmSpec,
    StorageConfig,
    from_plain,
    to_plain,
)
from kvcm_ray.core.requests import (
    BlockLocations,
    Flags,
    Keys,
    Leased,
    PinBlocks,
    Pinned,
    Removed,
    Touch,
    TrimInstance,
    UnpinBlocks,
    WriteFinished,
)
from kvcm_ray.core.uri import ParsedUri, parse_uri
from kvcm_ray.errors import KvcmError, Unavailable
from kvcm_ray.storage_adapters import layout

Json = dict[str, Any]

_SHM = "/dev/shm/"
_CODE = re.compile(r" \((KVCM-[A-Z][0-9]{3})\)$")
_BY_CODE: dict[str, type[KvcmError]] = {
    value.code: value
    for value in vars(errors).values()
    if isinstance(value, type) and issubclass(value, KvcmError)
}
_BY_WIRE: dict[str, type[KvcmError]] = {
    "INVALID_ARGUMENT": errors.InvalidArgument,
    "INSTANCE_NOT_EXIST": errors.InstanceNotFound,
    "DUPLICATE_ENTITY": errors.InstanceMismatch,
    "SERVICE_NOT_READY": errors.Unavailable,
    "SERVER_NOT_LEADER": errors.Unavailable,
    "UNSUPPORTED": errors.Unsupported,
}
_BY_STATUS: dict[int, type[KvcmError]] = {
    401: errors.Unauthenticated,
    403: errors.Forbidden,
    429: errors.TooManyRequests,
}


class NotReached(Unavailable):
    """Nothing listens there: the request was not even sent."""


def error_of(wire_code: str, message: str) -> KvcmError:
    """The error of an answer: by the KVCM code at its end if there is one, else by the wire's code."""
    reason = _reason(message)
    found = _CODE.search(reason)
    kind = _BY_CODE.get(found[1]) if found else None
    if found and kind:
        reason = reason[: found.start()]
    return (kind or _BY_WIRE.get(wire_code) or KvcmError)(reason or wire_code, wire=wire_code)


def _reason(message: str) -> str:
    """``Failed to do it : {"error_msg":["its word","our reason"]}`` without the wrapping."""
    _, colon, reasons = message.partition(" : {")
    try:
        found = orjson.loads("{" + reasons)["error_msg"] if colon else []
    except (orjson.JSONDecodeError, KeyError):
        found = []
    return str(found[-1]) if found else message


class HttpBackend:
    """`Backend` over ``http://host:port``, or https; see `kvcm_ray.client.backend`. Thread-safe.

    Args:
        url: of the manager; a user and password in it are sent with every call (HTTP Basic).
        blocking: see `kvcm_ray.client.runtime`.
        credentials: those of the environment by default.

    Raises:
        InvalidArgument: no URL, or credentials that cannot be read.
    """

    def __init__(self, url: str, *, blocking: bool, credentials: Credentials | None = None) -> None:
        self._given = url
        self._url, user = _without_user(url)
        self.blocking = blocking
        self._credentials = credentials or Credentials.of()
        limits = httpx.Limits(max_connections=64, max_keepalive_connections=16)
        kind = httpx.Client if blocking else httpx.AsyncClient
        self._client: Any = kind(
            base_url=self._url,
            limits=limits,
            trust_env=False,
            auth=user or self._credentials.auth(),
            verify=self._credentials.verify(self._url),
        )
        self._teller: HttpBackend | None = None
        self._storages: dict[str, dict[str, StorageConfig]] = {}  #: by instance id
        self._segments: dict[str, Segment] = {}  #: by directory

    @property
    def address(self) -> str:
        return self._url

    async def close(self) -> None:
        if self._teller is not None:
            await self._teller.close()
        if self.blocking:
            self._client.close()
        else:
            await self._client.aclose()

    async def post(self, call: str, body: Json, timeout_s: float) -> Json:
        """One API call, e.g. ``post("listStorage", {}, 5)``; the answer if its status is OK.

        Raises:
            Unavailable: no (sensible) answer in time. Or what the status says.
        """
        data = orjson.dumps({"trace_id": "kvcm-client", **body}, option=orjson.OPT_SERIALIZE_NUMPY)
        try:
            headers = {tracing.HEADER: tracing.carried()} if tracing.on else None
            limit_s = max(0.001, timeout_s)
            request = self._client.post(f"/api/{call}", content=data, timeout=limit_s, headers=headers)
            response = request if self.blocking else await request
            answer = orjson.loads(response.content)
            status = answer["header"]["status"]
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise NotReached(f"no answer from {self._url}: {error or 'it does not accept'}") from error
        except httpx.HTTPError as error:
            what = str(error) or type(error).__name__
            raise Unavailable(f"no answer from {self._url}: {what}") from error
        except (orjson.JSONDecodeError, KeyError, TypeError) as error:
            if refusal := _BY_STATUS.get(response.status_code):
                raise refusal(f"{self._url} answered {call} with status {response.status_code}") from error
            text = f"{self._url} answered {call} with status {response.status_code}"
            raise Unavailable(f"{text} and no KVCM header; is it a KVCM manager?") from error
        if response.status_code in _BY_STATUS:
            message = _CODE.sub("", _reason(status["message"]))
            raise _BY_STATUS[response.status_code](message, wire=status["code"])
        if status["code"] != "OK":
            raise error_of(status["code"], status["message"])
        return dict(answer)

    # ------------------------------------------------------------------------------- instances

    async def register(self, info: InstanceInfo, timeout_s: float) -> InstanceInfo:
        fields = to_plain(info)
        body = {"instance_group": info.instance_group_name}
        for name in ("instance_id", "block_size", "location_spec_infos", "model_deployment"):
            body[name] = fields[name]
        body["location_spec_groups"] = fields["location_spec_groups"]
        for name in ("model_version", "supersedes", "handover_seconds"):
            if fields[name]:  # ours; a manager of others has no such fields
                body[name] = fields[name]
        answer = await self.post("registerInstance", body, timeout_s)
        self._storages[info.instance_id] = _storages(answer.get("storage_configs") or "[]")
        return info

    async def instance(self, instance_id: str, timeout_s: float) -> InstanceInfo:
        answer = await self.post("getInstanceInfo", {"instance_id": instance_id}, timeout_s)
        found = _instance_info(answer["instance_info"])
        return await self.register(found, timeout_s)  # the same again: to be told the storages

    # ----------------------------------------------------------------------------------- reads

    async def match_length(self, info: InstanceInfo, keys: Keys, timeout_s: float) -> int:
        return len(await self._get(info, "QT_PREFIX_MATCH", keys, timeout_s))

    async def match(self, info: InstanceInfo, keys: Keys, timeout_s: float) -> Blocks:
        locations = await self._get(info, "QT_PREFIX_MATCH", keys, timeout_s)
        return await self._blocks(info, keys[: len(locations)], locations, timeout_s)

    async def lookup(self, info: InstanceInfo, keys: Keys, timeout_s: float) -> Lookup:
        answers = await self._get(info, "QT_BATCH_GET", keys, timeout_s)
        found = [any(spec["uri"] for spec in answer["location_specs"]) for answer in answers]
        flags = np.array(found, np.bool_)
        present = [answer for answer, hit in zip(answers, found, strict=True) if hit]
        return Lookup(flags, await self._blocks(info, keys[flags], present, timeout_s))

    async def elsewhere(self, info: InstanceInfo, tried: Blocks, timeout_s: float) -> Blocks:
        """The wire has one location a block, so only blocks that were moved since are elsewhere."""
        found = await self.lookup(info, tried.keys, timeout_s)
        places = BlockLocations.empty(len(tried))
        places.segment[:] = NO_SEGMENT
        now = BlockLocations.empty(len(tried))
        for name in ("segment", "slot", "generation"):
            getattr(now, name)[found.flags] = getattr(found.blocks.locations, name)
        fill(places, found.flags & differ(now, tried.locations), now)
        return Blocks(tried.keys, places, found.blocks.segments, found.blocks.storages)

    async def lease(self, info: InstanceInfo, keys: Keys, lease_s: float, timeout_s: float) -> Leased:
        body = {
            "instance_id": info.instance_id,
            "block_keys": keys,
            "lease_ms": max(1, int(lease_s * 1000)),
        }
        answer = await self.post("leaseCache", body, timeout_s)
        return Leased(int(answer["blocks"]), int(answer["lease_ms"]))

    async def _get(self, info: InstanceInfo, query: str, keys: Keys, timeout_s: float) -> Sequence[Json]:
        if not len(keys):
            return []  # the protocol refuses a query of no keys
        body = {"instance_id": info.instance_id, "query_type": query, "block_keys": keys}
        answer = await self.post("getCacheLocation", body, timeout_s)
        return list(answer["locations"])

    # ---------------------------------------------------------------------------------- writes

    async def start_write(self, info: InstanceInfo, new: NewBlocks, timeout_s: float) -> WritePlan:
        keys = new.keys
        if not len(keys):
            return WritePlan(new_id(), np.zeros(0, np.bool_), no_blocks(), time.monotonic())
        begin_s = time.monotonic()
        seconds = max(1, int(new.lease_s))  # the protocol counts whole seconds
        body: Json = {
            "instance_id": info.instance_id,
            "block_keys": keys,
            "write_timeout_seconds": seconds,
            "location_spec_group_names": new.spec_groups,
        }
        if new.partial_tail:
            body["partial_tail"] = True
        answer = await self.post("startWriteCache", body, timeout_s)
        exists = _exists(answer["block_mask"], len(keys))
        blocks = await self._blocks(info, keys[~exists], answer["locations"], timeout_s)
        deadline_s = begin_s + min(new.lease_s, seconds)
        return WritePlan(answer["write_session_id"], exists, blocks, deadline_s)

    async def finish_write(
        self, info: InstanceInfo, session_id: str, success: BlockMask, timeout_s: float
    ) -> WriteFinished:
        if success.offset is not None:
            mask: Json = {"offset": success.offset}
        else:
            mask = {"bool_masks": {"values": success.values}}
        body = {
            "instance_id": info.instance_id,
            "write_session_id": session_id,
            "success_blocks": mask,
        }
        await self.post("finishWriteCache", body, timeout_s)
        good = success.offset if success.offset is not None else sum(success.values or ())
        return WriteFinished(good, len(success.values or ()) - good if success.values else 0)

    async def remove(self, info: InstanceInfo, keys: Keys, timeout_s: float) -> Removed:
        if len(keys):
            body = {"instance_id": info.instance_id, "block_keys": keys}
            await self.post("removeCache", body, timeout_s)
        return Removed(-1)

    async def trim(self, info: InstanceInfo, what: TrimInstance, timeout_s: float) -> Removed:
        body: Json = {"instance_id": info.instance_id, "strategy": "TS_REMOVE_ALL_CACHE"}
        if what.drop_sessions:
            body["strategy"] = "TS_REMOVE_ALL_META"
        elif what.begin_s or what.end_s < 2**32 - 1:
            end_s = min(what.end_s, 2**31 - 1)
            body |= {"begin_timestamp": what.begin_s, "end_timestamp": end_s}
            body["strategy"] = "TS_TIMESTAMP"
        await self.post("trimCache", body, timeout_s)
        return Removed(-1)

    async def pin(self, info: InstanceInfo, what: PinBlocks | UnpinBlocks, timeout_s: float) -> Pinned:
        body: Json = {"instance_id": info.instance_id, "name": what.name}
        if isinstance(what, UnpinBlocks):
            answer = await self.post("unpinCache", body, timeout_s)
        else:
            body |= {"block_keys": what.keys, "until_s": what.until_s}
            answer = await self.post("pinCache", body, timeout_s)
        return Pinned(int(answer["keys"]), int(answer["blocks"]))

    async def flush_touches(self) -> None:
        """The manager's replicas report the reads that they serve, by themselves and a moment later."""

    # ----------------------------------------------------------------------------- reported reads

    def tell(self, group: str, touches: Sequence[Touch], timeout_s: float) -> None:
        """See `Channel.tell`."""
        if not self.blocking:
            if self._teller is None:
                self._teller = HttpBackend(self._given, blocking=True, credentials=self._credentials)
            self._teller.tell(group, touches, timeout_s)
            return
        for instance_id, look_ups in touch_calls(touches):
            drive(self.post("touchCache", {"instance_id": instance_id, "look_ups": look_ups}, timeout_s))

    # ------------------------------------------------------------------------------- locations

    async def _blocks(
        self, info: InstanceInfo, keys: Keys, locations: Sequence[Json], timeout_s: float
    ) -> Blocks:
        """The locations of an answer, one for each of `keys`, as numbers.

        A segment that is not to be found from here is left out of ``segments``: its blocks are
        misses.
        """
        if len(keys) != len(locations):
            raise Unavailable(f"{self._url} gave {len(locations)} locations for {len(keys)} blocks")
        uris = [parse_uri(location["location_specs"][0]["uri"]) for location in locations]
        storages = self._storages.get(info.instance_id, {})
        if any(uri.storage not in storages for uri in uris):  # one that was added meanwhile
            await self.register(info, timeout_s)
            storages = self._storages[info.instance_id]
        numbers = np.zeros((3, len(keys)), np.uint32)
        segments: dict[int, Segment] = {}
        for position, uri in enumerate(uris):
            segment = self._segment(uri, storages)
            if segment is not None:
                segments[segment.segment_id] = segment
            number = NO_SEGMENT if segment is None else segment.segment_id
            numbers[:, position] = number, uri.slot, uri.generation
        return Blocks(keys, BlockLocations(*numbers), segments, storages)

    def _segment(self, uri: ParsedUri, storages: Mapping[str, StorageConfig]) -> Segment | None:
        directory = uri.path.rpartition("/")[0]
        found = self._segments.get(directory)
        if found is None and uri.storage in storages:
            root = storages[uri.storage].root_path + "/"
            found, _ = layout.read_description(Path(directory))
            if found is None or root + found.path != directory:
                return None
            self._segments[directory] = found
        return found


def touch_calls(touches: Sequence[Touch]) -> Iterator[tuple[str, list[Json]]]:
    """The touchCache calls that report `touches`: of one instance each, in order, within the limits."""
    by_instance: dict[str, list[Touch]] = {}
    for touch in touches:
        by_instance.setdefault(touch.instance_id, []).append(touch)
    for instance_id, reported in by_instance.items():
        part: list[Json] = []
        keys = 0
        for touch in reported:
            count = sum(len(some) for some in (touch.keys, touch.missed, touch.held) if some is not None)
            if part and (len(part) >= LOOK_UPS_PER_TOUCH_MAX or keys + count > KEYS_PER_CALL_MAX):
                yield instance_id, part
                part, keys = [], 0
            part.append(_look_up(touch))
            keys += count
        yield instance_id, part


def _look_up(touch: Touch) -> Json:
    """As ``messages.LookUp``."""
    body: Json = {"query_type": "QT_PREFIX_MATCH", "block_keys": touch.keys}
    if touch.missed is not None:
        body["missed_keys"] = touch.missed
        if touch.held is not None:
            body["held_keys"] = touch.held
    else:
        body["query_type"] = "QT_REVERSE_ROLL_SW_MATCH" if touch.chained else "QT_BATCH_GET"
        body["asked_blocks"] = touch.lookups
    if touch.time_s:
        body["time_us"] = int(touch.time_s * 1e6)
    return body


def _without_user(url: str) -> tuple[str, tuple[str, str] | None]:
    """The URL as it may be shown, and the user and password that stand in it."""
    try:
        parsed = httpx.URL(url.rstrip("/"))
    except httpx.InvalidURL as error:
        raise errors.InvalidArgument(f"not a URL: {error}") from error
    user = (parsed.username, parsed.password) if parsed.username else None
    return str(parsed.copy_with(username=None, password=None)) if user else url.rstrip("/"), user


def _exists(mask: Json, count: int) -> Flags:
    values = (mask.get("bool_masks") or {}).get("values")
    return BlockMask(mask.get("offset"), None if values is None else tuple(values)).covers(count)


def _storages(text: str) -> dict[str, StorageConfig]:
    """The usable ones of a ``storage_configs`` text."""
    found = {}
    for entry in orjson.loads(text):
        name, root = entry["global_unique_name"], entry["storage_spec"].get("root_path", "")
        if root.startswith(_SHM):
            found[name] = StorageConfig(name, shm=ShmSpec(root))
        elif entry["type"] == "file":
            found[name] = StorageConfig(name, nfs=NfsSpec(root))
    return found


def _instance_info(fields: Json) -> InstanceInfo:
    for spec in fields["location_spec_infos"]:
        spec["size"] = int(spec["size"])  # int64 is a string on the wire
    return from_plain(InstanceInfo, fields)
