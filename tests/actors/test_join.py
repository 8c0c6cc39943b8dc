"""How a process that joins somebody else's Ray cluster proves who it is, if nothing says so."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvcm_ray.testing.cluster import run_python

ASK = """
import os, sys
os.environ["HOME"] = sys.argv[1]
for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
    os.environ.pop(name, None)
os.environ.update(pair.split("=") for pair in sys.argv[2:])
from kvcm_ray.actors.join import mode_of_others
print(mode_of_others())
"""


@pytest.mark.parametrize(
    ("has_token", "given", "mode"),
    [(False, [], "disabled"), (True, [], "token"), (True, ["RAY_AUTH_MODE=disabled"], "disabled")],
)
def test_as_ray_decides_it(tmp_path: Path, has_token: bool, given: list[str], mode: str) -> None:
    """`ray start` asks for a token if this user has one, and `kvcm up` makes one."""
    if has_token:
        (tmp_path / ".ray").mkdir()
        (tmp_path / ".ray" / "auth_token").write_text("f" * 32)
    assert run_python(ASK, str(tmp_path), *given) == mode
