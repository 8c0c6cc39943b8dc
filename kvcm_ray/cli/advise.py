"""``kvcm advise``: what another quota would be worth to a group, by its own traffic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

from kvcm_ray.cli.output import emit, human_bytes, json_option, table
from kvcm_ray.cli.target import Target, open_api, target_options
from kvcm_ray.cli.values import human_seconds

Json = dict[str, Any]

_LITTLE = 0.005  #: a change of the hit ratio that is within the error of the estimate
_FEW_REQUESTS = 1_000


class Factors(click.ParamType):  # type: ignore[type-arg]
    """Multiples of a quota: ``0.5,1,2x``."""

    name = "factors"

    def convert(self, value: Any, param: Any, ctx: Any) -> list[float]:
        if isinstance(value, list):
            return value
        try:
            factors = [float(part.strip().removesuffix("x")) for part in str(value).split(",")]
        except ValueError:
            self.fail(f"{value!r} are not multiples of a quota; write 0.5,1,2,4", param, ctx)
        if not all(0 < factor < float("inf") for factor in factors):
            self.fail(f"{value!r}: a multiple of a quota is above 0", param, ctx)
        return factors


@click.command()
@click.argument("group")
@click.option("--factor", "factors", type=Factors(), default="0.5,1,2,4", show_default=True,
              help="Quotas to tell about, as multiples of the one that the group has.")  # fmt: skip
@target_options
@json_option
def advise(group: str, factors: list[float], target: Target, as_json: bool) -> None:
    """Tell what a larger or smaller quota would find, for the traffic of a group.

    An estimate that the group keeps up while it runs; recent traffic counts most. It is of LRU, and begins
    anew when the group's actor restarts.

    \b
    Example:
      kvcm advise chat --factor 0.5,1,2
    """
    with open_api(target) as api:
        advice = dict(api.call("getAdvice", instance_group=group, factors=factors)["advice"])
    emit(advice, as_json, _lines(advice))


def _lines(advice: Json) -> list[str]:
    observed = advice["observed"]
    head = f"group {advice['group']}  quota {human_bytes(advice['quota_bytes'])}  policy {advice['policy']}"
    seen = (
        f"{observed['requests']:,} look-ups of {observed['accessed_blocks']:,} blocks in "
        f"{human_seconds(observed['seconds'])}"
    )
    if not observed["accessed_blocks"] or not advice["rows"]:
        return [head, f"{seen}: nothing to go by yet"]
    rows = [_row(row) for row in advice["rows"]]
    return [
        head,
        f"{seen}; one of {round(1 / advice['sample_rate'])} blocks was looked at",
        f"found {_percent(advice['measured_hit_ratio'])} of them; "
        f"a cache without an end would find {_percent(advice['infinite_hit_ratio'])}",
        "",
        *table(("quota", "", "blocks", "hit ratio", "change"), rows),
        "",
        *_sentences(advice),
    ]


def _row(row: Json) -> tuple[Any, ...]:
    return (
        f"{row['factor']:g}x",
        human_bytes(row["quota_bytes"]),
        row["blocks"],
        _percent(row["hit_ratio"]),
        _points(row["change"]),
    )


def _sentences(advice: Json) -> list[str]:
    said = [_sentence(row) for row in advice["rows"] if row["factor"] != 1]
    if advice["knee_bytes"]:
        knee = human_bytes(advice["knee_bytes"])
        said.append(
            f"The knee is at {knee}: beyond it, each doubling of the room is worth less than average."
        )
    return [*said, *_reservations(advice)]


def _sentence(row: Json) -> str:
    name = f"{row['factor']:g}x the quota ({human_bytes(row['quota_bytes'])})"
    if abs(row["change"]) < _LITTLE:
        return f"{name} would change little."
    more = "more" if row["change"] > 0 else "fewer"
    percent = abs(row["change"]) * 100
    return f"{name} would find {percent:.1f} of 100 blocks {more}: {_percent(row['hit_ratio'])}."


def _reservations(advice: Json) -> Sequence[str]:
    """What makes the figures less certain than they look."""
    said = []
    if advice["policy"] != "lru":
        said.append(f"The estimate is of lru; the group runs {advice['policy']}, and may find more or less.")
    if advice["observed"]["requests"] < _FEW_REQUESTS:
        said.append("So few look-ups say little; ask again later.")
    largest = max(row["quota_bytes"] for row in advice["rows"])
    if advice["footprint_bytes"] < largest:
        footprint = human_bytes(advice["footprint_bytes"])
        said.append(f"All blocks seen so far take {footprint}; what is larger would hold them all.")
    return said


def _percent(ratio: float) -> str:
    return f"{ratio * 100:.1f} %"


def _points(change: float) -> str:
    return f"{change * 100:+.1f}"
