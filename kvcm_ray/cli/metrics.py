"""``kvcm metrics``: what there is to watch, and files for the tools that watch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from kvcm_ray.cli.output import EXIT_OK, EXIT_PROBLEMS, emit, human_bytes, json_option, table
from kvcm_ray.cli.target import Target, open_api, target_options
from kvcm_ray.errors import StorageIOError

OUT = click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), help="Folder that gets the files."
)


@click.group()
def metrics() -> None:
    """Metrics: a summary, and files for Prometheus and Grafana.

    \b
    kvcm metrics summary
    kvcm metrics scrape-config > prometheus.yml
    kvcm metrics grafana --out dashboards
    kvcm metrics alerts --out rules
    """


@metrics.command("summary")
@target_options
@json_option
def summary(target: Target, as_json: bool) -> int:
    """What ``GET /metrics`` says of each group, for people. Exit code 4 if a group does not answer.

    \b
    Example:
      kvcm metrics summary
    """
    with open_api(target) as api:
        reports = api.call("getStatistics")["statistics"]
    emit({"groups": reports}, as_json, [line for report in reports for line in _lines(report)])
    return EXIT_PROBLEMS if any("unavailable" in report for report in reports) else EXIT_OK


@metrics.command("list")
@json_option
def list_metrics(as_json: bool) -> None:
    """Every metric: type, labels, meaning.

    \b
    Example:
      kvcm metrics list
    """
    rows = described()
    emit(
        {"metrics": rows},
        as_json,
        table(("name", "type", "labels", "meaning"), [tuple(row.values()) for row in rows]),
    )


@metrics.command("grafana")
@OUT
@json_option
def grafana(out: Path | None, as_json: bool) -> None:
    """Dashboards to import into Grafana: of all groups, and of one.

    \b
    Example:
      kvcm metrics grafana --out ./grafana
    """
    from kvcm_ray.monitoring.grafana import dashboards

    _files(
        {name: f"{json.dumps(content, indent=1)}\n" for name, content in dashboards().items()}, out, as_json
    )


@metrics.command("alerts")
@OUT
@json_option
def alerts(out: Path | None, as_json: bool) -> None:
    """Alert rules for Prometheus.

    \b
    Example:
      kvcm metrics alerts --out ./alerts
    """
    import yaml

    from kvcm_ray.monitoring.alerts import rules

    _files({"kvcm-alerts.yaml": yaml.safe_dump(rules(), sort_keys=False, width=110)}, out, as_json)


@metrics.command("scrape-config")
@click.option("--rules", default="", metavar="PATH", help="Alert rules that Prometheus shall load.")
@click.option(
    "--metrics-token-file", default="", metavar="PATH", help="File, on Prometheus' machine, with a token."
)
@target_options
@json_option
def scrape_config(rules: str, metrics_token_file: str, target: Target, as_json: bool) -> None:
    """A prometheus.yml that scrapes this manager.

    \b
    Example:
      kvcm metrics scrape-config > prometheus.yml
    """
    import yaml

    from kvcm_ray.monitoring.scrape import config

    found = config(target.find_url(), rules=rules, token_file=metrics_token_file)
    emit(found, as_json, yaml.safe_dump(found, sort_keys=False).splitlines())


def described() -> list[dict[str, str]]:
    """Every metric in plain words."""
    from kvcm_ray.actors.metric_table import GROUP_METRICS
    from kvcm_ray.monitoring.promql import labels_of
    from kvcm_ray.serve_app.metrics_text import MANAGER_METRICS

    return [
        {"name": m.name, "type": str(m.kind), "labels": ", ".join(labels_of(m)), "meaning": m.help}
        for m in (*MANAGER_METRICS, *GROUP_METRICS)
    ]


def _files(contents: Mapping[str, str], out: Path | None, as_json: bool) -> None:
    """Into a folder, or all of them to standard output."""
    if out is None:
        emit(dict(contents), as_json, [line for text in contents.values() for line in text.splitlines()])
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, text in contents.items():
            (out / name).write_text(text)
    except OSError as error:
        raise StorageIOError(f"cannot write to {out}: {error}") from error
    paths = [str(out / name) for name in contents]
    emit({"files": paths}, as_json, paths)


def _lines(report: Mapping[str, Any]) -> list[str]:
    name = report["group"]
    if "unavailable" in report:
        return [f"{name}: does not answer: {report['unavailable']}", ""]
    gauges, counters = report["gauges"], report["counters"]
    hit = _percent(counters["hit_tokens"], counters["lookup_tokens"])
    blocks = _percent(counters["hit_blocks"], counters["lookup_blocks"])
    evicted = ", ".join(
        f"{human_bytes(size)} {reason}"
        for reason, size in counters["evicted_bytes_by_reason"].items()
        if size
    )
    tiers = ", ".join(f"{kind} {human_bytes(row['used_bytes'])}" for kind, row in report["tiers"].items())
    return [
        f"{name}: {human_bytes(gauges['used_bytes'])} of {human_bytes(gauges['quota_bytes'])}"
        f" ({tiers or 'no tiers'}), {gauges['blocks']} blocks of {gauges['instances']} instances",
        f"  look-ups  {counters['lookups']}, found {hit} of the tokens, {blocks} of the blocks",
        f"  writes    {counters['finished_writes']} finished, {counters['aborted_writes']} aborted,"
        f" {counters['expired_sessions']} expired, {counters['refused_writes']} refused,"
        f" {gauges['writing_sessions']} in progress, {gauges['waiting_writes']} waiting",
        f"  given up  {evicted or 'nothing'}; {counters['demoted_blocks']} blocks demoted,"
        f" {counters['promoted_blocks']} promoted",
        f"  trouble   {counters['corrupt_reads']} corrupt reads, {counters['fenced_writes']} fenced writes,"
        f" {sum(counters['faults_by_code'].values())} faults, {gauges['broken_instances']} broken instances",
        "",
    ]


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"
