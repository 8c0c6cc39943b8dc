"""What a client shows to a manager that asks for accounts, and what it checks of one behind TLS.

    token       sent as ``Authorization: Bearer``; else KVCM_TOKEN, else the file that KVCM_TOKEN_FILE names
    ca_file     certificates (PEM) that may sign the manager's; else KVCM_CA_FILE, else those of the system

A user and password may stand in the URL (``https://user:password@host``) instead of a token. A token from a
file is read again when the manager refuses it: whoever renews tokens only has to replace the file.

A manager keeps a token in its data directory, for whoever may read that. A client that is led there and has
no other one uses it, also if the manager begins to ask for accounts later.
"""

from __future__ import annotations

import contextlib
import os
import ssl
from collections.abc import Generator
from dataclasses import dataclass, field, replace
from pathlib import Path

import httpx

from kvcm_ray.actors.paths import admin_token_file
from kvcm_ray.errors import InvalidArgument


@dataclass(frozen=True, slots=True)
class Credentials:
    token: str = field(default="", repr=False)
    token_file: str = ""
    ca_file: str = ""
    owners_file: str = ""  #: a token's too, which need not be there

    @classmethod
    def of(
        cls, token: str | Path | None = None, ca_file: str | os.PathLike[str] | None = None
    ) -> Credentials:
        """Those given, and for the rest what the environment says. A `Path` is that of a token's file."""
        ca = os.fspath(ca_file or os.environ.get("KVCM_CA_FILE", ""))
        if isinstance(token, Path):
            return cls("", str(token), ca)
        if token is not None:
            return cls(token, "", ca)
        if text := os.environ.get("KVCM_TOKEN", ""):
            return cls(text, "", ca)
        return cls("", os.environ.get("KVCM_TOKEN_FILE", ""), ca)

    def or_owners(self, data_dir: Path) -> Credentials:
        """These; if they hold no token, with the one that the manager of `data_dir` keeps for its owner."""
        if self.token or self.token_file:
            return self
        return replace(self, owners_file=str(admin_token_file(data_dir)))

    def auth(self) -> httpx.Auth | None:
        """Raises InvalidArgument for a token that no header can carry, or a file that cannot be read."""
        if self.token_file:
            return BearerFile(Path(self.token_file))
        if self.owners_file:
            return BearerFile(Path(self.owners_file), may_be_missing=True)
        return Bearer(_checked(self.token, "the token")) if self.token else None

    def verify(self, url: str) -> ssl.SSLContext | bool:
        """How the manager's certificate is checked. Raises InvalidArgument for a file without any."""
        if not url.startswith("https://"):
            return False  # nothing to check, and making a context takes 20 ms
        if not self.ca_file:
            return True
        try:
            return ssl.create_default_context(cafile=self.ca_file)
        except OSError as error:  # ssl.SSLError is one
            raise InvalidArgument(f"{self.ca_file} holds no certificates in PEM form: {error}") from error


class Bearer(httpx.Auth):
    """A token that stays the same."""

    def __init__(self, token: str) -> None:
        self._token = token

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        request.headers["Authorization"] = f"Bearer {self._token}"
        yield request


class BearerFile(httpx.Auth):
    """A token in a file that somebody renews; with `may_be_missing` nothing is sent while there is none."""

    def __init__(self, file: Path, *, may_be_missing: bool = False) -> None:
        self._file = file
        self._token = ""
        with contextlib.suppress(*([InvalidArgument] if may_be_missing else [])):
            self._token = self._read()

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        used = self._token
        if used:
            request.headers["Authorization"] = f"Bearer {used}"
        response = yield request
        if response.status_code != httpx.codes.UNAUTHORIZED:
            return
        with contextlib.suppress(InvalidArgument):  # being replaced: the next call reads it again
            self._token = self._read()
        if self._token != used:
            request.headers["Authorization"] = f"Bearer {self._token}"
            yield request

    def _read(self) -> str:
        try:
            return _checked(self._file.read_text().strip(), str(self._file))
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidArgument(f"cannot read a token from {self._file}: {error}") from error


def _checked(token: str, where: str) -> str:
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise InvalidArgument(f"{where} is no token: one line of ASCII characters without blanks is")
    return token
