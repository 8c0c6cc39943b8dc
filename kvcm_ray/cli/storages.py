"""``kvcm storage``: where the bytes of blocks live. By HTTP."""

from __future__ import annotations

import time
from typing import Any

import click

from kvcm_ray.cli.output import (
    confirm,
    done,
    emit,
    force_option,
    human_bytes,
    json_option,
    note,
    outline,
    table,
    yes_option,
)
from kvcm_ray.cli.reports import reports
from kvcm_ray.cli.target import Api, Target, open_api, target_options
from kvcm_ray.cli.values import SECONDS
from kvcm_ray.errors import AlreadyExists, InUse, StorageNotFound

Json = dict[str, Any]

POLL_S = 0.2
NOTE_PERIOD_S = 2.0  #: between two lines of progress


@click.group()
def storage() -> None:
    """Storages: where blocks' bytes live."""


def list_storages(api: Api) -> list[Json]:
    """As listStorage has them, each with its ``state``: ok, draining or disabled."""
    answer = api.call("listStorage")
    states = {}
    for state in answer.get("storage_state", []):
        states[state["global_unique_name"]] = "draining" if state["is_available"] else "disabled"
    return [{**s, "state": states.get(s["global_unique_name"], "ok")} for s in answer["storage"]]


def find_storage(api: Api, name: str) -> Json:
    for found in list_storages(api):
        if found["global_unique_name"] == name:
            return found
    raise StorageNotFound(f"no storage is named {name!r}")


def storage_kind(found: Json) -> tuple[str, str]:
    """Kind and place of a storage in its JSON form."""
    for kind in ("shm", "nfs", "threefs", "vcnsthreefs", "mooncake", "tair_mem_pool"):
        if kind in found:
            spec = found[kind]
            place = spec.get("root_path") or spec.get("mountpoint") or spec.get("domain") or ""
            return "file" if kind == "nfs" else kind, place
    return "?", ""


def _storage_body(name: str, kind: str, path: str) -> Json:
    return {"global_unique_name": name, "nfs" if kind == "file" else "shm": {"root_path": path}}


storage_kind_option = click.option(
    "--kind", type=click.Choice(["file", "shm"]), default="file", show_default=True
)
storage_path_option = click.option(
    "--path", required=True, help="Absolute directory; shm needs one below /dev/shm."
)


@storage.command("list")
@target_options
@json_option
def storage_list(target: Target, as_json: bool) -> None:
    """List the storages.

    \b
    Example:
      kvcm storage list
    """
    with open_api(target) as api:
        storages = list_storages(api)
    rows = [(s["global_unique_name"], *storage_kind(s), s["state"]) for s in storages]
    emit({"storages": storages}, as_json, table(("storage", "kind", "path", "state"), rows))


@storage.command("show")
@click.argument("name")
@target_options
@json_option
def storage_show(name: str, target: Target, as_json: bool) -> None:
    """Show one storage in full.

    \b
    Example:
      kvcm storage show disk1
    """
    with open_api(target) as api:
        found = find_storage(api, name)
    emit(found, as_json, outline(found))


@storage.command("create")
@click.argument("name")
@storage_kind_option
@storage_path_option
@target_options
@json_option
def storage_create(name: str, kind: str, path: str, target: Target, as_json: bool) -> None:
    """Add a storage, e.g. kvcm storage create disk1 --path /mnt/nvme1/kv"""
    with open_api(target) as api:
        names = [s["global_unique_name"] for s in api.call("listStorage")["storage"]]
        if name in names:
            raise AlreadyExists(f"a storage named {name!r} exists already")
        api.call("addStorage", storage=_storage_body(name, kind, path))
    done(f"storage {name} added", as_json, name=name)
    note("no group uses it yet: `kvcm group update GROUP --storage ...` names all of a group, in order")


@storage.command("update")
@click.argument("name")
@storage_kind_option
@storage_path_option
@force_option
@target_options
@json_option
def storage_update(name: str, kind: str, path: str, force: bool, target: Target, as_json: bool) -> None:
    """Change a storage's place. Blocks at the old one become misses.

    \b
    Example:
      kvcm storage update disk1 --path /mnt/nvme2/kv
    """
    with open_api(target) as api:
        find_storage(api, name)
        api.call("updateStorage", storage=_storage_body(name, kind, path), force_update=force)
    done(f"storage {name} updated", as_json, name=name)


@storage.command("enable")
@click.argument("name")
@target_options
@json_option
def storage_enable(name: str, target: Target, as_json: bool) -> None:
    """Let new blocks go to a storage again.

    \b
    Example:
      kvcm storage enable disk1
    """
    _change(target, name, "enableStorage")
    done(f"storage {name} enabled", as_json, name=name)


@storage.command("disable")
@click.argument("name")
@target_options
@json_option
def storage_disable(name: str, target: Target, as_json: bool) -> None:
    """Neither write to nor read from a storage, until it is enabled.

    \b
    Example:
      kvcm storage disable disk1
    """
    _change(target, name, "disableStorage")
    done(f"storage {name} disabled", as_json, name=name)


@storage.command("drain")
@click.argument("name")
@click.option("--wait", is_flag=True, help="Return when the storage is empty.")
@click.option("--timeout", type=SECONDS, help="Wait at most so long; then exit code 1.")
@target_options
@json_option
def storage_drain(
    name: str, wait: bool, timeout: int | None, target: Target, as_json: bool
) -> None:  # fmt: skip
    """Empty a storage: no blocks go there, those on it move to other storages or are evicted.

    Say it again to see how far it is. `kvcm storage undrain` ends it.

    \b
    Example:
      kvcm storage drain disk1 --wait --timeout 10m
    """
    with open_api(target) as api:
        find_storage(api, name)
        api.call("drainStorage", storage_unique_name=name, draining=True)
        left = _drained(api, name) if not wait else _wait_until_empty(api, name, timeout)
    state = "is empty" if left["empty"] else f"is draining: {_holds(left)}"
    emit({"ok": True, "name": name, **left}, as_json, [f"storage {name} {state}"])


@storage.command("undrain")
@click.argument("name")
@target_options
@json_option
def storage_undrain(name: str, target: Target, as_json: bool) -> None:
    """End a drain: new blocks go there again. What has moved stays where it is.

    \b
    Example:
      kvcm storage undrain disk1
    """
    _change(target, name, "drainStorage", draining=False)
    done(f"storage {name} takes blocks again", as_json, name=name)


def _change(target: Target, name: str, call: str, **fields: Any) -> None:
    """Ask for a change of a storage that is there."""
    with open_api(target) as api:
        find_storage(api, name)
        api.call(call, storage_unique_name=name, **fields)


def _drained(api: Api, name: str) -> Json:
    """What all groups together still have on a draining storage."""
    entries = [e for report in reports(api) for e in report["draining"] if e["storage"] == name]
    return {
        "blocks": sum(e["blocks"] for e in entries),
        "used_bytes": sum(e["used_bytes"] for e in entries),
        "empty": all(e["empty"] for e in entries),
    }


def _holds(left: Json) -> str:
    return f"{left['blocks']} blocks, {human_bytes(left['used_bytes'])} left"


def _wait_until_empty(api: Api, name: str, timeout_s: float | None) -> Json:
    started, note_at = time.monotonic(), 0.0
    while not (left := _drained(api, name))["empty"]:
        elapsed_s = time.monotonic() - started
        if timeout_s is not None and elapsed_s >= timeout_s:
            raise InUse(
                f"storage {name} is not empty after {elapsed_s:.0f} s: {_holds(left)}",
                hint="It goes on draining. `kvcm capacity` shows pins and whether reclaiming is paused.",
                **left,
            )
        if elapsed_s >= note_at:
            note(f"storage {name}: {_holds(left)}")
            note_at = elapsed_s + NOTE_PERIOD_S
        time.sleep(POLL_S)
    return left


@storage.command("remove")
@click.argument("name")
@force_option
@yes_option
@target_options
@json_option
def storage_remove(name: str, force: bool, yes: bool, target: Target, as_json: bool) -> None:
    """Remove a storage from the configuration.

    \b
    Example:
      kvcm storage remove disk1
    """
    confirm(f"storage {name}", yes)
    with open_api(target) as api:
        find_storage(api, name)
        try:
            api.call("removeStorage", storage_unique_name=name, force=force)
        except InUse as error:
            hint = (
                f"Empty it (`kvcm storage drain {name} --wait`), give its groups a list without it "
                "(`kvcm group update GROUP --storage ...`), then remove it; --force gives its blocks up."
            )
            raise InUse(error.message, hint=hint) from None
    done(f"storage {name} removed", as_json, name=name)
