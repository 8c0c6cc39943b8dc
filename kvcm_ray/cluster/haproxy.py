"""Starts HAProxy for Ray Serve with our conditions; run as a script in HAProxy's place.

Ray Serve writes HAProxy's configuration with listeners for statistics and metrics on all interfaces. This
puts them on loopback, drops the log target, gives slow clients little time and nobody's attention but
HAProxy's, tells the replicas who asks, adds TLS if there is a certificate, asks the kernel to end HAProxy
with the actor that owns it, and becomes HAProxy (same pid, as Ray expects). Standard library only.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import sys

BINARY_VARIABLE = "KVCM_HAPROXY_BINARY"
TLS_VARIABLE = "KVCM_HAPROXY_TLS_PEM"  #: file with certificate, chain and key
REQUEST_TIMEOUT_S = 10  #: for the head of a request, and for a small body
_PR_SET_PDEATHSIG = 1


#: The frontends that are for clients: a request is passed on when it is all there (or fills a buffer), and
#: its sender's address is ours to say. And the protocol that they speak inside TLS.
_PUBLIC = {
    "frontend http_frontend": (
        "http/1.1",
        f"    timeout http-request {REQUEST_TIMEOUT_S}s\n    option http-buffer-request\n"
        "    http-request set-header X-Forwarded-For %[src]\n",
    ),
    "frontend grpc_frontend": (
        "h2",
        f"    timeout http-request {REQUEST_TIMEOUT_S}s\n"
        "    http-request set-header X-Forwarded-For %[src]\n",
    ),
}


def tightened(config: str, tls_pem: str = "") -> str:
    """The configuration without logging, with public frontends as above, and with all other listeners that
    name no address on 127.0.0.1.

    Args:
        tls_pem: file with certificate and key; without it the frontends speak plain text.
    """
    lines, section = [], ""
    for line in config.splitlines(keepends=True):
        if line.strip() and not line[0].isspace():
            section = line.strip()
        if re.match(r"\s*log\s+\S+:\d+\s", line):
            continue
        if re.match(r"\s*bind\s", line):
            line = _public(line, section, tls_pem) if section in _PUBLIC else _local(line)
        lines.append(line)
    return "".join(lines)


def _public(bind: str, section: str, tls_pem: str) -> str:
    protocol, more = _PUBLIC[section]
    tls = f" ssl crt {tls_pem} ssl-min-ver TLSv1.2 alpn {protocol}" if tls_pem else ""
    return f"{bind.rstrip()}{tls}\n{more}"


def _local(bind: str) -> str:
    return re.sub(r"^(\s*bind\s+)\*?:(\d)", r"\g<1>127.0.0.1:\2", bind)


def main(arguments: list[str]) -> None:
    file = arguments[arguments.index("-f") + 1]
    with open(file) as handle:
        config = handle.read()
    with open(file, "w") as handle:
        handle.write(tightened(config, os.environ.get(TLS_VARIABLE, "")))
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    binary = os.environ[BINARY_VARIABLE]
    os.execv(binary, [binary, *arguments])


if __name__ == "__main__":
    main(sys.argv[1:])
