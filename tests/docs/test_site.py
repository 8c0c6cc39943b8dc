"""The documentation site builds without a warning, has every document, and fetches nothing from elsewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FETCHED = re.compile(r"<(?:script|img|iframe|link)[^>]+(?:src|href)=[\"']?(?:https?:)?//[^\s\"'>]+[^>]*>")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def test_every_document_is_a_page(site: Path) -> None:
    sources = {path.relative_to(ROOT / "docs").with_suffix(".html") for path in (ROOT / "docs").rglob("*.md")}
    pages = {path.relative_to(site) for path in site.rglob("*.html")}
    assert sources <= pages
    assert len(sources) > 8


def test_pages_fetch_nothing_from_elsewhere(site: Path) -> None:
    found = {
        tag
        for page in site.rglob("*.html")
        for tag in FETCHED.findall(page.read_text())
        if "canonical" not in tag
    }
    assert not found


def test_the_python_reference_is_made_from_code(site: Path) -> None:
    page = (site / "python.html").read_text()
    for name in ("connect", "put", "get", "match", "KvcmError"):
        assert re.search(rf'id="kvcm_ray\.[\w.]*\b{name}"', page), name
