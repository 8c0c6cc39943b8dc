"""``kvcm account``: who may use a manager, with which tokens, and who did what. By HTTP."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import click

from kvcm_ray.actors.private_file import write_private
from kvcm_ray.cli.output import confirm, done, emit, json_option, note, table, yes_option
from kvcm_ray.cli.target import Target, open_api, target_options
from kvcm_ray.cli.values import SECONDS
from kvcm_ray.errors import InvalidArgument

Json = dict[str, Any]

ROLES = {"user": "ROLE_USER", "admin": "ROLE_ADMIN"}
ALL = "*"

password_option = click.option(
    "--password-stdin", is_flag=True, help="Read a password from standard input: one line."
)
groups_option = click.option(
    "--group", "groups", multiple=True, metavar="NAME", help="Instance group of a user; repeat for more."
)


@click.group()
def account() -> None:
    """Accounts, their tokens, and who did what.

    A manager asks for them when it is started with `kvcm up --accounts`.
    """


@account.command("add")
@click.argument("name")
@click.option("--role", type=click.Choice(list(ROLES)), default="user", show_default=True)
@groups_option
@click.option("--all-groups", is_flag=True, help="A user of all groups, future ones too.")
@password_option
@target_options
@json_option
def add(
    name: str, role: str, groups: tuple[str, ...], all_groups: bool, password_stdin: bool, target: Target,
    as_json: bool,
) -> None:  # fmt: skip
    """Add an account. Without a password it has tokens only.

    \b
    Examples:
      kvcm account add engines --group chat --group code
      kvcm account add ada --role admin --password-stdin < password.txt
    """
    scope = _scope(role, groups, all_groups)
    fields: Json = {"user_name": name, "role": ROLES[role], "instance_groups": scope}
    if password_stdin:
        fields["password"] = _password()
    with open_api(target) as api:
        api.call("addAccount", **fields)
    then = "" if password_stdin else f"; `kvcm account token create {name}` makes its first token"
    done(f"added account {name}{then}", as_json, account=name, role=role, instance_groups=scope)


def _scope(role: str, groups: tuple[str, ...], all_groups: bool) -> list[str]:
    if role == "admin" and (groups or all_groups):
        raise click.UsageError("an admin knows all groups: --group and --all-groups are for users")
    if groups and all_groups:
        raise click.UsageError("--group and --all-groups exclude each other")
    if role == "user" and not groups and not all_groups:
        raise click.UsageError("which groups may the user see? Give --group, or --all-groups")
    return [ALL] if all_groups else list(groups)


def _password() -> str:
    line = sys.stdin.readline().rstrip("\r\n")
    if not line:
        raise InvalidArgument("there is no password on standard input")
    return line


@account.command("update")
@click.argument("name")
@click.option("--role", type=click.Choice(list(ROLES)))
@groups_option
@target_options
@json_option
def update(name: str, role: str | None, groups: tuple[str, ...], target: Target, as_json: bool) -> None:
    """Change the role or the groups of an account; what is given replaces what it had, at once.

    \b
    Example:
      kvcm account update engines --group chat
    """
    if role is None and not groups:
        raise click.UsageError("nothing to change: give --role or --group")
    fields: Json = {"user_name": name, "instance_groups": list(groups)}
    if role is not None:
        fields["role"] = ROLES[role]
    with open_api(target) as api:
        api.call("updateAccount", **fields)
    done(f"updated account {name}", as_json, account=name)


@account.command("list")
@target_options
@json_option
def account_list(target: Target, as_json: bool) -> None:
    """List the accounts.

    \b
    Example:
      kvcm account list
    """
    with open_api(target) as api:
        accounts = api.call("listAccount")["accounts"]
    rows = [(a["user_name"], a["role"].removeprefix("ROLE_").lower(), _shown_scope(a)) for a in accounts]
    emit({"accounts": accounts}, as_json, table(("account", "role", "groups"), rows))


def _shown_scope(found: Json) -> str:
    groups = found.get("instance_groups", [])
    if found["role"] == "ROLE_ADMIN" or ALL in groups:
        return "all"
    return ", ".join(groups) or "none"


@account.command("remove")
@click.argument("name")
@yes_option
@target_options
@json_option
def remove(name: str, yes: bool, target: Target, as_json: bool) -> None:
    """Remove an account and its tokens. They stop working at once.

    \b
    Example:
      kvcm account remove alice --yes
    """
    confirm(f"account {name}", yes)
    with open_api(target) as api:
        api.call("deleteAccount", user_name=name)
    done(f"removed account {name}", as_json, account=name)


@account.command("password")
@click.argument("name")
@password_option
@target_options
@json_option
def password(name: str, password_stdin: bool, target: Target, as_json: bool) -> None:
    """Give an account a new password. The old one stops working at once, its tokens go on.

    \b
    Example:
      kvcm account password alice
    """
    if password_stdin:
        new = _password()
    else:
        new = click.prompt(f"New password of {name}", hide_input=True, confirmation_prompt=True, err=True)
    with open_api(target) as api:
        api.call("updateAccount", user_name=name, password=new)
    done(f"{name} has a new password", as_json, account=name)


@account.command("audit")
@click.option("--limit", type=click.IntRange(1, 10_000), default=20, show_default=True)
@target_options
@json_option
def audit(limit: int, target: Target, as_json: bool) -> None:
    """Show who changed what, the last entries of the audit log.

    \b
    Example:
      kvcm account audit --limit 100
    """
    with open_api(target) as api:
        entries = api.call("listAudit", limit=limit)["entries"]
    rows = [
        (
            entry.get("time", ""), entry.get("account") or "-", entry.get("from", ""),
            entry.get("call") or "login", entry.get("result", ""), _what(entry),
        )
        for entry in entries
    ]  # fmt: skip
    emit({"entries": entries}, as_json, table(("time", "account", "from", "call", "result", "what"), rows))


def _what(entry: Json) -> str:
    given = entry.get("what", {})
    return " ".join(f"{key}={value}" for key, value in given.items() if value not in ("", None, []))


# ----------------------------------------------------------------------------------------- tokens


@account.group("token")
def token() -> None:
    """Secrets that stand for an account: what engines and scripts use."""


@token.command("create")
@click.argument("name")
@click.option("--label", default="", help="For people: what it is used for.")
@click.option("--lifetime", type=SECONDS, help="As 12h or 30d.  [default: 90d]")
@click.option("--no-expiry", is_flag=True, help="It counts until it is revoked.")
@click.option("--metrics-only", is_flag=True, help="It reads /metrics and nothing else: for scrapers.")
@click.option(
    "--save", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
    help="Write it there, readable for you only, instead of showing it.",
)  # fmt: skip
@target_options
@json_option
def token_create(
    name: str, label: str, lifetime: int | None, no_expiry: bool, metrics_only: bool, save: Path | None,
    target: Target, as_json: bool,
) -> None:  # fmt: skip
    """Make a token of an account. It is shown this once; the manager keeps a hash of it.

    \b
    Examples:
      kvcm account token create engines --label node7 --save /etc/kvcm/token
      kvcm account token create admin --metrics-only --no-expiry
    """
    if no_expiry and lifetime:
        raise click.UsageError("--lifetime and --no-expiry exclude each other")
    with open_api(target) as api:
        made = api.call(
            "createToken", user_name=name, label=label, lifetime_s=lifetime or 0, no_expiry=no_expiry,
            metrics_only=metrics_only,
        )  # fmt: skip
    if save is not None:
        write_private(save, made["secret"] + "\n")
    facts = {"token_id": made["token"]["token_id"], "expires": _time(made["token"]["expires_s"])}
    if save is not None:
        done(f"the token is in {save}", as_json, **facts, file=str(save))
        return
    note(f"token {facts['token_id']} of {name}, expires {facts['expires']}; it is not shown again")
    emit({**facts, "token": made["secret"]}, as_json, [made["secret"]])


@token.command("list")
@target_options
@json_option
def token_list(target: Target, as_json: bool) -> None:
    """List the tokens, without their secrets.

    \b
    Example:
      kvcm account token list
    """
    with open_api(target) as api:
        tokens = api.call("listToken")["tokens"]
    rows = [
        (
            t["token_id"], t["user_name"], t["label"] or "-", "metrics" if t["metrics_only"] else "all",
            _time(t["created_s"]), _time(t["expires_s"]),
        )
        for t in tokens
    ]  # fmt: skip
    headings = ("token", "account", "label", "use", "created", "expires")
    emit({"tokens": tokens}, as_json, table(headings, rows))


def _time(text: str | int) -> str:
    """Unix seconds as they come on the wire."""
    seconds = int(text)
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds)) if seconds else "never"


@token.command("revoke")
@click.argument("token_id")
@target_options
@json_option
def token_revoke(token_id: str, target: Target, as_json: bool) -> None:
    """Revoke a token, named by its id as `kvcm account token list` shows it. It stops working at once.

    \b
    Example:
      kvcm account token revoke 3f9c2a
    """
    with open_api(target) as api:
        api.call("revokeToken", token_id=token_id)
    done(f"revoked token {token_id}", as_json, token_id=token_id)
