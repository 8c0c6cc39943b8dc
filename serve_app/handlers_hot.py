"""The calls that every prompt makes: getCacheLocation, startWriteCache, finishWriteCache, touchCache.

Their locations are written by the transport (`locations`), and getCacheLocation asks no other process. A
location on a storage that is disabled or not registered any more is a miss.
"""

from __future__ import annotations

import secrets
import time
from typing import Any

import numpy as np

from kvcm_ray.core.limits import KEYS_PER_CALL_MAX, LOOK_UPS_PER_TOUCH_MAX, SESSION_TIMEOUT_MAX_MS
from kvcm_ray.core.mask import BlockMask
from kvcm_ray.core.match import last_window
from kvcm_ray.core.requests import (
    BlockLocations,
    FinishWrite,
    Flags,
    Keys,
    StartWrite,
    Touch,
    WriteStarted,
)
from kvcm_ray.errors import InvalidArgument
from kvcm_ray.serve_app import messages as m
from kvcm_ray.serve_app.endpoint import Call, because
from kvcm_ray.serve_app.handlers_meta import keys_of
from kvcm_ray.serve_app.locations import Located, usable_storages
from kvcm_ray.serve_app.validation import require, require_blocks

_ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789"


def new_session_id() -> str:
    """32 characters of [a-z0-9] that nobody can guess."""
    number = secrets.randbits(165)
    characters = []
    for _ in range(32):
        number, digit = divmod(number, 36)
        characters.append(_ALPHABET[digit])
    return "".join(characters)


# ------------------------------------------------------------------------------ getCacheLocation


async def get_cache_location(call: Call) -> dict[str, Any]:
    request: m.GetCacheLocationRequest = call.request
    require_blocks("GetCacheLocation", request)
    keys = await keys_of(call.instance, request)
    if request.query_type == m.QueryType.QT_PREFIX_MATCH:
        found = _prefix_match(call, request, keys)
    elif request.query_type == m.QueryType.QT_BATCH_GET:
        hits, where = _lookup(call, keys)
        _touch(call, keys[hits], len(keys), chained=False)
        found = _located(call, where, hits)
    elif request.query_type == m.QueryType.QT_REVERSE_ROLL_SW_MATCH:
        found = _window_match(call, request, keys)
    else:
        raise InvalidArgument(
            f"query_type {int(request.query_type)} is none of QT_BATCH_GET, QT_PREFIX_MATCH, "
            "QT_REVERSE_ROLL_SW_MATCH"
        )
    return {"locations": found}


def _prefix_match(call: Call, request: m.GetCacheLocationRequest, keys: Keys) -> Located:
    held: Keys | None = None
    whole = True  #: what is asked for is the prompt from some block on
    if request.block_mask is not None:
        covered = request.block_mask.to_core().covers(len(keys))
        count = int(covered.sum())
        whole = bool(covered[:count].all())
        held, keys = keys[:count], keys[~covered]
    reader = call.backend.reader(call.instance)
    found = reader.match(keys).locations
    encoder = call.backend.encoder(call.instance)
    readable = encoder.prefix(found, reader.segment, call.storages, request.location_spec_names)
    length = len(readable)
    if whole:
        _touch(call, keys[:length], len(keys), missed=keys[length:], held=held, time_s=time.time())
    else:
        _touch(call, keys[:length], len(keys))
    return readable


def _touch(call: Call, keys: Keys, lookups: int, **prompt: Any) -> None:
    call.backend.touch(call.instance, Touch(call.instance.instance_id, keys, lookups, **prompt))


def _window_match(call: Call, request: m.GetCacheLocationRequest, keys: Keys) -> Located:
    size = request.sw_size
    if not 1 <= size <= len(keys):
        reason = f"sw_size {size} is not within 1..{len(keys)} (the number of keys)"
        raise because(InvalidArgument(reason), "QT_REVERSE_ROLL_SW_MATCH bad args")
    hits, found = _lookup(call, keys)
    start = last_window(hits, size)
    chosen = np.zeros(len(keys), np.bool_)
    if start is not None:
        chosen[start : start + size] = True
    _touch(call, keys[chosen], len(keys))
    return _located(call, found, chosen)


def _lookup(call: Call, keys: Keys) -> tuple[Flags, BlockLocations]:
    """Hits that a client can read, and where they are."""
    hits, found = call.backend.reader(call.instance).lookup(keys)
    if hits.any():
        hits = hits.copy()
        hits[hits] = _usable(call, found.take(hits))
    return hits, found


def _usable(call: Call, locations: BlockLocations) -> Flags:
    source = call.backend.reader(call.instance).segment
    names = usable_storages(call.storages)
    return call.backend.encoder(call.instance).usable(locations, source, names)


def _located(call: Call, locations: BlockLocations, present: Flags) -> Located:
    source = call.backend.reader(call.instance).segment
    encoder = call.backend.encoder(call.instance)
    names: tuple[str, ...] = call.request.location_spec_names
    return encoder.all(locations, present, source, call.storages, names)


# ------------------------------------------------------------------------------------ touchCache


async def touch_cache(call: Call) -> dict[str, Any]:
    """Answered when the group knows, so that a reader can wait for that."""
    request: m.TouchCacheRequest = call.request
    require("TouchCache", request, "look_ups")
    if len(request.look_ups) > LOOK_UPS_PER_TOUCH_MAX:
        reason = f"{len(request.look_ups)} look_ups, at most {LOOK_UPS_PER_TOUCH_MAX} are allowed"
        raise InvalidArgument(reason)
    touches = [_reported(call.instance.instance_id, look_up) for look_up in request.look_ups]
    blocks = sum(t.lookups for t in touches) + sum(len(each.held_keys) for each in request.look_ups)
    if blocks > KEYS_PER_CALL_MAX:
        raise InvalidArgument(f"look_ups of {blocks} blocks, at most {KEYS_PER_CALL_MAX} are allowed")
    await call.backend.send_touches(call.instance.instance_group_name, touches)
    return {}


def _reported(instance_id: str, look_up: m.LookUp) -> Touch:
    found, time_s = look_up.block_keys, max(0, look_up.time_us) / 1e6
    if look_up.query_type in (m.QueryType.QT_UNSPECIFIED, m.QueryType.QT_PREFIX_MATCH):
        held = look_up.held_keys if len(look_up.held_keys) else None
        lookups = len(found) + len(look_up.missed_keys)
        return Touch(
            instance_id, found, lookups, missed=look_up.missed_keys, held=held, time_s=time_s
        )
    if look_up.query_type not in set(m.QueryType):
        raise InvalidArgument(f"query_type {int(look_up.query_type)} is no QueryType")
    if look_up.asked_blocks < len(found):
        raise InvalidArgument(f"asked_blocks {look_up.asked_blocks} is less than the {len(found)} found")
    chained = look_up.query_type == m.QueryType.QT_REVERSE_ROLL_SW_MATCH
    return Touch(instance_id, found, look_up.asked_blocks, chained=chained, time_s=time_s)


# ------------------------------------------------------------------------------- startWriteCache


async def start_write_cache(call: Call) -> dict[str, Any]:
    request: m.StartWriteCacheRequest = call.request
    require_blocks("StartWriteCache", request)
    keys = await keys_of(call.instance, request)
    names = request.location_spec_group_names
    if names and len(names) != len(keys):
        reason = f"{len(names)} location_spec_group_names for {len(keys)} blocks"
        raise InvalidArgument(reason)
    started = await call.backend.call(
        call.instance,
        StartWrite(
            event_id=secrets.token_hex(16),
            instance_id=call.instance.instance_id,
            keys=keys,
            session_id=new_session_id(),
            timeout_ms=min(request.write_timeout_seconds * 1000, SESSION_TIMEOUT_MAX_MS),
            spec_group_names=names,
            partial_tail=request.partial_tail,
        ),
    )
    assert isinstance(started, WriteStarted)
    encoder = call.backend.encoder(call.instance)
    return {
        "write_session_id": started.session_id,
        "block_mask": m.BlockMask.from_core(BlockMask.from_flags(started.exists)),
        "locations": encoder.all(started.locations, None, started.segments.get, call.storages),
    }


# ------------------------------------------------------------------------------ finishWriteCache


async def finish_write_cache(call: Call) -> dict[str, Any]:
    request: m.FinishWriteCacheRequest = call.request
    require("FinishWriteCache", request, "write_session_id", "success_blocks")
    mask = (request.success_blocks or m.BlockMask()).to_core()
    await call.backend.seal(call.instance, request.write_session_id, mask, call.storages)
    await call.backend.call(
        call.instance,
        FinishWrite(
            event_id=secrets.token_hex(16),
            instance_id=call.instance.instance_id,
            session_id=request.write_session_id,
            success=mask,
        ),
    )
    return {}
