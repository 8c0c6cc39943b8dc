"""The quickstart for engines with the real SmolLM2 weights and a short document. Fetches 93 MB once."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

QUICKSTART = Path(__file__).resolve().parents[2] / "examples" / "engines" / "quickstart.py"
TOKENS = 400


def test_quickstart() -> None:
    done = subprocess.run(
        [sys.executable, str(QUICKSTART), str(TOKENS)],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    from_cache = [int(number) for number in re.findall(r"(\d+) tokens from the cache", done.stdout)]
    assert from_cache[0] == 0
    assert from_cache[1] >= TOKENS - 16, "all of the document"
    assert re.findall(r"the same answer +(\w+)", done.stdout) == ["yes", "yes"]
