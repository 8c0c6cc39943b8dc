"""The connector's class on the base class of the next vLLM, whose engine does not run here.

Its wheel is made for CUDA; only its Python files are unpacked (from a download of 340 MB, kept below
~/.cache/kvcm-ray), in front of the installed ones.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest

VERSION = "0.33.0"
CHECK = """
import inspect, vllm
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, supports_hma
from vllm.utils.func_utils import supports_kw
from kvcm_ray.connectors.vllm import KVCMConnector

assert vllm.__version__.startswith("VERSION"), vllm.__version__
assert issubclass(KVCMConnector, KVConnectorBase_V1)
assert not inspect.isabstract(KVCMConnector), KVCMConnector.__abstractmethods__
assert supports_hma(KVCMConnector)
assert supports_kw(KVCMConnector, "kv_cache_config")
for name, ours in vars(KVCMConnector).items():
    base = getattr(KVConnectorBase_V1, name, None)
    if name.startswith("_") or not inspect.isfunction(ours) or not inspect.isfunction(base):
        continue
    theirs, mine = inspect.signature(base).parameters, inspect.signature(ours).parameters
    assert list(theirs) == list(mine), (name, list(theirs), list(mine))
print("checked")
"""


@pytest.fixture(scope="module")
def unpacked() -> Path:
    models = Path(os.environ.get("KVCM_MODELS", Path.home() / ".cache" / "kvcm-ray"))
    target = models / f"vllm-{VERSION}"
    if not target.exists():
        models.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=models) as scratch:
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch]
            subprocess.run([*pip, f"vllm=={VERSION}"], check=True)
            (wheel,) = Path(scratch).glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                wanted = [n for n in archive.namelist() if n.endswith(".py") or ".dist-info/" in n]
                archive.extractall(Path(scratch) / "unpacked", wanted)
            shutil.move(Path(scratch) / "unpacked", target)
    return target


@pytest.mark.parametrize("version", ["installed", VERSION])
def test_the_class_fits_the_base_class(version: str, request: pytest.FixtureRequest) -> None:
    environment = dict(os.environ)
    expected = "0.32"
    if version == VERSION:
        environment["PYTHONPATH"] = str(request.getfixturevalue("unpacked"))
        expected = VERSION
    done = subprocess.run(
        [sys.executable, "-c", CHECK.replace("VERSION", expected)],
        capture_output=True, text=True, env=environment, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip().endswith("checked")
