"""Dashboards and alert rules: what `deploy/` holds is what the command makes, on metrics that are there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from kvcm_ray.cli.main import main
from kvcm_ray.errors import InvalidArgument
from kvcm_ray.monitoring.alerts import rules
from kvcm_ray.monitoring.grafana import dashboards
from kvcm_ray.monitoring.promql import check, samples
from kvcm_ray.testing.http import Http

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
GRAFANA_UNITS = {"percentunit", "bytes", "Bps", "s", "ops", "reqps", "short"}


def expressions() -> list[str]:
    found = [
        target["expr"] for board in dashboards().values() for p in board["panels"] for target in p["targets"]
    ]
    return found + [rule["expr"] for group in rules()["groups"] for rule in group["rules"]]


@pytest.mark.parametrize(("command", "folder"), [("grafana", "grafana"), ("alerts", "alerts")])
def test_deploy_holds_what_the_command_makes(command: str, folder: str, tmp_path: Path) -> None:
    assert main(["metrics", command, "--out", str(tmp_path)]) == 0
    made = {path.name: path.read_text() for path in tmp_path.iterdir()}
    kept = {path.name: path.read_text() for path in (DEPLOY / folder).iterdir()}
    assert kept == made, f"run `kvcm metrics {command} --out deploy/{folder}`"


def test_expressions_use_samples_that_the_page_really_has(http: Http) -> None:
    http.register("i1")
    http.write("i1", [1])
    text = http.get("/metrics").text
    typed = {line.split()[2]: line.split()[3] for line in text.splitlines() if line.startswith("# TYPE ")}
    for expression in expressions():
        for use in check(expression, samples()):
            base = use.name
            for end in ("_bucket", "_sum", "_count"):
                base = base.removesuffix(end) if typed.get(base.removesuffix(end)) == "histogram" else base
            assert base in typed or base == "up", expression


@pytest.mark.parametrize(
    "wrong",
    [
        "rate(kvcm_no_such_thing[5m])",
        "sum by (instance_id) (kvcm_group_blocks)",
        'kvcm_group_blocks{tier="x"}',
        "sum(kvcm_group_blocks",
        "kvcm_group_blocks ! 3",
        "frobnicate(kvcm_group_blocks)",
        "kvcm_call_duration_seconds > 3",
        "1 + 1",
    ],
)
def test_slips_of_the_pen_are_found(wrong: str) -> None:
    with pytest.raises(InvalidArgument):
        check(wrong, samples())


def test_panels_have_units_and_say_what_to_do() -> None:
    for board in dashboards().values():
        ids = [panel["id"] for panel in board["panels"]]
        assert len(set(ids)) == len(ids)
        for panel in board["panels"]:
            assert panel["fieldConfig"]["defaults"]["unit"] in GRAFANA_UNITS
            assert panel["description"].startswith("When red: ")
            assert "\n" not in panel["description"]
        places = {(p["gridPos"]["x"], p["gridPos"]["y"]) for p in board["panels"]}
        assert len(places) == len(board["panels"])


def test_alerts_say_what_and_what_to_do() -> None:
    (group,) = rules()["groups"]
    names = [rule["alert"] for rule in group["rules"]]
    assert len(set(names)) == len(names)
    for rule in group["rules"]:
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert rule["annotations"].keys() == {"summary", "description"}
        assert rule["for"][-1] in "mh"


def test_commands_speak_json_and_yaml(capsys: pytest.CaptureFixture[str], http: Http) -> None:
    assert main(["metrics", "scrape-config", "--url", "https://h:1/kvcm", "--rules", "r.yaml"]) == 0
    found: dict[str, Any] = yaml.safe_load(capsys.readouterr().out)
    (job,) = found["scrape_configs"]
    assert (job["scheme"], job["metrics_path"]) == ("https", "/kvcm/metrics")
    assert (job["static_configs"], found["rule_files"]) == ([{"targets": ["h:1"]}], ["r.yaml"])
    assert main(["metrics", "list", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["metrics"]) > 30
    assert main(["metrics", "alerts", "--out", "/proc/nowhere"]) == 1
