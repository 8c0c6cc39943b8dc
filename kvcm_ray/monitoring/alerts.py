"""Alert rules for Prometheus. Each says what happened and what to do; a full cache wakes nobody."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kvcm_ray.monitoring.grafana import p99
from kvcm_ray.monitoring.promql import check, samples


@dataclass(frozen=True, slots=True)
class Alert:
    name: str
    expression: str
    lasts: str  #: for so long
    severity: str  #: "page" or "ticket"
    summary: str
    do: str


ALERTS = (
    Alert("KvcmDown", 'up{job="kvcm"} == 0', "2m", "page",
          "The manager at {{ $labels.instance }} cannot be scraped.",
          "Engines recompute meanwhile. `kvcm status`; if nothing runs, `kvcm up` on its data directory."),
    Alert("KvcmGroupDown", "kvcm_group_up == 0", "1m", "page",
          "Group {{ $labels.group }} does not answer; its reads go on, writes wait.",
          "Ray restarts the actor within seconds. If it does not last, read the actor's log; `kvcm doctor`."),
    Alert("KvcmInstanceBroken", "kvcm_broken_instances > 0", "5m", "page",
          "{{ $value }} instances of group {{ $labels.group }} cannot be opened.",
          "`kvcm fsck --data-dir D` names the damage; removing the instance costs only its cache."),
    Alert("KvcmWritesRefused", "sum by (group) (rate(kvcm_refused_writes_total[10m])) > 0.1", "10m", "ticket",
          "Writes to group {{ $labels.group }} find no room.",
          "`kvcm capacity GROUP` shows what holds the quota: pins, leases, a paused reclaimer, or its size."),
    Alert("KvcmReclaimingPaused", "kvcm_reclaiming_paused == 1", "1h", "ticket",
          "Nothing of group {{ $labels.group }} is evicted or erased since an hour.",
          "`kvcm reclaimer --resume`, unless somebody paused it for a reason."),
    Alert("KvcmDeletionsPileUp",
          "kvcm_pending_delete_bytes / kvcm_group_quota_bytes > 0.2", "15m", "ticket",
          "A fifth of the quota of group {{ $labels.group }} waits to be erased.",
          "Reclaimers are slow or dead: `kvcm reclaimer`, the log of the reclaimers, the storage itself."),
    Alert("KvcmIndexMapFull", "kvcm_index_map_used_ratio > 0.9", "5m", "ticket",
          "An index of group {{ $labels.group }} has used {{ $value | humanizePercentage }} of its map.",
          "Lower max_key_count of the group, or use another instance, before it takes no blocks."),
    Alert("KvcmCorruptReads", "increase(kvcm_corrupt_reads_total[1h]) > 0", "0m", "ticket",
          "Damaged records or blocks were met in group {{ $labels.group }}; they read as misses.",
          "`kvcm fsck --data-dir D`; look at the disk. No wrong bytes were served: they are checksummed."),
    Alert("KvcmFenced", "increase(kvcm_fenced_writes_total[1h]) > 0", "0m", "ticket",
          "A stale incarnation of group {{ $labels.group }} tried to write and was refused.",
          "Nothing is lost. Find out why its process or node was stopped for so long."),
    Alert("KvcmActorRestarts", "changes(kvcm_epoch[1h]) > 3", "0m", "ticket",
          "The actor of group {{ $labels.group }} started {{ $value }} times in an hour.",
          "Its log says why it ended: memory, a full disk, a bug."),
    Alert("KvcmSessionsExpire",
          'sum by (group) (rate(kvcm_writes_total{outcome="expired"}[15m])) > 0.1', "15m", "ticket",
          "Write sessions of group {{ $labels.group }} expire unfinished.",
          "Engines die or hang while they write; see their logs. Reserved bytes come back by themselves."),
    Alert("KvcmReplicaBehind", "kvcm_replica_lag_seconds > 30", "1m", "ticket",
          "A replica sees group {{ $labels.group }} as it was {{ $value }} s ago.",
          "Newer blocks are misses there. `kvcm restart` renews replicas without refused requests."),
    Alert("KvcmSlowCalls", p99("kvcm_request_duration_seconds", "", "op") + " > 2", "10m", "ticket",
          "One of a hundred calls of {{ $labels.op }} takes over 2 s.",
          "`kvcm doctor`; a busy machine, a slow disk, or writes that wait for room."),
    Alert("KvcmReportsLost", "rate(kvcm_dropped_reports_total[10m]) > 1", "10m", "ticket",
          "Look-ups of group {{ $labels.group }} are not reported: hit ratios are too low.",
          "The actor is overloaded or away; more groups, or fewer look-ups of the same prompt."),
)  # fmt: skip


def rules() -> dict[str, Any]:
    """A Prometheus rule file.

    Raises:
        InvalidArgument: an expression uses what /metrics does not have.
    """
    known = samples()
    for alert in ALERTS:
        check(alert.expression, known)
    return {
        "groups": [
            {
                "name": "kvcm",
                "rules": [
                    {
                        "alert": alert.name,
                        "expr": alert.expression,
                        "for": alert.lasts,
                        "labels": {"severity": alert.severity},
                        "annotations": {"summary": alert.summary, "description": alert.do},
                    }
                    for alert in ALERTS
                ],
            }
        ]
    }
