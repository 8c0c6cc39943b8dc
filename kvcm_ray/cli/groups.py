"""``kvcm group``: quotas, storages and reclaiming of teams or model families. By HTTP."""

from __future__ import annotations

import difflib
import json
from typing import Any, TextIO

import click

from kvcm_ray.cli.output import (
    BYTES,
    confirm,
    done,
    emit,
    force_option,
    human_bytes,
    json_option,
    outline,
    table,
    yes_option,
)
from kvcm_ray.cli.target import Api, Target, open_api, target_options
from kvcm_ray.cli.values import FRACTION, SECONDS
from kvcm_ray.config.group_form import POLICIES, STRATEGIES, fill, new_group
from kvcm_ray.errors import GroupNotFound, InvalidArgument

Json = dict[str, Any]


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
    """List the groups.

    \b
    Example:
      kvcm group list
    """
    with open_api(target) as api:
        groups = api.call("listInstanceGroup")["instance_group"]
    rows = [_row(found) for found in groups]
    headings = ("group", "quota", "storages", "policy", "marks", "version")
    emit({"groups": groups}, as_json, table(headings, rows))


def _row(found: Json) -> tuple[Any, ...]:
    strategy = found.get("cache_config", {}).get("reclaim_strategy", {})
    policy = str(strategy.get("reclaim_policy", "POLICY_UNSPECIFIED")).removeprefix("POLICY_").lower()
    return (
        found["name"],
        human_bytes(int(found.get("quota", {}).get("capacity", 0))),
        ", ".join(found["storage_candidates"]),
        policy if policy in POLICIES else "lru",
        _marks(strategy),
        int(found["version"]),
    )


def _marks(strategy: Json) -> str:
    trigger = strategy.get("trigger_strategy", {})
    high, size = float(trigger.get("used_percentage", 0)), int(trigger.get("used_size", 0))
    low = float(strategy.get("low_water_percentage", 0)) or max(high - 0.05, 0)
    marks = f"{high:.0%} to {low:.0%}" if high else "when full"
    return f"{marks}, or {human_bytes(size)}" if size else marks


@group.command("show")
@click.argument("name")
@target_options
@json_option
def group_show(name: str, target: Target, as_json: bool) -> None:
    """Show one group in full.

    \b
    Example:
      kvcm group show chat --json
    """
    with open_api(target) as api:
        found = find_group(api, name)
    emit(found, as_json, outline(found))


group_options = (
    click.option("--quota", type=BYTES, help="Bytes over all storages, e.g. 8GiB."),
    click.option("--file-quota", type=BYTES, help="Bytes on file storages."),
    click.option("--memory-quota", type=BYTES, help="Bytes on shared memory storages."),
    click.option(
        "--storage",
        "storages",
        multiple=True,
        help="Storage to use, fastest first; repeat for all. Replaces the list.",
    ),
    click.option("--prefer", type=click.Choice(list(STRATEGIES)), help="Storages to choose from first."),
    click.option("--policy", type=click.Choice(list(POLICIES)), help="What is evicted first."),
    click.option("--high-water", type=FRACTION, help="Reclaim from here, e.g. 95%; 0: when full."),
    click.option("--high-water-bytes", type=BYTES, help="The same in bytes over all storages; 0: not set."),
    click.option("--low-water", type=FRACTION, help="Reclaim down to here; 0: 5 % below."),
    click.option("--ttl", type=SECONDS, help="Drop what nobody touched for so long; 0: never."),
    click.option("--period", type=SECONDS, help="Time between looks at the marks; 0: always."),
    click.option("--step", type=click.IntRange(min=0), help="Most blocks in one step; 0: 1024."),
    click.option(
        "--step-percent", type=click.IntRange(0, 100), help="The same in % of all blocks; 0: no bound."
    ),
    click.option("--max-instances", type=click.IntRange(min=0), help="0 is no limit."),
    click.option("--max-keys", type=click.IntRange(min=0), help="Blocks an instance may hold; 0: no limit."),
    click.option("--delete-delay-ms", type=click.IntRange(min=0), help="Between evicting and erasing."),
)


def _with_group_options(function: Any) -> Any:
    for option in reversed(group_options):
        function = option(function)
    return function


def _from_file(source: TextIO) -> Json:
    """Values of `group_options` from a JSON object whose fields have the names of the options.

    Raises:
        InvalidArgument: it is no such object, a field is no option, or its value is none for it.
    """
    try:
        fields = json.load(source)
    except ValueError as error:
        raise InvalidArgument(f"{source.name} is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise InvalidArgument(f"{source.name} must hold a JSON object with names of options")
    known = _options_by_name()
    found: Json = {}
    for field, value in fields.items():
        option = known.get(field.replace("_", "-"))
        if option is None:
            near = difflib.get_close_matches(field.replace("_", "-"), known, 1)
            meant = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
            raise InvalidArgument(f"{source.name}: {field!r} is no option of a group; {meant}")
        found[option.name] = _value(option, value, f"{source.name}: {field}")
    return found


def _options_by_name() -> dict[str, click.Option]:
    @_with_group_options
    def carrier() -> None: ...

    return {option.opts[0].lstrip("-"): option for option in carrier.__click_params__}


def _value(option: click.Option, value: Any, where: str) -> Any:
    """What the option makes of a JSON value; numbers are read as if they had been typed."""
    single = isinstance(value, str | int | float) and not isinstance(value, bool)
    try:
        if option.multiple and isinstance(value, list) and all(isinstance(v, str) for v in value):
            return tuple(value)
        if option.multiple or not single:
            raise click.BadParameter(
                f"{value!r} is not {'a list of names' if option.multiple else 'a value'}"
            )
        return option.type.convert(str(value), option, None)
    except click.BadParameter as error:
        raise InvalidArgument(f"{where}: {error.message}") from error


@group.command("create")
@click.argument("name")
@_with_group_options
@target_options
@json_option
def group_create(name: str, target: Target, as_json: bool, **options: Any) -> None:
    """Make a group, e.g. kvcm group create chat --quota 8GiB --storage shm0 --storage disk0"""
    if not options["quota"] or not options["storages"]:
        raise click.UsageError("a new group needs --quota and at least one --storage")
    body = new_group(name, options["storages"][0])
    fill(body, options)
    with open_api(target) as api:
        api.call("createInstanceGroup", instance_group=body)
    done(f"group {name} created", as_json, name=name)


@group.command("update")
@click.argument("name")
@click.option(
    "--from",
    "source",
    type=click.File(),
    help="JSON file with values for options of these names, as `kvcm optimize --group` writes it; what is "
    "also given as an option counts. - is standard input.",
)
@_with_group_options
@target_options
@json_option
def group_update(name: str, source: TextIO | None, target: Target, as_json: bool, **options: Any) -> None:
    """Change what is given and leave the rest; it acts at once.

    kvcm group update chat --quota 9GiB --policy adaptive --high-water 95% --low-water 90%
    """
    if source is not None:
        given = {option: value for option, value in options.items() if value not in (None, ())}
        options |= _from_file(source) | given
    if not any(value not in (None, ()) for value in options.values()):
        raise click.UsageError("nothing to change: give at least one option")
    with open_api(target) as api:
        found = find_group(api, name)
        version = int(found["version"])
        fill(found, options)
        found["version"] = version + 1
        api.call("updateInstanceGroup", instance_group=found, current_version=version)
    done(f"group {name} updated to version {version + 1}", as_json, name=name, version=version + 1)


@group.command("remove")
@click.argument("name")
@force_option
@yes_option
@target_options
@json_option
def group_remove(name: str, force: bool, yes: bool, target: Target, as_json: bool) -> None:
    """Remove a group; with --force also its instances and all their blocks.

    \b
    Examples:
      kvcm group remove chat
      kvcm group remove chat --force --yes
    """
    confirm(f"group {name}", yes)
    with open_api(target) as api:
        find_group(api, name)
        api.call("removeInstanceGroup", name=name, force=force)
    done(f"group {name} removed", as_json, name=name)
