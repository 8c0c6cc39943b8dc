"""Every route against every kind of credentials, generated from the routes and the table of rules."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from kvcm_ray.serve_app.access.rules import PAGES, RULES, page_role
from kvcm_ray.serve_app.endpoint import Endpoint
from kvcm_ray.serve_app.endpoints import DEBUG, ENDPOINTS
from kvcm_ray.serve_app.grpc.servicer import routes
from kvcm_ray.testing.access import Guarded, basic
from kvcm_ray.testing.grpc import Grpc, grpc_beside

ALL = (*ENDPOINTS, *DEBUG)
#: Kind of credentials -> the role that they prove; None if they prove nothing.
KINDS: dict[str, str | None] = {
    "none": None,
    "unknown scheme": None,
    "bad bearer": None,
    "empty bearer": None,
    "expired token": None,
    "revoked token": None,
    "token of a removed account": None,
    "wrong password": None,
    "unknown account": None,
    "no password": None,
    "two headers": None,
    "metrics token": "metrics",
    "user": "user",
    "user by password": "user",
    "user of another group": "user",
    "user of no group": "user",
    "user of all groups": "user",
    "admin": "admin",
    "admin by password": "admin",
}
MAY = {
    "admin": {"admin", "user", "metrics", "nobody"},
    "user": {"user", "nobody"},
    "metrics": {"metrics", "nobody"},
}


@pytest.fixture(scope="module")
def headers(crowd: Guarded) -> dict[str, list[tuple[str, str]]]:
    """Kind -> its headers."""
    from kvcm_ray.core.model import AccountRole

    crowd.registry("add_account", "gone", "x", AccountRole.ROLE_ADMIN)
    gone = crowd.token("gone")
    crowd.registry("delete_account", "gone")
    crowd.registry("add_account", "passwordless", "", AccountRole.ROLE_ADMIN)
    tokens = crowd.tokens
    given = {
        "unknown scheme": "Digest username=admin",
        "bad bearer": "Bearer kvcm_" + "A" * 43,
        "empty bearer": "Bearer ",
        "expired token": f"Bearer {crowd.expired_token('admin')}",
        "revoked token": f"Bearer {crowd.revoked_token('admin')}",
        "token of a removed account": f"Bearer {gone}",
        "wrong password": basic("admin", "wrong"),
        "unknown account": basic("nobody-knows-me"),
        "no password": basic("passwordless", ""),
        "metrics token": f"Bearer {crowd.token('admin', metrics_only=True)}",
        "user": f"Bearer {tokens['user']}",
        "user by password": basic("user"),
        "user of another group": f"Bearer {tokens['stranger']}",
        "user of no group": f"bearer  {tokens['scopeless']}",
        "user of all groups": f"Bearer {tokens['all_groups']}",
        "admin": f"Bearer {tokens['admin']}",
        "admin by password": basic("admin"),
    }
    found = {kind: [("authorization", value)] for kind, value in given.items()}
    admin = ("authorization", f"Bearer {tokens['admin']}")
    return {**found, "none": [], "two headers": [admin, ("authorization", "Bearer x")]}


def test_every_endpoint_has_a_row_and_every_row_an_endpoint() -> None:
    assert {endpoint.rpc for endpoint in ALL} == set(RULES)


def test_every_page_has_a_row(crowd: Guarded) -> None:
    without = []
    for route in crowd.app.rest.routes:
        methods: set[str] = getattr(route, "methods", None) or {"GET"}
        path: str = getattr(route, "path", "")
        listed = path in PAGES or any(p.endswith("/") and f"{path}/".startswith(p) for p in PAGES)
        if methods & {"GET", "HEAD"} and not listed:
            without.append(path)
    assert without == []


def test_the_documentation_has_the_same_table() -> None:
    text = (Path(__file__).parents[2] / "docs" / "security.md").read_text()
    told = dict(re.findall(r"^\| (nobody|metrics|user|admin) \| (.*) \|$", text, re.M))
    for role in ("user", "admin"):
        rpcs = sorted(rpc for rpc, rule in RULES.items() if rule.least == role)
        assert told[role].split(", ") == [rpc[0].lower() + rpc[1:] for rpc in rpcs]
    pages = set(told["nobody"].split(", ")) - {"gRPC health"}
    assert pages == {path for path, role in PAGES.items() if role == "nobody"}
    assert told["metrics"] == ", ".join(path for path, role in PAGES.items() if role == "metrics")


def test_all_kinds_are_tried(headers: dict[str, Any]) -> None:
    assert set(headers) == set(KINDS)


@pytest.mark.parametrize("endpoint", ALL, ids=lambda e: e.rpc)
def test_calls(crowd: Guarded, headers: dict[str, Any], endpoint: Endpoint) -> None:
    wrong = []
    for kind, role in KINDS.items():
        response = crowd.run(crowd.client.post(endpoint.path, json=_request(endpoint), headers=headers[kind]))
        least = RULES[endpoint.rpc].least
        wanted = 401 if role is None else 200 if least in MAY[role] else 403
        if response.status_code != wanted:
            wrong.append(f"{kind}: {response.status_code} instead of {wanted}: {response.text[:200]}")
        assert "internal error" not in response.text, (kind, response.text)
        if wanted != 200:
            assert _status(response)["code"] == "INVALID_ARGUMENT", (kind, response.text)
            assert response.headers["content-type"] == "application/json"
        assert ("www-authenticate" in response.headers) == (wanted == 401)
    assert not wrong, "\n".join(wrong)


def _request(endpoint: Endpoint) -> dict[str, Any]:
    """The example, about things of ``mine``; it must not touch the accounts that are tried."""
    request = dict(endpoint.example or {})
    if endpoint.rpc == "RegisterInstance":
        return request | {"instance_group": "mine", "instance_id": "mine/i1"}
    renamed = {"instance_id": "mine/i1", "instance_group": "mine", "instance_group_name": "mine"}
    own = {key: value for key, value in renamed.items() if isinstance(request.get(key), str)}
    return request | own


def _status(response: Any) -> dict[str, str]:
    return dict(response.json()["header"]["status"])


@pytest.mark.parametrize(
    "path",
    [*(p for p in PAGES if not p.endswith("/")), "/static-offline-docs/swagger-ui.css", "/nothing/here"],
)
def test_pages(crowd: Guarded, headers: dict[str, Any], path: str) -> None:
    wrong = []
    for kind, role in KINDS.items():
        response = crowd.run(crowd.client.get(path, headers=headers[kind]))
        least = page_role(path)
        if role is None:
            allowed = kind == "none" and least == "nobody"  # wrong credentials never count as none
            wanted = {200} if allowed else {401}
        else:
            wanted = {200} if least in MAY[role] else {403}
        if least in ("admin", "metrics") and 200 in wanted:
            wanted = {200, 404}  # there may be no such page
        if response.status_code not in wanted:
            wrong.append(f"{kind}: {response.status_code} instead of {wanted}: {response.text[:200]}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("endpoint", ALL, ids=lambda e: e.rpc)
def test_an_open_manager_asks_nobody(crowd: Guarded, headers: dict[str, Any], endpoint: Endpoint) -> None:
    crowd.set_required(False)
    try:
        for kind in ("none", "bad bearer", "user of another group"):
            response = crowd.run(
                crowd.client.post(endpoint.path, json=_request(endpoint), headers=headers[kind])
            )
            assert response.status_code == 200, (kind, response.text)
    finally:
        crowd.set_required(True)


def test_details_of_health_are_for_admins(crowd: Guarded) -> None:
    assert crowd.page("/healthz").json() == {"live": True, "ready": True}
    user, admin = crowd.tokens["user"], crowd.tokens["admin"]
    assert crowd.page("/healthz", f"Bearer {user}").json() == {"live": True, "ready": True}
    assert "dependencies" in crowd.page("/healthz", f"Bearer {admin}").json()


# ------------------------------------------------------------------------------------------- gRPC


@pytest.fixture(scope="module")
def wire(crowd: Guarded) -> Iterator[Grpc]:
    with grpc_beside(crowd) as found:
        yield found


@pytest.mark.parametrize("path", sorted(routes()))
def test_grpc(wire: Grpc, headers: dict[str, Any], path: str) -> None:
    least = RULES[path.rpartition("/")[2]].least
    wrong = []
    for kind, role in KINDS.items():
        if kind == "two headers":
            continue
        allowed = role is not None and least in MAY[role]
        wanted = "UNAUTHENTICATED" if role is None else "OK" if allowed else "PERMISSION_DENIED"
        try:
            wire.raw(path, b"", dict(headers[kind]))
            status = "OK"
        except grpc.aio.AioRpcError as error:
            status = error.code().name
        if status != wanted:
            wrong.append(f"{kind}: {status} instead of {wanted}")
    assert not wrong, "\n".join(wrong)


# ------------------------------------------------------------------- what exists for whom


def _about(endpoint: Endpoint, tenant: str) -> dict[str, Any] | None:
    """A request about a tenant's things; None if the call names nothing."""
    request = dict(endpoint.example or {}) | {"trace_id": "t"}
    theirs = {
        "instance_id": f"{tenant}/i1",
        "supersedes": f"{tenant}/i1",
        "instance_group": tenant,
        "instance_group_name": tenant,
    }
    if "block_keys" not in request and endpoint.rpc != "UnpinCache":  # there it is a pin's name
        theirs["name"] = tenant
    named = {key: value for key, value in theirs.items() if isinstance(request.get(key), str)}
    return request | named if named else None


NAMED = [e for e in ENDPOINTS if RULES[e.rpc].least == "user" and _about(e, "x") is not None]


@pytest.mark.parametrize("endpoint", NAMED, ids=lambda e: e.rpc)
@pytest.mark.parametrize("who", ["user", "scopeless"])
def test_what_is_anothers_does_not_exist(crowd: Guarded, endpoint: Endpoint, who: str) -> None:
    """The answers about an existing instance or group of others, and about one that never was, are the
    same but for the names."""
    theirs, never = _about(endpoint, "theirs"), _about(endpoint, "never")
    assert theirs is not None
    assert never is not None
    about_theirs = crowd.as_(who, endpoint.path.removeprefix("/api/"), **theirs)
    about_nothing = crowd.as_(who, endpoint.path.removeprefix("/api/"), **never)
    assert _anonymous(about_theirs.text, "theirs") == _anonymous(about_nothing.text, "never")
    assert about_theirs.status_code == about_nothing.status_code == 200
    assert sorted(about_theirs.headers) == sorted(about_nothing.headers)


def _anonymous(text: str, name: str) -> str:
    return re.sub(r'"request_id":"[^"]*"', '"request_id":""', text).replace(name, "NAME")


def test_calls_about_named_things_are_many() -> None:
    """The test above does not pass because it compares nothing."""
    assert {"GetCacheLocation", "RegisterInstance", "GetCapacity", "ListInstanceInfo", "RemoveInstance",
            "GetInstanceGroup"} <= {e.rpc for e in NAMED}  # fmt: skip
