"""What KubeRay's RayService does with its serveConfigV2: Ray Serve builds the application and runs it."""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import httpx2
import pytest
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc

from expertmesh.v1.admin_pb2 import GetStatusRequest, ScaleRequest, StatusResponse
from expertmesh.v1.admin_pb2_grpc import AdminStub
from expertmesh.v1.inference_pb2 import GenerateRequest
from expertmesh.v1.inference_pb2_grpc import InferenceStub
from tests.integration.conftest import CLI, POCKET
from tests.integration.ray_nodes import LOOPBACK, RayNodes, ray_nodes

pytestmark = pytest.mark.timeout(400)  # six nodes and a fleet are started
BASE = Path(__file__).resolve().parents[2] / "k8s" / "base"
PROMPT = "def main():"
TIER = "expertmesh.io/tier"
DOMAIN = "expertmesh.io/failure-domain"
DRAIN_S = 150
GATEWAY_HOST = "127.0.0.2"
START_S = 150
# Of pocket-moe's context; longer than Serve takes to end a replica that does not wait.
LONG = 1900
SAMPLES = 8


@dataclass
class Application:
    """A running application, and who runs `serve run`."""

    grpc_address: str
    http_url: str
    cluster: RayNodes
    process: subprocess.Popen[bytes]
    log: Path

    def channel(self) -> grpc.Channel:
        return grpc.insecure_channel(self.grpc_address)

    def status(self) -> StatusResponse:
        with self.channel() as channel:
            response: StatusResponse = AdminStub(channel).GetStatus(GetStatusRequest(), timeout=20)
            return response

    def is_serving(self) -> bool:
        with self.channel() as channel:
            try:
                answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
            except grpc.RpcError:
                return False
            return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


def write_configuration(home: Path, grpc_port: int, http_port: int) -> Path:
    """Write what the pods find, the manifests' own but for paths, ports and sizes; return Serve's configuration."""
    folder = Path(shutil.copytree(BASE / "settings", home / "settings"))
    (folder / "90-here.toml").write_text(
        f"""
        model = "{POCKET}"
        dtype = "float32"
        shards = 2
        member_cpus = 1
        grpc_host = "{GATEWAY_HOST}"
        grpc_port = {grpc_port}
        [autoscale]
        shards = {{ min_count = 2, max_count = 3 }}
        workers = {{ max_count = 1 }}
        """
    )
    (service,) = yaml.safe_load_all((BASE / "rayservice.yaml").read_text())
    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    config["http_options"] |= {"host": LOOPBACK, "port": http_port}
    (application,) = config["applications"]
    application["args"] = {"config": str(folder), "drain_s": DRAIN_S, "state_dir": str(home / "state")}
    (gateways,) = application["deployments"]
    gateways["num_replicas"] = 1
    path = home / "application.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@contextmanager
def serve_run(nodes: RayNodes, path: Path, grpc_address: str, http_url: str) -> Iterator[Application]:
    """Have Ray Serve run an application's configuration on these nodes; its gateway serves when the block begins."""
    log = path.parent / "serve.log"
    command = [sys.executable, "-m", "ray.serve.scripts", "run", "--address", nodes.address, str(path)]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env={**os.environ, **nodes.env})
    started = Application(grpc_address, http_url, nodes, process, log)
    try:
        deadline_s = time.monotonic() + START_S
        while not started.is_serving():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline_s, log.read_text()
            time.sleep(0.2)
        yield started
    finally:
        process.kill()  # what it started ends with the nodes
        process.wait()


@pytest.fixture(scope="module")
def application(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Application]:
    """A head that computes nothing, and a node for each tier as the manifests have them, both shards on one."""
    home = tmp_path_factory.mktemp("application")
    grpc_port, http_port = free_port(), free_port()
    path = write_configuration(home, grpc_port, http_port)
    with ray_nodes() as nodes:
        nodes.start(0, labels={TIER: "control"})
        for tier, cpus in (("experts", 2), ("attention", 2), ("gateway", 1)):
            host = GATEWAY_HOST if tier == "gateway" else LOOPBACK
            nodes.start(cpus, host=host, labels={TIER: tier, DOMAIN: "host-a"})
        with serve_run(nodes, path, f"{GATEWAY_HOST}:{grpc_port}", f"http://{LOOPBACK}:{http_port}") as started:
            yield started


def test_serve_starts_the_fleet_on_the_nodes_of_its_tiers_and_serves(application: Application) -> None:
    status = application.status()
    assert status.ready, status.not_ready_reason
    shard_nodes, worker_nodes = {s.node for s in status.shards}, {w.node for w in status.workers}
    assert (len(status.shards), len(shard_nodes), len(worker_nodes)) == (2, 1, 1)
    assert len(shard_nodes | worker_nodes | {status.controller.node}) == 3
    with application.channel() as channel:
        request = GenerateRequest(text=PROMPT, max_tokens=24, ignore_eos=True)
        text = InferenceStub(channel).GenerateOnce(request, timeout=60).outputs[0].text
    body = {"model": POCKET.name, "prompt": PROMPT, "max_tokens": 24, "temperature": 0, "ignore_eos": True}
    answer = httpx2.post(f"{application.http_url}/v1/completions", json=body, timeout=60)
    assert text
    assert json.loads(answer.text)["choices"][0]["text"] == text


def pending_labels(address: str, env: dict[str, str]) -> list[dict[str, list[str]]]:
    """Return the labels that pending placement groups ask for, as Ray's autoscaler is told of them."""
    program = (
        "import json, sys\n"
        "from ray._raylet import GcsClient\n"
        "from ray.autoscaler.v2.sdk import get_cluster_resource_state\n"
        "state = get_cluster_resource_state(GcsClient(address=sys.argv[1]))\n"
        "gangs = state.pending_gang_resource_requests\n"
        "requests = [r for g in gangs for r in g.requests]\n"
        "requests += [r for g in gangs for s in g.bundle_selectors for r in s.resource_requests]\n"
        "wanted = [[c for s in r.label_selectors for c in s.label_constraints] for r in requests]\n"
        "print(json.dumps([{c.label_key: list(c.label_values) for c in constraints} for constraints in wanted]))\n"
    )
    command = [sys.executable, "-c", program, address]
    done = subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, timeout=60, check=True)
    found: list[dict[str, list[str]]] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_a_shard_without_room_asks_for_a_node_of_its_tier_and_takes_it(application: Application) -> None:
    cluster, before = application.cluster, application.status()
    with application.channel() as channel:
        AdminStub(channel).Scale(ScaleRequest(shards=3), timeout=20)
    deadline_s = time.monotonic() + START_S
    while {TIER: ["experts"]} not in pending_labels(cluster.address, cluster.env):
        assert time.monotonic() < deadline_s
    # A node of another tier is not what it waits for.
    cluster.start(2, labels={TIER: "attention"})
    assert {TIER: ["experts"]} in pending_labels(cluster.address, cluster.env)
    cluster.start(1, labels={TIER: "experts", DOMAIN: "host-b"})
    while [shard.state for shard in application.status().shards] != ["ready"] * 3:
        assert time.monotonic() < deadline_s, application.log.read_text()
        time.sleep(0.2)
    nodes = {shard.id: shard.node for shard in application.status().shards}
    assert nodes["shard-2"] not in {shard.node for shard in before.shards}
    assert nodes["shard-2"] not in {worker.node for worker in before.workers}


def test_a_node_that_leaves_lets_the_streams_of_its_gateway_end_first(application: Application) -> None:
    """The last test of this application: its gateway has no other node to go to."""
    began = threading.Event()
    finished: dict[int, int] = {}

    def stream() -> None:
        with application.channel() as channel:
            request = GenerateRequest(text=PROMPT, max_tokens=LONG, n=SAMPLES, ignore_eos=True)
            for message in InferenceStub(channel).Generate(request, timeout=DRAIN_S):
                began.set()
                if message.finish_reason:
                    finished[message.index] = message.usage.completion_tokens

    thread = threading.Thread(target=stream)
    thread.start()
    assert began.wait(60)
    port = application.grpc_address.rpartition(":")[2]
    options = ["--address", application.cluster.address, "--node-ip", GATEWAY_HOST, "--grpc-port", port]
    left = subprocess.run(
        [*CLI, "leave", *options, "--grace-s", str(DRAIN_S + 5)],
        env={**os.environ, **application.cluster.env},
        capture_output=True,
        text=True,
        timeout=DRAIN_S + 60,
        check=False,
    )
    assert left.returncode == 0, left.stderr
    thread.join(20)
    assert not thread.is_alive(), "the node might be killed now, and its gateway has streams"
    assert finished == dict.fromkeys(range(SAMPLES), LONG)
    assert not application.is_serving()
