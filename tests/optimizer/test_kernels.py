"""Compiled code is kept where it can be, and works where it cannot; nothing else imports numba."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import kvcm_ray.optimizer as package

ROOT = Path(package.__file__).parents[2]
CALL = "import kvcm_ray.optimizer as o; a = o.of_requests([[1, 2], [1, 2]]); print(a.chained, a.unique)"


def run(code: str, folder: Path = ROOT, **environment: str) -> str:
    inherited = {k: v for k, v in os.environ.items() if k not in ("XDG_CACHE_HOME", "NUMBA_CACHE_DIR")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder, env={**inherited, **environment}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_package_does_not_import_numba() -> None:
    code = "import sys, kvcm_ray.optimizer; print('numba' in sys.modules)"
    assert run(code) == "False"


def test_without_numba_one_is_told_what_to_install() -> None:
    hide = "import sys; sys.modules['numba'] = None; from kvcm_ray.errors import Unsupported\n"
    code = f"{hide}try:\n    {CALL}\nexcept Unsupported as error:\n    print(error.remedy)"
    assert run(code) == "pip install 'kvcm-ray[optimizer]'"


def installed(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """A copy of the code that the optimizer needs, and an environment that uses it."""
    site = tmp_path / "site"
    source = Path(package.__file__).parents[1]
    for name in ("core", "traces", "optimizer"):
        shutil.copytree(source / name, site / "kvcm_ray" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("__init__.py", "errors.py"):
        shutil.copy(source / name, site / "kvcm_ray" / name)
    home = tmp_path / "home"
    home.mkdir()
    return site, {"PYTHONDONTWRITEBYTECODE": "1", "HOME": str(home)}


def test_compiled_code_is_kept_beside_the_source(tmp_path: Path) -> None:
    site, environment = installed(tmp_path)
    assert run(CALL, site, **environment) == "True 2"
    kept = site / "kvcm_ray" / "optimizer" / "kernels" / "__pycache__"
    assert list(kept.glob("load.number*.nbc"))


def test_a_read_only_install_works(tmp_path: Path) -> None:
    """Neither beside the source nor at home is there a folder to write to: files are in the way."""
    site, environment = installed(tmp_path)
    (site / "kvcm_ray" / "optimizer" / "kernels" / "__pycache__").write_text("in the way")
    (tmp_path / "home" / ".cache").write_text("in the way")
    assert run(CALL, site, **environment) == "True 2"
    assert not list(tmp_path.rglob("*.nbc"))
