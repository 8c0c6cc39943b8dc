"""``python -m kvcm_ray.cluster``: the process behind ``kvcm up``; it runs in the foreground.

Errors go to standard error as one line that begins with the error's class.
"""

from __future__ import annotations

import argparse
import sys

from kvcm_ray.cluster.launch import up
from kvcm_ray.errors import KvcmError


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m kvcm_ray.cluster")
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--port", type=int, default=6382)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--tier", action="append", default=[])
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--reclaimers", type=int, default=2)
    options = parser.parse_args()
    try:
        up(
            options.data_dir, options.port, options.tier, options.host,
            replicas=options.replicas, reclaimers=options.reclaimers, note=_say,
            on_ready=lambda manager: _say(f"ready at {manager.url} after {manager.ready_s} s"),
        )  # fmt: skip
    except KvcmError as error:
        _say(f"{type(error).__name__}: {error}")
        return 1
    return 0


def _say(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
