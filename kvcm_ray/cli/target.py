"""Which manager a command talks to.

By URL (``--url``, KVCM_URL), or by data directory (``--data-dir``, KVCM_DATA_DIR, else
``./kvcm-data``), whose ``manager.json`` names the URL of the manager that runs on it. An option
beats the environment; a URL given beats a data directory of the same rank.

And as whom: ``--token-file`` or ``--token``, else KVCM_TOKEN or KVCM_TOKEN_FILE, else the token that a
manager keeps in its data directory for its owner, where the command was led there and not to a URL.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from kvcm_ray.cli.output import show_call
from kvcm_ray.client.connect import DATA_DIR
from kvcm_ray.client.credentials import Credentials
from kvcm_ray.client.http import HttpBackend
from kvcm_ray.client.runtime import drive
from kvcm_ray.errors import Unavailable

CALL_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class Target:
    url: str | None
    data_dir: Path | None
    token: str | Path | None = None  #: or the file that holds it

    def find_url(self) -> str:
        """Raises Unavailable if no manager runs on the data directory."""
        return self.url or str(self.manager()["url"])

    def directory(self) -> Path:
        return self.data_dir or Path(DATA_DIR)

    def manager(self) -> dict[str, Any]:
        """What ``manager.json`` of the data directory says. Raises Unavailable."""
        path = self.directory() / "manager.json"
        try:
            found = json.loads(path.read_bytes())
            return {"url": found["url"], **found}
        except FileNotFoundError:
            raise Unavailable(f"no manager runs on {self.directory()} ({path} is missing)") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise Unavailable(f"cannot read {path}: {error}") from error


    def credentials(self) -> Credentials:
        """Raises InvalidArgument for a file that cannot be read."""
        found = Credentials.of(self.token)
        owners = self.directory() / "admin-token"
        if self.url or found.token or found.token_file or not os.access(owners, os.R_OK):
            return found
        return Credentials.of(owners)


@dataclass(frozen=True, slots=True)
class Api:
    """The HTTP API of the target."""

    backend: HttpBackend

    with_token: bool = False

    def call(self, name: str, /, **fields: Any) -> dict[str, Any]:
        shown = {**fields, "password": "..."} if fields.get("password") else fields
        show_call(self.backend.address, f"/api/{name}", shown, secret=self.with_token)
        return drive(self.backend.post(name, fields, CALL_TIMEOUT_S))


@contextmanager
def open_api(target: Target) -> Iterator[Api]:
    credentials = target.credentials()
    backend = HttpBackend(target.find_url(), blocking=True, credentials=credentials)
    try:
        yield Api(backend, bool(credentials.token or credentials.token_file))
    finally:
        drive(backend.close())


def target_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds ``--url``, ``--data-dir`` and the token, and passes a `Target` as ``target``."""

    @click.option("--url", metavar="URL", help="Manager to talk to (or KVCM_URL).")
    @click.option(
        "--data-dir",
        type=click.Path(file_okay=False, path_type=Path),
        help=f"Data directory of the manager (or KVCM_DATA_DIR; ./{DATA_DIR}).",
    )
    @click.option(
        "--token-file", type=click.Path(dir_okay=False, path_type=Path),
        help="File with a token, of managers that require accounts (or KVCM_TOKEN_FILE).",
    )
    @click.option("--token", metavar="TOKEN", help="The token itself; others on this machine can see it.")
    @functools.wraps(function)
    def command(
        url: str | None, data_dir: Path | None, token_file: Path | None, token: str | None, **options: Any
    ) -> Any:
        return function(target=target_of(url, data_dir, token_file or token), **options)

    return command


def target_of(url: str | None, data_dir: Path | None, token: str | Path | None = None) -> Target:
    if url is None and data_dir is None:
        url = os.environ.get("KVCM_URL") or None
        directory = os.environ.get("KVCM_DATA_DIR")
        data_dir = Path(directory) if directory else None
    return Target(url, data_dir, token)
