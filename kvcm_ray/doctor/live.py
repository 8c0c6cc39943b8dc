"""Checks that ask the manager, and of what it says of itself."""

from __future__ import annotations

from typing import Any

from kvcm_ray.actors import paths
from kvcm_ray.actors.histogram import quantile
from kvcm_ray.cluster.facts import version
from kvcm_ray.doctor.findings import LOST, REFUSED, SLOW, Checked, Place, Problem
from kvcm_ray.errors import KvcmError

CALLS_MIN = 100


def answers(place: Place) -> Checked:
    """Does the manager answer, and are all its parts there?"""
    name = "the manager"
    if place.call is None:
        if place.manager is None or not place.manager.alive:
            return Checked(name, "does not run; the data directory was looked at")
        sentence = (
            "The manager's process lives but HTTP does not answer; engines count every look-up as a miss."
        )
        evidence = f"no answer from {place.url}, process {place.manager.pid}"
        command = f"tail -50 {place.folder}/manager.log"
        return Checked(name, "does not answer", (Problem(LOST, name, sentence, evidence, command),))
    if place.call("checkHealth")["is_health"]:
        return Checked(name, f"answers at {place.url}")
    sentence = "Parts of the manager are away; what they serve is a miss until they are back."
    command = f"curl -s {place.url}/healthz"
    return Checked(name, "is not healthy", (Problem(LOST, name, sentence, "checkHealth says no", command),))


def reclaiming(place: Place) -> Checked:
    """A paused reclaimer is forgotten until the quota is full."""
    name = "reclaiming"
    if place.view is None:
        return Checked(name, "no registry to look at")
    settings = place.view.reclaimer_settings()
    if not settings.paused:
        return Checked(name, f"{settings.reclaimers} reclaimers")
    sentence = "Reclaiming is paused: nothing is evicted, and a full group refuses writes."
    problem = Problem(REFUSED, name, sentence, "somebody paused it", f"kvcm reclaimer --resume{place.where}")
    return Checked(name, "paused", (problem,))


def waiting(place: Place) -> Checked:
    """How long requests wait for a group's actor."""
    name = "waiting for groups"
    groups = _statistics(place)
    if groups is None:
        return Checked(name, "the manager was not asked")
    waits = {group["group"]: _p99(group["histograms"]["call_duration_seconds"]) for group in groups}
    found = tuple(
        Problem(
            SLOW,
            name,
            f"Group {group} gets more requests than it can do; writes wait, and engines wait with them.",
            f"1 of 100 calls took over {wait_s:.2g} s",
            f"kvcm capacity {group}{place.where}",
        )
        for group, wait_s in waits.items()
        if wait_s >= place.limits.wait_s
    )
    return Checked(name, f"p99 at most {max(waits.values(), default=0.0):.2g} s", found)


def incarnations(place: Place) -> Checked:
    """Groups whose actor died and was started again since the manager is up."""
    name = "restarts of groups"
    groups = _statistics(place)
    if groups is None:
        return Checked(name, "the manager was not asked")
    told = ", ".join(f"{g['group']} runs for {g['now_s'] - g['started_s']:.0f} s" for g in groups)
    ready_s = paths.manager_file(place.folder).stat().st_mtime if place.manager and place.folder else 0.0
    found = []
    for group in groups if ready_s else []:
        later_s, ago_s = group["started_s"] - ready_s, group["now_s"] - group["started_s"]
        again = group["gauges"]["epoch"] > 1  # else the group was made later
        if later_s > place.limits.start_s and again and ago_s < place.limits.recent_s:
            sentence = (
                f"The actor of group {group['group']} died and was started again; its writes waited, and "
                "what was only in memory (the order of eviction, leases) began anew."
            )
            evidence = f"{ago_s:.0f} s ago, {later_s:.0f} s after the manager was ready"
            command = f"tail -50 {place.folder}/manager.log"
            found.append(Problem(SLOW, name, sentence, evidence, command))
    return Checked(name, told or "no groups", tuple(found))


def version_skew(place: Place) -> Checked:
    """This program against the manager's."""
    name = "version"
    manager = place.manager
    if manager is None or not manager.alive or manager.version == version():
        return Checked(name, version())
    sentence = "The manager runs another version than this command; what is new in one the other lacks."
    evidence = f"manager {manager.version}, this command {version()}"
    command = f"kvcm down{place.where} && kvcm up{place.where}"
    return Checked(name, evidence, (Problem(SLOW, name, sentence, evidence, command),))


def _statistics(place: Place) -> list[dict[str, Any]] | None:
    """Of every group that answers; None if there is nobody to ask, or nobody who knows the call."""
    if place.call is None:
        return None
    try:
        answer = place.call("getStatistics", instance_group="", without_instances=True)
    except KvcmError:
        return None
    return [group for group in answer.get("statistics") or () if "unavailable" not in group]


def _p99(histogram: dict[str, Any]) -> float:
    """The 99th percentile in seconds; 0 for too few calls."""
    counts = histogram["counts"]
    return (quantile(histogram["le"], counts, 0.99) or 0.0) if sum(counts) >= CALLS_MIN else 0.0
