"""Accounts, their tokens, and the log of what was done with them."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from kvcm_ray.actors.accounts import new_token
from kvcm_ray.core.model import AccountRole
from kvcm_ray.errors import InvalidArgument
from kvcm_ray.serve_app import admin_messages as a
from kvcm_ray.serve_app.access.audit import TAIL_MAX, AuditLog
from kvcm_ray.serve_app.endpoint import Call
from kvcm_ray.serve_app.validation import require

LIFETIME_DEFAULT_S = 90 * 86_400
LIFETIME_MAX_S = 3_650 * 86_400
AUDIT_DEFAULT = 100  #: entries


async def add_account(call: Call) -> dict[str, Any]:
    request: a.AddAccountRequest = call.request
    require("AddAccount", request, "user_name")
    await call.backend.registry(
        "add_account", request.user_name, request.password, _role(request.role), request.instance_groups
    )
    return {}


async def update_account(call: Call) -> dict[str, Any]:
    request: a.UpdateAccountRequest = call.request
    require("UpdateAccount", request, "user_name")
    role = None if request.role is None else _role(request.role)
    await call.backend.registry(
        "update_account", request.user_name, request.password, role, request.instance_groups
    )
    return {}


def _role(role: int) -> AccountRole:
    """The protocol takes a number that nobody knows for a user."""
    return AccountRole(role) if role in set(AccountRole) else AccountRole.ROLE_USER


async def delete_account(call: Call) -> dict[str, Any]:
    require("DeleteAccount", call.request, "user_name")
    await call.backend.registry("delete_account", call.request.user_name)
    return {}


async def list_account(call: Call) -> dict[str, Any]:
    return {"accounts": tuple(await call.backend.registry("list_accounts"))}


# ----------------------------------------------------------------------------------------- tokens


async def create_token(call: Call) -> dict[str, Any]:
    """The secret is made here and leaves with the answer; the registry gets its hash."""
    request: a.CreateTokenRequest = call.request
    require("CreateToken", request, "user_name")
    if not 0 <= request.lifetime_s <= LIFETIME_MAX_S:
        raise InvalidArgument(f"lifetime_s {request.lifetime_s} is not within 0..{LIFETIME_MAX_S}")
    if request.no_expiry and request.lifetime_s:
        raise InvalidArgument("lifetime_s and no_expiry are both set")
    lifetime_s = 0 if request.no_expiry else request.lifetime_s or LIFETIME_DEFAULT_S
    secret, token = new_token(
        request.user_name, label=request.label, lifetime_s=lifetime_s, metrics_only=request.metrics_only
    )
    await call.backend.registry("add_token", token)
    return {"secret": secret, "token": token}


async def list_token(call: Call) -> dict[str, Any]:
    return {"tokens": tuple(await call.backend.registry("list_tokens"))}


async def revoke_token(call: Call) -> dict[str, Any]:
    require("RevokeToken", call.request, "token_id")
    await call.backend.registry("revoke_token", call.request.token_id)
    return {}


async def list_audit(call: Call) -> dict[str, Any]:
    count = call.request.limit or AUDIT_DEFAULT
    if not 0 < count <= TAIL_MAX:
        raise InvalidArgument(f"limit {count} is not within 1..{TAIL_MAX}")
    log = AuditLog(Path(call.backend.view.data_dir))
    return {"entries": tuple(await asyncio.to_thread(log.tail, count))}
