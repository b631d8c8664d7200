"""Dashboard and alert rules use only metrics and labels that there are; Prometheus's own tool evaluates the rules."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from expertmesh.actors.gateway.metrics import CODES
from expertmesh.actors.metrics import METRICS, Kind

MONITORING = Path(__file__).resolve().parents[2] / "k8s" / "monitoring"
KIND_OF = {name: metric.kind for metric in METRICS for name in metric.series}
LABELS_OF = {name: {*metric.labels, "WorkerId"} for metric in METRICS for name in metric.series}
USE = re.compile(r"(ray_\w+)(?:\{([^}]*)\})?(\[)?")
GROUPING = re.compile(r"\b(?:by|without) \(([^)]*)\)")


def rules() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load((MONITORING / "expertmesh-alerts.yaml").read_text())["groups"]
    found: list[dict[str, Any]] = group["rules"]
    return found


def panels() -> list[dict[str, Any]]:
    dashboard = json.loads((MONITORING / "expertmesh-dashboard.json").read_text())
    found: list[dict[str, Any]] = dashboard["panels"]
    return found


def expressions() -> list[str]:
    shown = [target["expr"] for panel in panels() for target in panel.get("targets", ())]
    return [*(rule["expr"] for rule in rules()), *shown]


def problems(expression: str) -> list[str]:
    """Return what is wrong with the names and labels of an expression."""
    found = []
    used = USE.findall(expression)
    labels: set[str] = {"le"} if "_bucket" in expression else set()
    for name, matchers, is_range in used:
        if name not in KIND_OF:
            found.append(f"there is no {name}")
            continue
        labels |= LABELS_OF[name]
        matched = set(re.findall(r"(\w+)\s*[=!]", matchers))
        found += [f"{name} has no label {label}" for label in matched - LABELS_OF[name]]
        # The rate of what goes up and down means nothing, and neither does the level of a counter.
        if bool(is_range) != (KIND_OF[name] is not Kind.GAUGE):
            found.append(f"{name} is a {KIND_OF[name]}")
    for group in GROUPING.findall(expression):
        found += [f"{expression} has no label {label}" for label in set(re.split(r",\s*", group)) - labels]
    return found if used else ["it uses no metric"]


@pytest.mark.parametrize("expression", expressions())
def test_names_and_labels_exist(expression: str) -> None:
    assert problems(expression) == []


@pytest.mark.parametrize(
    ("expression", "problem"),
    [
        ("sum(ray_expertmesh_speed)", "there is no ray_expertmesh_speed"),
        ("rate(ray_expertmesh_queue_seconds[5m])", "there is no ray_expertmesh_queue_seconds"),
        ("rate(ray_expertmesh_epoch[5m])", "ray_expertmesh_epoch is a gauge"),
        ("ray_expertmesh_retries_total > 3", "ray_expertmesh_retries_total is a counter"),
        ('ray_expertmesh_kv_pages{shard="shard-0"}', "ray_expertmesh_kv_pages has no label shard"),
        ("sum by (shard) (ray_expertmesh_kv_pages)", "sum by (shard) (ray_expertmesh_kv_pages) has no label shard"),
        ("vector(1)", "it uses no metric"),
    ],
)
def test_a_wrong_expression_is_found(expression: str, problem: str) -> None:
    assert problems(expression) == [problem]


def test_label_values_that_are_asked_for_are_given() -> None:
    for codes in re.findall(r'code=~"([^"]*)"', " ".join(expressions())):
        assert set(codes.split("|")) <= set(CODES)


def test_the_dashboard_shows_every_metric() -> None:
    shown = {name for expression in expressions() for name, _, _ in USE.findall(expression)}
    assert [metric.exported for metric in METRICS if not shown & set(metric.series)] == []


def test_panels_do_not_overlap_and_have_ids_of_their_own() -> None:
    places = [panel["gridPos"] for panel in panels()]
    cells = [(x, y) for p in places for x in range(p["x"], p["x"] + p["w"]) for y in range(p["y"], p["y"] + p["h"])]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24, "Grafana's grid has 24 columns"
    assert len({panel["id"] for panel in panels()}) == len(places)


def test_every_rule_says_what_it_is_about_and_is_tried() -> None:
    text = (MONITORING / "expertmesh-alerts.test.yaml").read_text()
    for rule in rules():
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert set(rule["annotations"]) == {"summary", "description"}
        assert f'alertname="{rule["alert"]}"' in text


def promtool(*arguments: str) -> str:
    tool = shutil.which("promtool")
    if tool is None:
        pytest.skip("needs promtool (Debian's package prometheus)")
    ended = subprocess.run([tool, *arguments], capture_output=True, text=True, timeout=60, check=False, cwd=MONITORING)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def test_prometheus_accepts_the_rules_and_the_configuration() -> None:
    assert f"{len(rules())} rules found" in promtool("check", "rules", "expertmesh-alerts.yaml")
    assert "is valid prometheus config" in promtool("check", "config", "prometheus.yml")


def test_rules_fire_when_they_should_and_not_otherwise() -> None:
    assert "SUCCESS" in promtool("test", "rules", "expertmesh-alerts.test.yaml")
