"""How Prometheus is told to scrape a manager."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

INTERVAL = "15s"


def config(url: str, *, rules: str = "", token_file: str = "") -> dict[str, Any]:
    """A ``prometheus.yml`` for the manager at `url`.

    Args:
        rules: path of the alert rules, if any.
        token_file: of managers that require accounts; a token with the role metrics suffices.
    """
    parts = urlsplit(url)
    job: dict[str, Any] = {
        "job_name": "kvcm",
        "scrape_interval": INTERVAL,
        "scheme": parts.scheme,
        "metrics_path": f"{parts.path.rstrip('/')}/metrics",
        "static_configs": [{"targets": [parts.netloc]}],
    }
    if token_file:
        job["authorization"] = {"type": "Bearer", "credentials_file": token_file}
    found: dict[str, Any] = {"scrape_configs": [job]}
    if rules:
        found = {"rule_files": [rules], **found}
    return found
