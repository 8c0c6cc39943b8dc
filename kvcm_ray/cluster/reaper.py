"""Outlives a manager for a moment: when its pipe closes, ends whatever the manager left behind.

Run as ``python -S -E reaper.py <manager id> <temp dir>`` with the pipe as standard input. A manager that
ends in good order has left nothing; one that was killed has left Ray's agents, which nobody else ends.
"""

from __future__ import annotations

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))


def main(manager_id: str, temp_dir: str) -> None:
    import processes  # type: ignore[import-not-found]

    while os.read(0, 1):
        pass
    processes.end_all(manager_id, timeout_s=20.0)
    processes.remove_temp_dir(temp_dir)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
