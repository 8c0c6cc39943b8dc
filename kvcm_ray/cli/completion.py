"""``kvcm completion``: the scripts that let a shell complete commands, options and names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem, get_completion_class

NAMES_TIMEOUT_S = 1.0


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the script that completes commands in a shell.

    Names of groups, storages and instances are completed too, while a manager answers.

    \b
    Examples:
      eval "$(kvcm completion bash)"                                # in ~/.bashrc
      eval "$(kvcm completion zsh)"                                 # in ~/.zshrc
      kvcm completion fish > ~/.config/fish/completions/kvcm.fish
    """
    root = click.get_current_context().find_root().command
    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(root, {}, "kvcm", "_KVCM_COMPLETE").source())


def names_of(call: str, member: str, field: str) -> Any:
    """A completer for arguments and options: names that the manager knows, none if it does not answer."""

    def complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        try:
            found = _names(ctx, call, member, field)
        except Exception:  # in the middle of a line nobody wants to read of it
            return []
        return [CompletionItem(name) for name in found if name.startswith(incomplete)]

    return complete


def _names(ctx: click.Context, call: str, member: str, field: str) -> list[str]:
    from kvcm_ray.cli import target
    from kvcm_ray.client.runtime import drive

    directory = ctx.params.get("data_dir")
    where = target.target_of(ctx.params.get("url"), Path(directory) if directory else None)
    body = {"instance_group_name": ""} if call == "listInstanceInfo" else {}
    with target.open_api(where) as api:
        answer = drive(api.backend.post(call, body, NAMES_TIMEOUT_S))
    return sorted(str(entry[field]) for entry in answer[member])


group_names = names_of("listInstanceGroup", "instance_group", "name")
storage_names = names_of("listStorage", "storage", "global_unique_name")
instance_names = names_of("listInstanceInfo", "instance_info", "instance_id")


def add_completers(path: tuple[str, ...], command: click.Command) -> None:
    """Give the arguments and options of a command that name things their completers, by the name that
    they have: ``group``, ``--group``, ``--storage``, ``--instance``, and ``name`` below such a command."""
    kinds = {"group": group_names, "storage": storage_names, "instance": instance_names,
             "storages": storage_names}  # fmt: skip
    for parameter in command.params:
        name = parameter.name or ""
        found = kinds.get(name) or (kinds.get(path[0]) if name == "name" and len(path) > 1 else None)
        if path[-1] in ("create", "register") and name == "name":
            continue  # a new name
        if found is not None and parameter._custom_shell_complete is None:
            parameter._custom_shell_complete = found
