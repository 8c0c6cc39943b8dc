"""``kvcm instance``: registered model configurations, and upgrades from one to the next. By HTTP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

from kvcm_ray.cli.output import (
    BYTES,
    confirm,
    done,
    emit,
    human_bytes,
    json_option,
    outline,
    table,
    yes_option,
)
from kvcm_ray.cli.reports import reports_at_hand
from kvcm_ray.cli.target import Api, Target, open_api, target_options
from kvcm_ray.cli.values import SECONDS, human_seconds
from kvcm_ray.errors import Conflict, InstanceNotFound

Json = dict[str, Any]


@click.group()
def instance() -> None:
    """Instances: registered model configurations. Their shape never changes, only their user data."""


def list_instances(api: Api, group: str = "") -> list[Json]:
    """As listInstanceInfo has them, each with its version and how far it has retired (or None)."""
    found = api.call("listInstanceInfo", instance_group_name=group)["instance_info"]
    retiring = {
        entry["instance_id"]: entry["retiring"]
        for report in reports_at_hand(api).values()
        for entry in report["instances"]
    }
    defaults = {"model_version": "", "supersedes": ""}
    return [defaults | i | {"retiring": retiring.get(i["instance_id"])} for i in found]


def find_instance(api: Api, name: str) -> Json:
    for found in list_instances(api):
        if found["instance_id"] == name:
            return found
    raise InstanceNotFound(f"no instance {name!r} is registered")


@instance.command("list")
@click.option("--group", default="", help="Only of this group.")
@target_options
@json_option
def instance_list(group: str, target: Target, as_json: bool) -> None:
    """List the instances.

    \b
    Example:
      kvcm instance list --group chat
    """
    with open_api(target) as api:
        found = list_instances(api, group)
    rows = [
        (
            i["instance_id"],
            i["instance_group_name"],
            i["block_size"],
            human_bytes(sum(int(s["size"]) for s in i["location_spec_infos"])),
            len(i["location_spec_infos"]),
            i["model_version"] or "-",
            i["supersedes"] or "-",
            _retiring(i["retiring"]),
        )
        for i in found
    ]
    headings = (
        "instance", "group", "tokens a block", "bytes a block", "specs", "version", "supersedes", "retiring",
    )  # fmt: skip
    emit({"instances": found}, as_json, table(headings, rows))


def _retiring(state: Json | None) -> str:
    if state is None:
        return "-"
    if state["empty"]:
        return "done: it is empty"
    if not state["seconds_left"]:
        return "over; what is left is pinned or in use"
    return f"to {state['share']:.0%} of its share, {human_seconds(state['seconds_left'])} left"


@click.command()
@click.argument("name")
@target_options
@json_option
def instance_show(name: str, target: Target, as_json: bool) -> None:
    """Show one instance in full.

    \b
    Examples:
      kvcm instance show llama --json
      kvcm instance get llama
    """
    with open_api(target) as api:
        found = find_instance(api, name)
    emit(found, as_json, outline(found))


instance.add_command(instance_show, "show")
instance.add_command(instance_show, "get")


@click.command()
@click.argument("name")
@click.option("--group", default="default", show_default=True)
@click.option("--block-size", type=click.IntRange(min=1), required=True, help="Tokens in a block.")
@click.option("--spec", "specs", multiple=True, required=True, help="NAME=BYTES, e.g. tp0=64KiB.")
@click.option("--model-name", default="unnamed", show_default=True)
@click.option("--dtype", default="bytes", show_default=True)
@click.option("--model-version", default="", help="Names the weights, if others come later.")
@click.option("--supersedes", default="", help="Instance of the group that this one replaces.")
@click.option("--handover", type=SECONDS, default=0, help="Time in which that one gives up its share; 0: 1h.")
@target_options
@json_option
def instance_create(
    name: str, group: str, block_size: int, specs: Sequence[str], model_name: str, dtype: str,
    model_version: str, supersedes: str, handover: int, target: Target, as_json: bool,
) -> None:  # fmt: skip
    """Register an instance, e.g. kvcm instance register m --block-size 16 --spec tp0=64KiB

    A new version of a model, whose blocks take the place of the old one's within an hour:
    kvcm instance register m2 --supersedes m --model-version v2 --block-size 16 --spec tp0=64KiB

    \b
    Example:
      kvcm instance create llama --group chat --block-size 16 --spec tp0=64KiB
    """
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
            model_version=model_version,
            supersedes=supersedes,
            handover_seconds=handover,
        )
        found = find_instance(api, name)
    if supersedes and found["supersedes"] != supersedes:
        raise Conflict(
            f"instance {name} was registered before and does not supersede {supersedes!r}; "
            "a registration does not undo a roll back",
            hint="`kvcm instance list` shows which does; `kvcm instance rollback` turns it round.",
        )
    done(f"instance {name} registered in group {found['instance_group_name']}", as_json, name=name)


instance.add_command(instance_create, "create")
instance.add_command(instance_create, "register")


@instance.command("update")
@click.argument("name")
@click.option("--user-data", required=True, help="Free text kept with the instance.")
@target_options
@json_option
def instance_update(name: str, user_data: str, target: Target, as_json: bool) -> None:
    """Change what may change: the user data. Another shape is another instance.

    \b
    Example:
      kvcm instance update llama --user-data 'team a'
    """
    with open_api(target) as api:
        found = find_instance(api, name)
        found["model_deployment"] = found.get("model_deployment", {}) | {"user_data": user_data}
        shape = ("instance_id", "block_size", "location_spec_infos", "location_spec_groups")
        same = {field: found[field] for field in (*shape, "model_deployment")}
        api.call("registerInstance", instance_group=found["instance_group_name"], **same)
    done(f"instance {name} updated", as_json, name=name)


@instance.command("rollback")
@click.argument("name")
@target_options
@json_option
def instance_rollback(name: str, target: Target, as_json: bool) -> None:
    """End the upgrade to this instance: the one that it supersedes serves on, this one retires.

    \b
    Example:
      kvcm instance rollback llama-v2
    """
    with open_api(target) as api:
        before = find_instance(api, name)["supersedes"]
        api.call("rollbackInstance", instance_id=name)
    text = f"instance {before} serves on; {name} retires (`kvcm instance rollback {before}` turns it round)"
    done(text, as_json, name=name, serves=before)


@instance.command("remove")
@click.argument("name")
@yes_option
@target_options
@json_option
def instance_remove(name: str, yes: bool, target: Target, as_json: bool) -> None:
    """Remove an instance and all its blocks.

    \b
    Example:
      kvcm instance remove llama
    """
    confirm(f"instance {name} and all its blocks", yes)
    with open_api(target) as api:
        find_instance(api, name)
        api.call("removeInstance", instance_id=name)
    done(f"instance {name} removed", as_json, name=name)
