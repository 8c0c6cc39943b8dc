"""Making ``import kv_cache_manager.client.pybind.kvcm_py_client`` find our module.

The package ``kv_cache_manager`` may be installed (it holds the connectors), with or without the folders
``client`` and ``client/pybind``; what is there is used, what is missing is added around it.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

from kvcm_ray.errors import AlreadyExists

NAME = "kv_cache_manager.client.pybind.kvcm_py_client"
OURS = "kvcm_ray.connectors.py_client.kvcm_py_client"
MARK = "# Written by kvcm-ray"
TEXT = f'''{MARK}; `python -m kvcm_ray.connectors.py_client uninstall` removes it.
"""The transfer client of kvcm-ray under the name that connectors import."""

from {OURS} import *  # noqa: F403
'''


def install() -> ModuleType:
    """Let this process find our module under the contract's name; returns it. May be called again."""
    module = importlib.import_module(OURS)
    parent: ModuleType | None = None
    path = NAME.split(".")
    for depth in range(1, len(path)):
        name = ".".join(path[:depth])
        package = _package(name)
        if parent is not None:
            setattr(parent, path[depth - 1], package)
        parent = package
    assert parent is not None
    sys.modules[NAME] = module
    setattr(parent, path[-1], module)
    return module


def _package(name: str) -> ModuleType:
    """An importable package of that name: the installed one, else an empty one."""
    if name in sys.modules:
        return sys.modules[name]
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise  # it is there and fails for another reason
    package = ModuleType(name, "An empty package, added by kvcm-ray.")
    package.__path__ = []
    sys.modules[name] = package
    return package


def install_files(site_packages: Path | None = None) -> Path:
    """Let every process of this Python environment find our module; returns the file written.

    Args:
        site_packages: where ``kv_cache_manager`` is or is to be; by default where it is installed, else
            the environment's site-packages.

    Raises:
        AlreadyExists: another module of that name is there.
    """
    target = _file(site_packages)
    others = [path for path in _same_module(target) if path != target or not _is_ours(path)]
    if others:
        raise AlreadyExists(f"{others[0]} is another client; remove it first if ours is to be used")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(TEXT)
    return target


def uninstall_files(site_packages: Path | None = None) -> bool:
    """Remove what `install_files` wrote, and folders that are empty then; False if it is not there."""
    target = _file(site_packages)
    if not (target.exists() and _is_ours(target)):
        return False
    target.unlink()
    for cached in target.parent.glob(f"__pycache__/{target.stem}.*.pyc"):
        cached.unlink()
    for folder in (target.parent / "__pycache__", *list(target.parents)[: NAME.count(".")]):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
    return True


def _file(site_packages: Path | None) -> Path:
    root = site_packages or _installed_root() or Path(sysconfig.get_paths()["purelib"])
    return root.joinpath(*NAME.split(".")).with_suffix(".py")


def _installed_root() -> Path | None:
    top = NAME.partition(".")[0]
    found = importlib.util.find_spec(top) if top not in sys.modules else sys.modules[top].__spec__
    places = list(found.submodule_search_locations or ()) if found is not None else []
    return Path(places[0]).parent if places else None


def _same_module(target: Path) -> list[Path]:
    return [path for path in target.parent.glob(f"{target.stem}.*") if path.suffix in (".py", ".so")]


def _is_ours(path: Path) -> bool:
    return path.suffix == ".py" and path.read_text().startswith(MARK)
