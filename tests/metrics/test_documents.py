"""The table of metrics in the documents is the one in the code."""

from __future__ import annotations

import re
from pathlib import Path

from kvcm_ray.cli.metrics import described

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "observability.md"


def test_every_metric_is_in_the_documents_as_it_is() -> None:
    told = re.findall(r"^\| `(kvcm_\w+)` \| (\w+) \| (.*?) \| (.*) \|$", DOCUMENT.read_text(), re.M)
    assert told == [tuple(row.values()) for row in described()]
