"""``kvcm group | storage | instance``: what a manager is configured with. All of it by HTTP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

from kvcm_ray.cli.output import BYTES, emit, human_bytes, json_option, table
from kvcm_ray.cli.target import Api, Target, open_api, target_options
from kvcm_ray.core.model import CachePreferStrategy, StorageType
from kvcm_ray.errors import AlreadyExists, GroupNotFound, InstanceNotFound, StorageNotFound

Json = dict[str, Any]

STRATEGIES = {
    "files": CachePreferStrategy.CPS_PREFER_3FS,
    "memory": CachePreferStrategy.CPS_PREFER_TAIR_MEMPOOL,
    "files-only": CachePreferStrategy.CPS_ALWAYS_3FS,
    "memory-only": CachePreferStrategy.CPS_ALWAYS_TAIR_MEMPOOL,
}


def _done(text: str, as_json: bool, **data: Any) -> None:
    emit({"ok": True, **data}, as_json, [text])


def _confirm(what: str, yes: bool) -> None:
    if yes:
        return
    try:
        click.confirm(f"Remove {what}?", abort=True, err=True)
    except click.Abort:  # "no", or there is nobody to ask
        raise click.ClickException(f"{what} stays; --yes removes it without a question") from None


yes_option = click.option("--yes", is_flag=True, help="Do not ask.")
force_option = click.option("--force", is_flag=True, help="Even if others still use it.")

# --------------------------------------------------------------------------------------- groups


@click.group()
def group() -> None:
    """Instance groups: one quota and one list of storages for a team or a model family."""


def find_group(api: Api, name: str) -> Json:
    for found in api.call("listInstanceGroup")["instance_group"]:
        if found["name"] == name:
            return dict(found)
    raise GroupNotFound(f"no instance group is named {name!r}")


@group.command("list")
@target_options
@json_option
def group_list(target: Target, as_json: bool) -> None:
    """List the groups."""
    with open_api(target) as api:
        groups = api.call("listInstanceGroup")["instance_group"]
    rows = [
        (
            g["name"],
            human_bytes(int(g.get("quota", {}).get("capacity", 0))),
            ", ".join(g["storage_candidates"]),
            int(g["version"]),
        )
        for g in groups
    ]
    emit({"groups": groups}, as_json, table(("group", "quota", "storages", "version"), rows))


@group.command("show")
@click.argument("name")
@target_options
@json_option
def group_show(name: str, target: Target, as_json: bool) -> None:
    """Show one group in full."""
    with open_api(target) as api:
        found = find_group(api, name)
    emit(found, as_json, _outline(found))


quota_options = (
    click.option("--quota", type=BYTES, help="Bytes over all storages, e.g. 8GiB."),
    click.option("--file-quota", type=BYTES, help="Bytes on file storages."),
    click.option("--memory-quota", type=BYTES, help="Bytes on shared memory storages."),
    click.option("--storage", "storages", multiple=True, help="Storage to use, in order of choice."),
    click.option("--prefer", type=click.Choice(list(STRATEGIES)), help="Kind of storage."),
    click.option("--max-instances", type=click.IntRange(min=0), help="0 is no limit."),
    click.option("--max-keys", type=click.IntRange(min=0), help="Blocks an instance may hold."),
    click.option("--delete-delay-ms", type=click.IntRange(min=0), help="Before bytes are erased."),
)


def _with_quota_options(function: Any) -> Any:
    for option in reversed(quota_options):
        function = option(function)
    return function


@group.command("create")
@click.argument("name")
@_with_quota_options
@target_options
@json_option
def group_create(name: str, target: Target, as_json: bool, **options: Any) -> None:
    """Make a group, e.g. kvcm group create chat --quota 8GiB --storage shm0 --storage disk0"""
    if not options["quota"] or not options["storages"]:
        raise click.UsageError("a new group needs --quota and at least one --storage")
    body: Json = {
        "name": name,
        "storage_candidates": [],
        "global_quota_group_name": name,
        "quota": {"capacity": 0, "quota_config": []},
        "cache_config": {
            "data_storage_strategy": CachePreferStrategy.CPS_PREFER_TAIR_MEMPOOL.name,
            "reclaim_strategy": {"storage_unique_name": options["storages"][0]},
            "meta_indexer_config": {
                "meta_storage_backend_config": {"storage_type": "local"},
                "meta_cache_policy_config": {"type": "lru"},
            },
        },
        "version": 1,
    }
    _apply(body, options)
    with open_api(target) as api:
        api.call("createInstanceGroup", instance_group=body)
    _done(f"group {name} created", as_json, name=name)


@group.command("update")
@click.argument("name")
@_with_quota_options
@target_options
@json_option
def group_update(name: str, target: Target, as_json: bool, **options: Any) -> None:
    """Change what is given and leave the rest, e.g. kvcm group update chat --quota 9GiB"""
    if not any(value not in (None, ()) for value in options.values()):
        raise click.UsageError("nothing to change: give at least one option")
    with open_api(target) as api:
        found = find_group(api, name)
        version = int(found["version"])
        _apply(found, options)
        found["version"] = version + 1
        api.call("updateInstanceGroup", instance_group=found, current_version=version)
    _done(f"group {name} updated to version {version + 1}", as_json, name=name, version=version + 1)


@group.command("remove")
@click.argument("name")
@force_option
@yes_option
@target_options
@json_option
def group_remove(name: str, force: bool, yes: bool, target: Target, as_json: bool) -> None:
    """Remove a group; with --force also its instances and all their blocks."""
    _confirm(f"group {name}", yes)
    with open_api(target) as api:
        find_group(api, name)
        api.call("removeInstanceGroup", name=name, force=force)
    _done(f"group {name} removed", as_json, name=name)


def _apply(body: Json, options: Json) -> None:
    """Write the given options into a group's JSON form."""
    quota = body.setdefault("quota", {"capacity": 0, "quota_config": []})
    config = body.setdefault("cache_config", {})
    if options["quota"] is not None:
        quota["capacity"] = options["quota"]
    for option, kind in (
        ("file_quota", StorageType.ST_NFS),
        ("memory_quota", StorageType.ST_TAIRMEMPOOL),
    ):
        if options[option] is not None:
            others = [q for q in quota.get("quota_config", []) if q["storage_type"] != kind.name]
            entry = {"storage_type": kind.name, "capacity": options[option]}
            quota["quota_config"] = [*others, entry]
    if options["storages"]:
        body["storage_candidates"] = list(options["storages"])
    if options["prefer"]:
        config["data_storage_strategy"] = STRATEGIES[options["prefer"]].name
    if options["max_instances"] is not None:
        body["max_instance_count"] = options["max_instances"]
    if options["max_keys"] is not None:
        config.setdefault("meta_indexer_config", {})["max_key_count"] = options["max_keys"]
    if options["delete_delay_ms"] is not None:
        strategy = config.setdefault("reclaim_strategy", {})
        strategy["delay_before_delete_ms"] = options["delete_delay_ms"]


# ------------------------------------------------------------------------------------- storages


@click.group()
def storage() -> None:
    """Storages: where blocks' bytes live."""


def find_storage(api: Api, name: str) -> Json:
    for found in api.call("listStorage")["storage"]:
        if found["global_unique_name"] == name:
            return dict(found)
    raise StorageNotFound(f"no storage is named {name!r}")


def _storage_kind(found: Json) -> tuple[str, str]:
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
    """List the storages."""
    with open_api(target) as api:
        storages = api.call("listStorage")["storage"]
    rows = [(s["global_unique_name"], *_storage_kind(s)) for s in storages]
    emit({"storages": storages}, as_json, table(("storage", "kind", "path"), rows))


@storage.command("show")
@click.argument("name")
@target_options
@json_option
def storage_show(name: str, target: Target, as_json: bool) -> None:
    """Show one storage in full."""
    with open_api(target) as api:
        found = find_storage(api, name)
    emit(found, as_json, _outline(found))


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
    _done(f"storage {name} added", as_json, name=name)


@storage.command("update")
@click.argument("name")
@storage_kind_option
@storage_path_option
@force_option
@target_options
@json_option
def storage_update(name: str, kind: str, path: str, force: bool, target: Target, as_json: bool) -> None:
    """Change a storage's place. Blocks at the old one become misses."""
    with open_api(target) as api:
        find_storage(api, name)
        api.call("updateStorage", storage=_storage_body(name, kind, path), force_update=force)
    _done(f"storage {name} updated", as_json, name=name)


@storage.command("enable")
@click.argument("name")
@target_options
@json_option
def storage_enable(name: str, target: Target, as_json: bool) -> None:
    """Let new blocks go to a storage again."""
    with open_api(target) as api:
        find_storage(api, name)
        api.call("enableStorage", storage_unique_name=name)
    _done(f"storage {name} enabled", as_json, name=name)


@storage.command("disable")
@click.argument("name")
@target_options
@json_option
def storage_disable(name: str, target: Target, as_json: bool) -> None:
    """Neither write to nor read from a storage, until it is enabled."""
    with open_api(target) as api:
        find_storage(api, name)
        api.call("disableStorage", storage_unique_name=name)
    _done(f"storage {name} disabled", as_json, name=name)


@storage.command("remove")
@click.argument("name")
@force_option
@yes_option
@target_options
@json_option
def storage_remove(name: str, force: bool, yes: bool, target: Target, as_json: bool) -> None:
    """Remove a storage from the configuration."""
    _confirm(f"storage {name}", yes)
    with open_api(target) as api:
        find_storage(api, name)
        api.call("removeStorage", storage_unique_name=name, force=force)
    _done(f"storage {name} removed", as_json, name=name)


# ------------------------------------------------------------------------------------ instances


@click.group()
def instance() -> None:
    """Instances: registered model configurations. Their shape never changes, only their user data."""


def find_instance(api: Api, name: str) -> Json:
    for found in api.call("listInstanceInfo", instance_group_name="")["instance_info"]:
        if found["instance_id"] == name:
            return dict(found)
    raise InstanceNotFound(f"no instance {name!r} is registered")


@instance.command("list")
@click.option("--group", default="", help="Only of this group.")
@target_options
@json_option
def instance_list(group: str, target: Target, as_json: bool) -> None:
    """List the instances."""
    with open_api(target) as api:
        found = api.call("listInstanceInfo", instance_group_name=group)["instance_info"]
    rows = [
        (
            i["instance_id"],
            i["instance_group_name"],
            i["block_size"],
            human_bytes(sum(int(s["size"]) for s in i["location_spec_infos"])),
            len(i["location_spec_infos"]),
        )
        for i in found
    ]
    headings = ("instance", "group", "tokens a block", "bytes a block", "specs")
    emit({"instances": found}, as_json, table(headings, rows))


@instance.command("show")
@click.argument("name")
@target_options
@json_option
def instance_show(name: str, target: Target, as_json: bool) -> None:
    """Show one instance in full."""
    with open_api(target) as api:
        found = find_instance(api, name)
    emit(found, as_json, _outline(found))


@instance.command("create")
@click.argument("name")
@click.option("--group", default="default", show_default=True)
@click.option("--block-size", type=click.IntRange(min=1), required=True, help="Tokens in a block.")
@click.option("--spec", "specs", multiple=True, required=True, help="NAME=BYTES, e.g. tp0=64KiB.")
@click.option("--model-name", default="unnamed", show_default=True)
@click.option("--dtype", default="bytes", show_default=True)
@target_options
@json_option
def instance_create(
    name: str, group: str, block_size: int, specs: Sequence[str], model_name: str, dtype: str,
    target: Target, as_json: bool,
) -> None:  # fmt: skip
    """Register an instance, e.g. kvcm instance create m --block-size 16 --spec tp0=64KiB"""
    pairs = [spec.partition("=") for spec in specs]
    if not all(spec_name and equals for spec_name, equals, _ in pairs):
        raise click.BadParameter("write --spec NAME=BYTES", param_hint="--spec")
    infos = [{"name": n, "size": BYTES.convert(size, None, None)} for n, _, size in pairs]
    with open_api(target) as api:
        api.call(
            "registerInstance",
            instance_group=group,
            instance_id=name,
            block_size=block_size,
            location_spec_infos=infos,
            model_deployment={"model_name": model_name, "dtype": dtype, "tp_size": len(infos)},
        )
    _done(f"instance {name} registered in group {group}", as_json, name=name)


@instance.command("update")
@click.argument("name")
@click.option("--user-data", required=True, help="Free text kept with the instance.")
@target_options
@json_option
def instance_update(name: str, user_data: str, target: Target, as_json: bool) -> None:
    """Change what may change: the user data. Another shape is another instance."""
    with open_api(target) as api:
        found = find_instance(api, name)
        found["model_deployment"] = found.get("model_deployment", {}) | {"user_data": user_data}
        shape = ("instance_id", "block_size", "location_spec_infos", "location_spec_groups")
        same = {field: found[field] for field in (*shape, "model_deployment")}
        api.call("registerInstance", instance_group=found["instance_group_name"], **same)
    _done(f"instance {name} updated", as_json, name=name)


@instance.command("remove")
@click.argument("name")
@yes_option
@target_options
@json_option
def instance_remove(name: str, yes: bool, target: Target, as_json: bool) -> None:
    """Remove an instance and all its blocks."""
    _confirm(f"instance {name} and all its blocks", yes)
    with open_api(target) as api:
        find_instance(api, name)
        api.call("removeInstance", instance_id=name)
    _done(f"instance {name} removed", as_json, name=name)


def _outline(value: Any, indent: str = "") -> list[str]:
    """A JSON value as indented text, without the fields that say nothing."""
    lines = []
    for name, inner in value.items():
        if isinstance(inner, dict):
            nested = _outline(inner, indent + "  ")
            lines += [f"{indent}{name}:", *nested] if nested else []
        elif isinstance(inner, list) and inner and isinstance(inner[0], dict):
            for entry in inner:
                lines += [f"{indent}{name}:", *_outline(entry, indent + "  ")]
        elif inner not in ("", [], None):
            shown = ", ".join(map(str, inner)) if isinstance(inner, list) else inner
            lines.append(f"{indent}{name}: {shown}")
    return lines
