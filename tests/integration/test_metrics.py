"""Every metric of a real server as Prometheus gets it: through Ray's endpoint, and by a real Prometheus."""

import json
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from http import HTTPStatus
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml

from expertmesh.actors.metrics import METRICS, Kind
from expertmesh.v1.inference_pb2 import GenerateRequest
from expertmesh.v1.inference_pb2_grpc import InferenceStub
from tests.integration.conftest import POCKET, Server

MONITORING = POCKET.parents[1] / "k8s" / "monitoring"
NEW = 12
LINE = re.compile(r"^(ray_expertmesh_\w+)(?:\{(.*)\})? (\S+)$")
LABEL = re.compile(r'(\w+)="([^"]*)"')
# Ray sends a process's metrics each 10 s.
SENT_WITHIN_S = 12.0
WITHIN_S = 60.0


class Scraped:
    """What one look at the endpoint gave."""

    def __init__(self, text: str) -> None:
        found = [match.groups() for match in map(LINE.match, text.splitlines()) if match]
        self.samples = [(name, dict(LABEL.findall(labels or "")), float(value)) for name, labels, value in found]
        self.types = dict(re.findall(r"^# TYPE (ray_expertmesh_\w+) (\w+)$", text, re.MULTILINE))

    def sum(self, name: str, **labels: str) -> float:
        """Return the sum over the series with these labels, -1 where there is none."""
        values = [v for n, own, v in self.samples if n == f"ray_expertmesh_{name}" and labels.items() <= own.items()]
        return sum(values) if values else -1.0


def target_file(server: Server) -> Path:
    return next((server.log.parent / "state" / "expertmesh").glob("metrics-*.json"))


def scrape(server: Server) -> Scraped:
    ((address,),) = (group["targets"] for group in json.loads(target_file(server).read_text()))
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
        return Scraped(answer.read().decode())


def until(look: Callable[[], Any], holds: Callable[[Any], bool]) -> Any:
    """Look again until what is seen holds, for some time; return what was seen last."""
    deadline_s = time.monotonic() + WITHIN_S
    while not holds(seen := look()) and time.monotonic() < deadline_s:
        time.sleep(1.0)
    return seen


def settled(server: Server) -> Scraped:
    """Return what is exported once nothing is still on its way: each process sends at a time of its own."""

    def counted(seen: Scraped) -> list[tuple[str, dict[str, str], float]]:
        return [sample for sample in seen.samples if sample[0].endswith(("_total", "_count"))]

    deadline_s = time.monotonic() + WITHIN_S
    seen = scrape(server)
    while True:
        before = seen
        time.sleep(SENT_WITHIN_S)
        seen = scrape(server)
        if counted(seen) == counted(before):
            return seen
        assert time.monotonic() < deadline_s, "counts of a server without requests grow on"


def test_every_metric_is_exported_with_what_happened(pocket: Server) -> None:
    before = settled(pocket)
    ok_before = before.sum("requests_total", code="OK")
    with pocket.channel() as channel:
        for _ in range(2):
            request = GenerateRequest(text="def main():", max_tokens=NEW, ignore_eos=True)
            assert sum(len(r.token_ids) for r in InferenceStub(channel).Generate(request, timeout=60)) == NEW
        with pytest.raises(grpc.RpcError):
            InferenceStub(channel).GenerateOnce(GenerateRequest(text="a", temperature=-1), timeout=60)

    def grown(name: str, **labels: str) -> float:
        return float(seen.sum(name, **labels) - max(0.0, before.sum(name, **labels)))

    until(lambda: scrape(pocket), lambda now: now.sum("requests_total", code="OK") >= max(0.0, ok_before) + 2)
    seen = settled(pocket)
    assert [m.exported for m in METRICS if seen.types.get(m.exported) != m.kind] == []
    names = {name for name, _, _ in seen.samples}
    assert [name for metric in METRICS for name in metric.series if name not in names] == []
    for metric in METRICS:
        for name, labels, value in seen.samples:
            if name in metric.series:
                assert set(metric.labels) <= set(labels), name
                assert value >= 0, name
    assert grown("requests_total", code="OK") == 2
    assert grown("requests_total", code="INVALID_ARGUMENT") == 1
    assert grown("time_to_first_token_seconds_count") == grown("queue_seconds_count") == 2
    assert 0 < grown("inter_token_seconds_count") <= 2 * (NEW - 1)
    assert grown("generated_tokens_total") == 2 * NEW
    # The last token is drawn and not computed.
    assert grown("computed_tokens_total", phase="decode") == 2 * (NEW - 1)
    assert grown("link_bytes_total", kind="dispatch") > 0
    assert grown("link_bytes_total", kind="combine") > 0
    config = json.loads((POCKET / "config.json").read_text())
    pairs = grown("computed_tokens_total") * config["num_experts_per_tok"] * config["num_hidden_layers"]
    assert grown("shard_tokens_total") == pytest.approx(pairs)
    assert seen.sum("ready") == 1
    assert seen.sum("members", tier="shard", state="ready") == seen.sum("members", tier="worker", state="ready") == 2
    assert seen.sum("kv_free_pages") <= seen.sum("kv_pages")
    assert 0 < seen.sum("balancedness_ratio", window="slow") <= 1
    assert seen.sum("hot_expert_load_ratio", layer="0", rank="1") >= seen.sum(
        "hot_expert_load_ratio", layer="0", rank="3"
    )
    assert seen.sum("shard_weight_bytes") == sum(shard.weight_bytes for shard in pocket.status().shards)
    assert time.time() - 3600 < seen.sum("last_placement_change_timestamp_seconds") < time.time()
    assert seen.sum("loop_stalled") == 0
    assert {metric.kind for metric in METRICS} == set(Kind)


def test_a_real_prometheus_scrapes_a_server_and_evaluates_the_rules(pocket: Server, tmp_path: Path) -> None:
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("needs prometheus (Debian's package prometheus)")
    config = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "2s", "evaluation_interval": "2s"}
    config["rule_files"] = [str(MONITORING / name) for name in config["rule_files"]]
    (job,) = config["scrape_configs"]
    (found,) = job["file_sd_configs"]
    found["files"] = [str(target_file(pocket).parent / Path(pattern).name) for pattern in found["files"]]
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
    command = [program, f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/data"]
    log = tmp_path / "prometheus.log"
    with (
        log.open("w") as errors,
        subprocess.Popen([*command, "--web.listen-address=127.0.0.1:0"], stderr=errors, stdout=errors) as process,
    ):
        try:
            ready = until(lambda: _query(log, "query", query="ray_expertmesh_ready"), lambda data: data.get("result"))
            assert [sample["value"][1] for sample in ready["result"]] == ["1"], log.read_text()
            (labels,) = (sample["metric"] for sample in ready["result"])
            assert set(labels) == {"__name__", "instance", "job", "WorkerId", "NodeAddress"}
            others = _query(
                log, "query", query='count({job="expertmesh", __name__!~"ray_expertmesh_.*|up|scrape_.*|ALERTS.*"})'
            )
            assert others["result"] == [], "Ray's own are dropped"
            # A rule may be evaluated before the first scrape: what is asked for is that it does not stay pending.
            rules = until(lambda: _query(log, "rules"), _are_calm)
            assert _are_calm(rules), rules
            (group,) = rules["groups"]
            assert {rule["health"] for rule in group["rules"]} == {"ok"}, group
        finally:
            process.terminate()


def _query(log: Path, path: str, **parameters: str) -> dict[str, Any]:
    """Ask the Prometheus that writes this log; nothing while it is starting."""
    listening = re.search(r'msg="Listening on" address=(\S+)', log.read_text())
    if listening is None:
        return {}
    url = f"http://{listening.group(1)}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            data: dict[str, Any] = json.load(answer)["data"]
    except urllib.error.HTTPError as error:
        if error.code != HTTPStatus.SERVICE_UNAVAILABLE:
            raise
        return {}
    return data


def _are_calm(rules: dict[str, Any]) -> bool:
    """Say whether all rules were evaluated, and no alert is raised of a server that serves."""
    if not rules:
        return False
    (group,) = rules["groups"]
    states = {rule["name"]: rule["state"] for rule in group["rules"] if rule["type"] == "alerting"}
    is_evaluated = all(rule["health"] != "unknown" for rule in group["rules"])
    return is_evaluated and states["ExpertMeshNoMetrics"] == states["ExpertMeshNotReady"] == "inactive"
