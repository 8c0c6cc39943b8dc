"""Every `python` and `sh` block of the documents runs, in order, against a real manager.

Blocks of other languages (`console` transcripts, `json`, diagrams) are for reading only. The blocks of
one document share a working directory and see KVCM_URL and KVCM_DATA_DIR.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kvcm_ray.testing.cluster import shared_manager

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"^```(python|sh)\n(.*?)^```$", re.M | re.S)
DOCUMENTS = [
    path
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    if BLOCK.search(path.read_text())
]

pytestmark = pytest.mark.ray


def run(command: list[str], cwd: Path) -> None:
    manager = shared_manager()
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {
        **os.environ,
        "PATH": path,
        "KVCM_URL": manager.url,
        "KVCM_DATA_DIR": str(manager.data_dir),
    }
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, f"{command[-1]}\n--- printed\n{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_blocks_run(document: Path, tmp_path: Path) -> None:
    for language, code in BLOCK.findall(document.read_text()):
        interpreter = [sys.executable, "-c"] if language == "python" else ["bash", "-ec"]
        run([*interpreter, code], tmp_path)


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.name)
def test_examples_run(example: Path, tmp_path: Path) -> None:
    run([sys.executable, str(example)], tmp_path)
