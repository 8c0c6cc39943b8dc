"""``python -m kvcm_ray.cluster OPTIONS``: the process behind ``kvcm up --detach``; OPTIONS is JSON.

Errors go to standard error as one line that begins with the error's class.
"""

from __future__ import annotations

import sys

from kvcm_ray.cluster.launch import up
from kvcm_ray.cluster.options import Options
from kvcm_ray.errors import KvcmError


def main() -> int:
    options = Options.from_json(sys.argv[1])
    try:
        up(
            options, note=_say,
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
