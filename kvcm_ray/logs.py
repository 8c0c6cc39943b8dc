"""Log lines of a manager's processes: one format, one level, and the trace_id of the request behind a line.

    2026-11-25T09:30:01.123Z WARNING kvcm_ray.actors.group: slow commit [trace_id=abc]
    {"time": "...", "level": "WARNING", "logger": "...", "message": "...", "pid": 7, "trace_id": "abc"}

`kvcm up` writes both settings into the environment, which all its processes inherit; each of them calls
`configure` first. `set_trace_id` names the request that a task works for; the tasks it starts have it
too. Only our own loggers are touched: those of Ray, Serve and the program around us stay as they are.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Mapping
from contextvars import ContextVar

from kvcm_ray.errors import Conflict, InvalidArgument, KvcmError, LimitReached, NotFound, Refused, StorageFull

FORMATS = ("text", "json")
LEVELS = ("debug", "info", "warning", "error")
FORMAT_VARIABLE, LEVEL_VARIABLE = "KVCM_LOG_FORMAT", "KVCM_LOG_LEVEL"
ROOT = "kvcm_ray"

TRACE_ID_MAX = 128  #: characters of a trace_id that go into a line
#: Failures that the state of things explains: callers are told, and counters.
_EXPECTED = (Conflict, InvalidArgument, LimitReached, NotFound, Refused, StorageFull)

_trace_id: ContextVar[str] = ContextVar("kvcm_trace_id", default="")


def set_trace_id(trace_id: str) -> None:
    """From here on lines of this task, and of those that it starts, carry this trace_id."""
    _trace_id.set(trace_id[:TRACE_ID_MAX])


def trace_id() -> str:
    """Of the request that is being worked on; "" outside of one."""
    return _trace_id.get()


def failed(log: logging.Logger, what: str, error: KvcmError) -> None:
    """A line about a request that failed: a warning, or at level debug if nothing is out of order."""
    level = logging.DEBUG if isinstance(error, _EXPECTED) else logging.WARNING
    if log.isEnabledFor(level):
        log.log(level, "%s: %s: %s", what, error.code, error.message)


def environment(log_format: str, log_level: str) -> dict[str, str]:
    """For the processes of a manager."""
    return {FORMAT_VARIABLE: log_format, LEVEL_VARIABLE: log_level}


def configure(variables: Mapping[str, str] | None = None) -> None:
    """Send our log lines to standard error as the environment says; doing it again changes nothing.

    Unknown values count as the defaults: a manager must not fail to start for want of a log format.
    """
    found = os.environ if variables is None else variables
    level = found.get(LEVEL_VARIABLE, "info").lower()
    logger = logging.getLogger(ROOT)
    logger.setLevel(level.upper() if level in LEVELS else "INFO")
    formatter = JsonFormatter() if found.get(FORMAT_VARIABLE, "").lower() == "json" else TextFormatter()
    for handler in logger.handlers:
        if isinstance(handler, _Handler):
            handler.setFormatter(formatter)
            return
    handler = _Handler()
    handler.setFormatter(formatter)
    logger.addHandler(handler)
    logger.propagate = False


class _Handler(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes to what is standard error now: Ray and tests replace it."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


class TextFormatter(logging.Formatter):
    """For people."""

    def format(self, record: logging.LogRecord) -> str:
        found = _trace_id.get()
        mark = f" [trace_id={found}]" if found else ""
        text = f"{_time(record)} {record.levelname} {record.name}: {record.getMessage()}{mark}"
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text


class JsonFormatter(logging.Formatter):
    """One object a line, for collectors."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": _time(record), "level": record.levelname, "logger": record.name,
            "message": record.getMessage(), "pid": record.process,
        }  # fmt: skip
        if found := _trace_id.get():
            line["trace_id"] = found
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def _time(record: logging.LogRecord) -> str:
    """UTC with milliseconds."""
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(record.created))}.{int(record.msecs):03}Z"
