"""The part of PromQL that our expressions use, read well enough to check names and labels.

An expression is a row of tokens; a metric is a name that no parenthesis follows, with the selector behind
it. What cannot be read is refused, so that a slip of the pen is found here and not in a dashboard.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from kvcm_ray.actors.metric_table import GROUP_METRICS, GroupMetric, Kind, Metric
from kvcm_ray.errors import InvalidArgument
from kvcm_ray.serve_app.metrics_text import MANAGER_METRICS

_TOKEN = re.compile(
    r'\s*(?:(?P<name>[a-zA-Z_:][a-zA-Z0-9_:]*)|(?P<string>"[^"]*")|(?P<range>\[(?:\d+[smhd]|\$__\w+)\])'
    r"|(?P<number>\d+(?:\.\d+)?(?:e\d+)?[smhd]?)|(?P<sign>=~|!=|!~|==|>=|<=|[-+*/%^(){},=<>])|(?P<wrong>\S))"
)
_FUNCTIONS = {"rate", "increase", "sum", "max", "min", "histogram_quantile", "time", "changes", "clamp_min",
              "count", "vector", "topk", "label_values", "absent", "avg"}  # fmt: skip
_WORDS = {"by", "without", "on", "ignoring", "and", "or", "unless", "group_left"}
_FROM_PROMETHEUS = {"job", "instance", "le"}


@dataclass(frozen=True, slots=True)
class Use:
    """A metric in an expression, and the labels that are named beside it."""

    name: str
    labels: frozenset[str]


def samples() -> dict[str, frozenset[str]]:
    """Names of all samples that ``GET /metrics`` has, with their labels."""
    found: dict[str, frozenset[str]] = {"up": frozenset({"job", "instance"})}  # Prometheus' own
    for metric in (*MANAGER_METRICS, *GROUP_METRICS):
        labels = frozenset(labels_of(metric)) | _FROM_PROMETHEUS
        ends = ("_bucket", "_sum", "_count") if metric.kind is Kind.HISTOGRAM else ("",)
        found |= {metric.name + end: labels for end in ends}
    return found


def labels_of(metric: Metric) -> tuple[str, ...]:
    """All labels of a metric, the group's first."""
    return ("group", *metric.labels) if isinstance(metric, GroupMetric) else metric.labels


def check(expression: str, known: Mapping[str, frozenset[str]]) -> list[Use]:
    """The metrics that an expression uses.

    Raises:
        InvalidArgument: it cannot be read, or names a metric or label that is not there.
    """
    uses = list(_uses(_tokens(expression), expression))
    for use in uses:
        if use.name not in known:
            raise InvalidArgument(f"{expression!r} uses {use.name}, which /metrics does not have")
        if wrong := use.labels - known[use.name]:
            raise InvalidArgument(f"{expression!r}: {use.name} has no label {min(wrong)}")
    if not uses:
        raise InvalidArgument(f"{expression!r} names no metric")
    return uses


def _tokens(expression: str) -> list[tuple[str, str]]:
    tokens = [(match.lastgroup or "", match[match.lastgroup or 0]) for match in _TOKEN.finditer(expression)]
    depth = 0
    for kind, text in tokens:
        depth += text in ("(", "{")
        depth -= text in (")", "}")
        if kind == "wrong" or depth < 0:
            raise InvalidArgument(f"{expression!r} cannot be read at {text!r}")
    if depth:
        raise InvalidArgument(f"{expression!r} has a parenthesis too many")
    return tokens


def _uses(tokens: list[tuple[str, str]], expression: str) -> Iterator[Use]:
    grouped: set[str] = set()
    found: list[Use] = []
    i = 0
    while i < len(tokens):
        kind, text = tokens[i]
        follows = tokens[i + 1][1] if i + 1 < len(tokens) else ""
        i += 1
        if kind != "name":
            continue
        if text in _WORDS:
            if follows == "(":
                names, i = _until(tokens, i + 1, ")")
                grouped |= names
        elif text in _FUNCTIONS:
            continue
        elif follows == "(":
            raise InvalidArgument(f"{expression!r}: {text} is no function that is known here")
        elif follows == "{":
            labels, i = _until(tokens, i + 1, "}")
            found.append(Use(text, frozenset(labels)))
        else:
            found.append(Use(text, frozenset()))
    for use in found:
        yield Use(use.name, use.labels | grouped)


def _until(tokens: list[tuple[str, str]], i: int, end: str) -> tuple[set[str], int]:
    """Names up to the closing parenthesis, and the place behind it."""
    names = set()
    while tokens[i][1] != end:
        if tokens[i][0] == "name":
            names.add(tokens[i][1])
        i += 1
    return names, i + 1
