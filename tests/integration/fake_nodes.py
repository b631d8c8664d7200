"""A Ray cluster on loopback whose own autoscaler brings and ends nodes: raylets of this machine that Ray calls fake."""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

HEAD_ID = "f" * 51 + "00000"
_START_S = 60.0
# Ray's autoscaler wants each of these to be there.
_EMPTY_LISTS = (
    "cluster_synced_files", "rsync_exclude", "rsync_filter", "initialization_commands", "setup_commands",
    "head_setup_commands", "worker_setup_commands", "head_start_ray_commands", "worker_start_ray_commands",
)  # fmt: skip


@dataclass
class Cluster:
    """A running cluster. env is what whoever joins it must have in the environment."""

    address: str
    env: dict[str, str]
    head: subprocess.Popen[bytes]
    home: Path

    def lines_of(self, pid: int) -> list[str]:
        """Return what an actor has logged."""
        logs = (self.home / "session_latest" / "logs").glob(f"*-{pid}.err")
        return [line for log in logs for line in log.read_text().splitlines()]

    def raylets(self) -> dict[str, psutil.Process]:
        """Return the nodes' processes by node id."""
        found = {}
        for process in psutil.Process(self.head.pid).children(recursive=True):
            try:
                ids = [word.partition("=")[2] for word in process.cmdline() if word.startswith("--node_id=")]
            except psutil.Error:
                continue  # it has just ended
            if ids and "raylet" in Path(process.exe()).name:
                found[ids[0]] = process
        return found

    def placement_groups(self) -> list[tuple[str, str]]:
        """Return name and state of those that are not removed."""
        program = (
            "import json, sys, ray\n"
            "from ray.util.placement_group import placement_group_table\n"
            "ray.init(address=sys.argv[1], log_to_driver=False, logging_level='ERROR')\n"
            "groups = placement_group_table().values()\n"
            "print(json.dumps([(g['name'], g['state']) for g in groups if g['state'] != 'REMOVED']))\n"
        )
        command = [sys.executable, "-c", program, self.address]
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=60, check=True)
        return [(name, state) for name, state in json.loads(done.stdout.splitlines()[-1])]


@contextmanager
def autoscaling_cluster(*, head_cpus: int, node_cpus: int, max_nodes: int) -> Iterator[Cluster]:
    """Run a cluster of a head and up to max_nodes more, brought when they are needed and ended when idle for 3 s."""
    port = _free_port()
    home = Path(tempfile.mkdtemp(prefix="nodes-"))  # a short path, as the sockets' names are limited
    config = home / "cluster.json"
    config.write_text(json.dumps(_config(port, head_cpus, node_cpus, max_nodes)))
    env = {
        **os.environ,
        "HOME": str(home),
        "RAY_FAKE_CLUSTER": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
        # All nodes on loopback: by this name Ray keeps to it, whatever the system.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    options = {
        "node-ip-address": "127.0.0.1",
        "port": port,
        "num-cpus": head_cpus,
        "object-store-memory": 100 << 20,
        "temp-dir": home,
        "include-dashboard": "false",
        "ray-client-server-port": _free_port(),
        "dashboard-agent-listen-port": 0,
        "autoscaling-config": config,
    }
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"]
    command += [f"--{name}={value}" for name, value in options.items()]
    log = home / "cluster.log"
    with log.open("wb") as output:
        head = subprocess.Popen(command, env=env, stdout=output, stderr=output)
    try:
        _await_start(head, log)
        joining = {name: value for name, value in env.items() if name != "RAY_OVERRIDE_NODE_ID_FOR_TESTING"}
        yield Cluster(f"127.0.0.1:{port}", joining, head, home)
    finally:
        _end(head)
        shutil.rmtree(home, ignore_errors=True)


def _config(port: int, head_cpus: int, node_cpus: int, max_nodes: int) -> dict[str, Any]:
    module = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
    node = {"CPU": node_cpus, "object_store_memory": 80 << 20}
    return {
        "cluster_name": "fake",
        "max_workers": max_nodes,
        "idle_timeout_minutes": 0.05,
        "upscaling_speed": 10,
        "provider": {
            "type": "external",
            "module": module,
            "gcs_address": f"127.0.0.1:{port}",
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": head_cpus}, "node_config": {}, "max_workers": 0},
            "more": {"resources": node, "node_config": {}, "min_workers": 0, "max_workers": max_nodes},
        },
        "head_node_type": "ray.head.default",
        "auth": {},
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
        **{name: [] for name in _EMPTY_LISTS},
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _await_start(head: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline_s = time.monotonic() + _START_S
    while "Ray runtime started" not in log.read_text():
        assert head.poll() is None and time.monotonic() < deadline_s, log.read_text()  # noqa: PT018
        time.sleep(0.2)


def _end(head: "subprocess.Popen[bytes]") -> None:
    """End the head and whatever it started, by process id. Ray's own way takes half a minute."""
    tree = psutil.Process(head.pid).children(recursive=True) if head.poll() is None else []
    head.kill()
    head.wait()
    for survivor in tree:
        with suppress(psutil.NoSuchProcess):
            survivor.kill()
