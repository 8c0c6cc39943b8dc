"""Which manager a command talks to.

By URL (``--url``, KVCM_URL), or by data directory (``--data-dir``, KVCM_DATA_DIR, else
``./kvcm-data``), whose ``manager.json`` names the URL of the manager that runs on it. An option
beats the environment; a URL given beats a data directory of the same rank.
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

from kvcm_ray.client.connect import DATA_DIR
from kvcm_ray.client.http import HttpBackend
from kvcm_ray.client.runtime import drive
from kvcm_ray.errors import Unavailable

CALL_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class Target:
    url: str | None
    data_dir: Path | None

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


@dataclass(frozen=True, slots=True)
class Api:
    """The HTTP API of the target."""

    backend: HttpBackend

    def call(self, name: str, /, **fields: Any) -> dict[str, Any]:
        return drive(self.backend.post(name, fields, CALL_TIMEOUT_S))


@contextmanager
def open_api(target: Target) -> Iterator[Api]:
    backend = HttpBackend(target.find_url(), blocking=True)
    try:
        yield Api(backend)
    finally:
        drive(backend.close())


def target_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds ``--url`` and ``--data-dir`` and passes a `Target` as ``target``."""

    @click.option("--url", metavar="URL", help="Manager to talk to (or KVCM_URL).")
    @click.option(
        "--data-dir",
        type=click.Path(file_okay=False, path_type=Path),
        help=f"Data directory of the manager (or KVCM_DATA_DIR; ./{DATA_DIR}).",
    )
    @functools.wraps(function)
    def command(url: str | None, data_dir: Path | None, **options: Any) -> Any:
        return function(target=target_of(url, data_dir), **options)

    return command


def target_of(url: str | None, data_dir: Path | None) -> Target:
    if url is None and data_dir is None:
        url = os.environ.get("KVCM_URL") or None
        directory = os.environ.get("KVCM_DATA_DIR")
        data_dir = Path(directory) if directory else None
    return Target(url, data_dir)
