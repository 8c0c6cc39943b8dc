"""Two Grafana dashboards: all groups, and one of them.

Each panel has a unit, and a line that says what to do when it is red.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvcm_ray.monitoring.promql import check, samples

SCHEMA = 39  #: of Grafana 10.4 and later
WIDTH, HEIGHT, COLUMNS = 12, 8, 2
_ALL, _ONE = 'group=~"$group"', 'group="$group"'


@dataclass(frozen=True, slots=True)
class Panel:
    title: str
    unit: str  #: Grafana's name of it
    red: str  #: what to do when it is red
    targets: Sequence[tuple[str, str]]  #: (expression, legend)
    red_above: float | None = None
    red_below: float | None = None


def dashboards() -> dict[str, dict[str, Any]]:
    """Contents by file name.

    Raises:
        InvalidArgument: an expression uses what /metrics does not have.
    """
    overview = _dashboard("kvcm-overview", "KV-cache manager: all groups", _overview(), multiple=True)
    group = _dashboard("kvcm-group", "KV-cache manager: one group", _group(), multiple=False)
    return {"kvcm-overview.json": overview, "kvcm-group.json": group}


def ratio(hits: str, lookups: str, selector: str, by: str = "group") -> str:
    """Part of the look-ups that were hits, over five minutes."""
    above, below = (f"sum by ({by}) (rate({name}{{{selector}}}[5m]))" for name in (hits, lookups))
    return f"{above} / {below}"


def p99(histogram: str, selector: str, by: str) -> str:
    inside = f"rate({histogram}_bucket{{{selector}}}[5m])" if selector else f"rate({histogram}_bucket[5m])"
    return f"histogram_quantile(0.99, sum by (le, {by}) ({inside}))"


def used_ratio(selector: str) -> str:
    used = f"sum by (group) (kvcm_group_used_bytes{{{selector}}})"
    return f"{used} / max by (group) (kvcm_group_quota_bytes{{{selector}}})"


def _overview() -> list[Panel]:
    return [
        Panel("Hit ratio by tokens", "percentunit",
              "Ask `kvcm advise GROUP` what more quota would find, and `kvcm explain` why a prompt missed.",
              [(ratio("kvcm_hit_tokens_total", "kvcm_lookup_tokens_total", _ALL), "{{group}}")],
              red_below=0.05),
        Panel("Used part of the quota", "percentunit",
              "Full is normal for a cache; if writes are refused as well, see `kvcm capacity GROUP`.",
              [(used_ratio(_ALL), "{{group}}")], red_above=1.0),
        Panel("Writes without room", "ops",
              "`kvcm capacity GROUP` shows what holds the quota: pins, leases, or a paused reclaimer.",
              [(f"sum by (group) (rate(kvcm_refused_writes_total{{{_ALL}}}[5m]))", "{{group}}")],
              red_above=0.1),
        Panel("Evicted", "Bps",
              "Much of it beside a low hit ratio: the quota is below the working set, `kvcm advise GROUP`.",
              [(f"sum by (group, reason) (rate(kvcm_evicted_bytes_total{{{_ALL}}}[5m]))",
                "{{group}} {{reason}}")]),
        Panel("Calls to the interface", "reqps",
              "A rise of codes other than OK: `kvcm why CODE`, and the log of the gateway.",
              [("sum by (op, code) (rate(kvcm_requests_total[5m]))", "{{op}} {{code}}")]),
        Panel("99th percentile of calls", "s",
              "Look for a busy machine first, then at the group whose actor is slow (next panel).",
              [(p99("kvcm_request_duration_seconds", "", "op"), "{{op}}")], red_above=1.0),
        Panel("99th percentile in the groups' actors", "s",
              "Compare with evictions and writes of the group; a full disk shows in `kvcm doctor`.",
              [(p99("kvcm_call_duration_seconds", _ALL, "group"), "{{group}}")], red_above=1.0),
        Panel("Groups that do not answer", "short",
              "`kvcm status` names them; the actor's log says why it ended, Ray restarts it within seconds.",
              [("count(kvcm_group_up == 0) or vector(0)", "groups")], red_above=1.0),
    ]  # fmt: skip


def _group() -> list[Panel]:
    return [
        Panel("Hit ratio", "percentunit",
              "By tokens is what prefill saves. Low: `kvcm explain` a prompt that should have hit.",
              [(ratio("kvcm_hit_tokens_total", "kvcm_lookup_tokens_total", _ONE), "by tokens"),
               (ratio("kvcm_hit_blocks_total", "kvcm_lookup_blocks_total", _ONE), "by blocks")],
              red_below=0.05),
        Panel("Tokens found, by tier", "short",
              "Hits in slow tiers only: the fast tier is too small, or promotions wait (`kvcm capacity`).",
              [(f"sum by (tier) (rate(kvcm_hit_tokens_total{{{_ONE}}}[5m]))", "{{tier}} tokens/s")]),
        Panel("Bytes held", "bytes",
              "Pending deletion that only grows: reclaimers are paused, dead or slow (`kvcm reclaimer`).",
              [(f"kvcm_group_used_bytes{{{_ONE}}}", "used {{tier}}"),
               (f"kvcm_group_reserved_bytes{{{_ONE}}}", "being written"),
               (f"kvcm_pending_delete_bytes{{{_ONE}}}", "to be erased"),
               (f"kvcm_group_quota_bytes{{{_ONE}}}", "quota")]),
        Panel("Given up, by reason", "Bps",
              "`tier` and `quota` mean too little room; `unreadable` means damaged storage: `kvcm fsck`.",
              [(f"sum by (reason) (rate(kvcm_evicted_bytes_total{{{_ONE}}}[5m]))", "{{reason}}")]),
        Panel("Written", "Bps",
              "0 while engines run: their connectors cannot reach the manager; see their logs.",
              [(f"rate(kvcm_written_bytes_total{{{_ONE}}}[5m])", "written")]),
        Panel("Sessions", "short",
              "Many that expire: engines die or hang while they write. Waiting writes need room.",
              [(f"kvcm_write_sessions{{{_ONE}}}", "{{state}}"), (f"kvcm_waiting_writes{{{_ONE}}}", "waiting"),
               (f'rate(kvcm_writes_total{{{_ONE}, outcome="expired"}}[5m])', "expired/s")]),
        Panel("Moved between tiers", "short",
              "As many demoted as promoted at a high rate: the tiers thrash; enlarge the fast one.",
              [(f"sum by (reason) (rate(kvcm_moved_blocks_total{{{_ONE}}}[5m]))", "{{reason}} blocks/s")]),
        Panel("99th percentile in the actor", "s",
              "Compare with what is written and given up at that time; then look at the machine.",
              [(p99("kvcm_call_duration_seconds", _ONE, "group"), "calls")], red_above=1.0),
        Panel("Lag of readers", "s",
              "Above 0 for long: the replica serves an old index; restart it (`kvcm restart`).",
              [(f"kvcm_replica_lag_seconds{{{_ONE}}}", "behind the writer")], red_above=10.0),
        Panel("Index map used", "percentunit",
              "Near 1 the index takes no more blocks: lower max_key_count, or spread over more instances.",
              [(f"kvcm_index_map_used_ratio{{{_ONE}}}", "fullest index")], red_above=0.9),
        Panel("Damage and fencing", "short",
              "Damage: `kvcm fsck`. Fencing: two incarnations met; harmless, but look why one was stopped.",
              [(f"increase(kvcm_corrupt_reads_total{{{_ONE}}}[1h])", "corrupt reads"),
               (f"increase(kvcm_fenced_writes_total{{{_ONE}}}[1h])", "fenced writes"),
               (f"sum by (code) (increase(kvcm_faults_total{{{_ONE}}}[1h]))", "faults {{code}}")],
              red_above=1.0),
        Panel("Starts of the actor", "short",
              "More than one a day: read the log of the group's actor for why it ended.",
              [(f"changes(kvcm_epoch{{{_ONE}}}[1d])", "in a day")], red_above=3.0),
    ]  # fmt: skip


def _dashboard(uid: str, title: str, panels: Sequence[Panel], *, multiple: bool) -> dict[str, Any]:
    return {
        "uid": uid,
        "title": title,
        "tags": ["kvcm"],
        "schemaVersion": SCHEMA,
        "version": 1,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [_source(), _groups(multiple)]},
        "panels": [_panel(number, panel) for number, panel in enumerate(panels)],
    }


def _source() -> dict[str, Any]:
    return {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Prometheus"}


def _groups(multiple: bool) -> dict[str, Any]:
    return {
        "name": "group",
        "type": "query",
        "label": "group",
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "query": {"query": "label_values(kvcm_group_up, group)", "refId": "groups"},
        "refresh": 2,
        "multi": multiple,
        "includeAll": multiple,
        "allValue": ".*" if multiple else None,
    }


def _panel(number: int, panel: Panel) -> dict[str, Any]:
    source = {"type": "prometheus", "uid": "${datasource}"}
    known = samples()
    for expression, _ in panel.targets:
        check(expression, known)
    return {
        "id": number + 1,
        "type": "timeseries",
        "title": panel.title,
        "description": f"When red: {panel.red}",
        "datasource": source,
        "gridPos": {
            "x": number % COLUMNS * WIDTH, "y": number // COLUMNS * HEIGHT, "w": WIDTH, "h": HEIGHT,
        },
        "fieldConfig": {"defaults": _field(panel), "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": [
            {"refId": chr(65 + i), "datasource": source, "expr": expression, "legendFormat": legend}
            for i, (expression, legend) in enumerate(panel.targets)
        ],
    }  # fmt: skip


def _field(panel: Panel) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [{"color": "green", "value": None}]
    if panel.red_above is not None:
        steps.append({"color": "red", "value": panel.red_above})
    if panel.red_below is not None:
        steps = [{"color": "red", "value": None}, {"color": "green", "value": panel.red_below}]
    style = "line" if panel.red_above is not None or panel.red_below is not None else "off"
    return {
        "unit": panel.unit,
        "min": 0,
        "thresholds": {"mode": "absolute", "steps": steps},
        "custom": {"thresholdsStyle": {"mode": style}, "fillOpacity": 10, "showPoints": "never"},
    }
