"""``kvcm tail``: what happens in the groups, as it happens.

Events of all groups in the order of their time. A group that comes later is followed, too; of one whose
actor was restarted everything that the new one tells.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator, Sequence
from typing import Any

import click

from kvcm_ray.cli.lasting import Lasting, lasting
from kvcm_ray.cli.output import EXIT_FAILED, EXIT_OK, coloured, human_bytes, note
from kvcm_ray.cli.target import Target, target_options
from kvcm_ray.errors import GroupNotFound, KvcmError

Json = dict[str, Any]

KINDS = (
    "lookup", "write_started", "write_finished", "write_aborted", "session_expired", "evicted", "demoted",
    "promoted", "removed", "trimmed", "refused", "fault", "incarnation",
)  # fmt: skip
PERIOD_S = 0.5
EVENTS_PER_CALL = 500
_COLOURS = {
    "fault": "red", "refused": "red", "evicted": "yellow", "session_expired": "yellow", "incarnation": "cyan",
}  # fmt: skip


@click.command()
@click.option("--group", "groups", multiple=True, help="Only this group; repeat for more.")
@click.option(
    "--kind", "kinds", multiple=True, type=click.Choice(KINDS), help="Only this kind; repeat for more."
)
@click.option("--no-follow", is_flag=True, help="Print what is remembered and end.")
@click.option("--count", type=click.IntRange(min=1), help="End after so many events.")
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print one JSON object a line while following; with --no-follow one with all events.",
)
@target_options
def tail(
    groups: tuple[str, ...], kinds: tuple[str, ...], no_follow: bool, count: int | None, as_json: bool,
    target: Target,
) -> int:  # fmt: skip
    """Follow what happens: writes, evictions, refusals, faults; look-ups are sampled.

    Begins with what the groups remember. A manager or group that goes away is waited for. --json
    prints one object a line while following, and with --no-follow one object with all events.

    \b
    Examples:
      kvcm tail
      kvcm tail --group chat --kind evicted --kind refused
      kvcm tail --no-follow --json
    """
    with lasting(target) as api:
        events = _Follower(api, groups).events(follow=not no_follow)
        wanted = (event for event in events if not kinds or event["kind"] in kinds)
        shown = itertools.islice(wanted, count)
        if as_json and no_follow:
            click.echo(json.dumps({"events": list(shown)}))
        else:
            for event in shown:
                click.echo(json.dumps(event) if as_json else _line(event))
        return EXIT_FAILED if no_follow and api.away else EXIT_OK


class _Follower:
    """Asks every group for what came behind the last event of it that was told.

    Args:
        groups: their names; all that there are, if there is none.
    """

    def __init__(self, api: Lasting, groups: Sequence[str]) -> None:
        self._api = api
        self._groups = groups
        self._after: dict[str, tuple[int, int]] = {}  #: number of the last event and incarnation
        self._caught_up: set[str] = set()
        self._begun = False

    def events(self, *, follow: bool) -> Iterator[Json]:
        while True:
            fresh, more = self._round()
            self._begun = True
            yield from sorted(fresh, key=lambda event: event["time_s"])
            if not more and not follow:
                return
            if not more:
                time.sleep(PERIOD_S)

    def _round(self) -> tuple[list[Json], bool]:
        """(events that nobody was told yet, whether there are more)."""
        fresh: list[Json] = []
        more = False
        for group in self._names():
            try:
                told = self._behind(group)
            except GroupNotFound:
                if group in self._groups:
                    raise
                continue  # removed since the list was made
            except KvcmError as error:
                if group in self._groups and not self._begun:
                    raise
                self._api.miss(f"group {group!r}", error)
                continue
            self._api.seen(f"group {group!r}")
            fresh += [{"group": group, **event} for event in told["events"]]
            more |= len(told["events"]) == EVENTS_PER_CALL
        return fresh, more

    def _names(self) -> Sequence[str]:
        if self._groups:
            return self._groups
        try:
            return sorted(group["name"] for group in self._api.call("listInstanceGroup")["instance_group"])
        except KvcmError as error:
            if not self._begun:
                raise
            self._api.miss("the manager", error)
            return ()

    def _behind(self, group: str) -> Json:
        """What came in a group since it was asked the last time."""
        number, incarnation = self._after.get(group, (0, 0))
        told = self._ask(group, number)
        if number and told["incarnation"] != incarnation:  # numbers began again
            told = self._ask(group, 0)
            self._caught_up.discard(group)
        if told["dropped"] and group in self._caught_up:
            note(f"{told['dropped']} events of group {group!r} came too fast to be told")
        self._after[group] = int(told["next"]), int(told["incarnation"])
        if len(told["events"]) < EVENTS_PER_CALL:
            self._caught_up.add(group)
        return told

    def _ask(self, group: str, number: int) -> Json:
        answer = self._api.call("getEvents", instance_group=group, after_id=number, limit=EVENTS_PER_CALL)
        return dict(answer["journal"])


def _line(event: dict[str, Any]) -> str:
    second = time.strftime("%H:%M:%S", time.localtime(event["time_s"]))
    when = f"{second}.{int(event['time_s'] % 1 * 1000):03}"
    kind = coloured(f"{event['kind'].replace('_', ' '):15}", fg=_COLOURS.get(event["kind"]), to_stdout=True)
    size = f"{event['blocks']} blocks, {human_bytes(event['bytes'])}" if event["blocks"] else ""
    where = f"on {event['storage']}" if event["storage"] else ""
    said = " · ".join(filter(None, (event["instance_id"], size, where, event["reason"])))
    return f"{when}  {event['group']:12}  {kind}  {said}".rstrip()
