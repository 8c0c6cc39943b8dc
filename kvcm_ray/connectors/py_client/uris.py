"""Location URIs as plain protocol clients read them, and which of them are ours.

``scheme://[user@]host[:port]/path?key=value&...``; nothing is percent-decoded. A kvcm-ray manager's URIs
name the ``gen``eration of the block, by which a reader checks that the slot still holds that very block. A
URI without it comes from another manager: its file is taken as it is.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvcm_ray.connectors.py_client.types import ClientError, ClientErrorCode


@dataclass(frozen=True, slots=True)
class Location:
    scheme: str
    host: str
    path: str
    slot: int  #: ``blkid``
    size: int  #: bytes of a slot; 0 if not given
    generation: int | None  #: None: not of a kvcm-ray manager


def parse(uri: str) -> Location:
    """Raises ClientError: not a URI."""
    scheme, separator, rest = uri.partition("://") if isinstance(uri, str) else ("", "", "")
    if not scheme or not separator:
        raise _bad(uri)
    location, _, query = rest.partition("?")
    authority, slash, path = location.partition("/")
    host = authority.rpartition("@")[2]
    given = dict(pair.split("=", 1) for pair in query.split("&") if "=" in pair)
    try:
        slot, size = int(given.get("blkid", 0)), int(given.get("size", 0))
        generation = int(given["gen"]) if "gen" in given else None
    except ValueError:
        raise _bad(uri) from None
    if slot < 0 or size < 0 or (generation or 0) < 0:
        raise _bad(uri)
    return Location(scheme, host.partition(":")[0], slash + path, slot, size, generation)


def _bad(uri: object) -> ClientError:
    return ClientError(ClientErrorCode.ER_INVALID_PARAMS, f"not a location URI: {uri!r}")
