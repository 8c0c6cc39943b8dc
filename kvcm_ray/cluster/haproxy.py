"""Starts HAProxy for Ray Serve with our conditions; run as a script in HAProxy's place.

Ray Serve writes HAProxy's configuration with listeners for statistics and metrics on all interfaces. This
puts them on loopback, drops the log target, asks the kernel to end HAProxy with the actor that owns it,
and becomes HAProxy (same pid, as Ray expects). Standard library only.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import sys

BINARY_VARIABLE = "KVCM_HAPROXY_BINARY"
_PR_SET_PDEATHSIG = 1


def tightened(config: str) -> str:
    """The configuration with listeners that name no address on 127.0.0.1, and no logging."""
    config = re.sub(r"^(\s*bind\s+)\*?:(\d)", r"\g<1>127.0.0.1:\2", config, flags=re.M)
    return re.sub(r"^\s*log\s+\S+:\d+\s.*\n", "", config, flags=re.M)


def main(arguments: list[str]) -> None:
    file = arguments[arguments.index("-f") + 1]
    with open(file) as handle:
        config = handle.read()
    with open(file, "w") as handle:
        handle.write(tightened(config))
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    binary = os.environ[BINARY_VARIABLE]
    os.execv(binary, [binary, *arguments])


if __name__ == "__main__":
    main(sys.argv[1:])
