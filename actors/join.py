"""Making this process a driver of a manager's Ray cluster.

A manager's Ray asks for Ray's own token (``~/.ray/auth_token``, made when the first one starts), and a
process only sends it if ``RAY_AUTH_MODE`` says so before Ray connects. Actor handles work after that.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from typing import Any

from kvcm_ray.actors import paths
from kvcm_ray.actors.names import NAMESPACE
from kvcm_ray.errors import Unavailable, Unsupported

_lock = threading.Lock()
#: Data directory and manager id of the manager whose Ray this process joined, if it did so here.
_joined: tuple[str, str] | None = None


def manager_facts(data_dir: str | os.PathLike[str]) -> dict[str, Any]:
    """What ``manager.json`` says. Raises `Unavailable` if no manager runs on `data_dir`."""
    file = paths.manager_file(paths.resolve(data_dir))
    try:
        facts = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise Unavailable(f"no manager runs on {data_dir}: {error}") from error
    if not isinstance(facts, dict) or "ray_address" not in facts:
        raise Unavailable(f"no manager runs on {data_dir}: {file} does not name a ray_address")
    return facts


def join_data_dir(data_dir: str | os.PathLike[str]) -> None:
    """`join` the manager that runs on a data directory of this machine."""
    global _joined
    facts = manager_facts(data_dir)
    if join(facts["ray_address"], auth_mode=facts.get("ray_auth_mode", "token")):
        _joined = str(paths.resolve(data_dir)), facts.get("manager_id", "")


def joined_manager(data_dir: str | os.PathLike[str]) -> str:
    """Id of the manager of a data directory whose Ray this process joined; "" if it did not."""
    if _joined is not None and _joined[0] == str(paths.resolve(data_dir)):
        return _joined[1]
    return ""


def join(ray_address: str, *, auth_mode: str = "token") -> bool:
    """Connect this process to the Ray cluster, unless it is connected to one already (False).

    Raises:
        Unavailable: nothing answers there, or it refuses this user's token.
        Unsupported: Ray is not installed.
    """
    os.environ.setdefault("RAY_AUTH_MODE", auth_mode)
    try:
        import ray
    except ImportError as error:
        raise Unsupported("this needs Ray: pip install 'kvcm-ray[ray]', or use the URL") from error
    with _lock:
        if ray.is_initialized():
            return False
        _apply_auth_mode()
        try:
            ray.init(
                address=ray_address, namespace=NAMESPACE, log_to_driver=False,
                logging_level=logging.ERROR,
            )  # fmt: skip
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise Unavailable(f"cannot join the Ray cluster at {ray_address}: {error}") from error
    return True


def mode_of_others() -> str:
    """RAY_AUTH_MODE for a cluster that `ray start` made: what is set, else what Ray decides by itself.

    That is "token" if this user has one; `kvcm up` makes one, so whoever ran it has.
    """
    if "RAY_AUTH_MODE" in os.environ:
        return os.environ["RAY_AUTH_MODE"]
    try:
        from ray._raylet import AuthenticationTokenLoader
    except ImportError:  # no Ray, or one without tokens
        return "disabled"
    has_token: bool = AuthenticationTokenLoader.instance().has_token(ignore_auth_mode=True)
    return "token" if has_token else "disabled"


def _apply_auth_mode() -> None:
    """Ray reads RAY_AUTH_MODE when it is imported, which may have been before we set it."""
    import ray._raylet

    config: Any = getattr(ray._raylet, "Config", None)
    if config is not None:
        config.initialize("")
