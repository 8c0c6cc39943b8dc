"""Models and a manager for the tests of engines."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvcm_ray.cluster import Manager
from kvcm_ray.testing.cluster import manager
from kvcm_ray.testing.engines import llama

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Manager]:
    """One manager for the tests that do not harm it."""
    folder = tmp_path_factory.mktemp("manager")
    with manager(folder / "data", ("shm:1GiB", "file:2GiB")) as found:
        yield found


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example's folder, without the note that the weights came from a quantised file."""
    script = ROOT / "examples" / "engines" / "smollm2.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True)
    source = Path(done.stdout.strip().splitlines()[-1])
    target = tmp_path_factory.mktemp("models") / "smollm2"
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).symlink_to(path)
    config = json.loads((source / "config.json").read_text())
    config.pop("quantization_config", None)
    (target / "config.json").unlink()
    (target / "config.json").write_text(json.dumps(config))
    return target
