"""Runs the pods of a RayCluster on this machine: each is a raylet at a loopback address of its own.

What a pod's container would run is run, with its environment; changed are addresses, ports and paths alone.
"""

import base64
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from pathlib import Path

import psutil

from tests.kube.cluster import FakeKubernetes
from tests.kube.kubelet import LOOPBACK, ExecStreams, StartError
from tests.kube.ray_pods import TYPE
from tests.kube.resources import Resource
from tests.kube.status import Manifest

SECRETS = Resource("", "v1", "Secret", "secrets")
_START_S = 120.0
_OBJECT_STORE_BYTES = 80 << 20
# Options of `ray start` whose ports would meet those of other pods, or whose addresses are the pod network's.
_DROPPED = re.compile(r"--(address|dashboard-host|no-redirect-output|[a-z-]*port)(=|$)")


class RayKubelet:
    """Runs pods. One at a time may be the head of a cluster; `ray` and `expertmesh` are those of this interpreter."""

    def __init__(self) -> None:
        # Short: Ray's sockets lie in it.
        self.home = Path(tempfile.mkdtemp(prefix="kube-"))
        self.kube: FakeKubernetes | None = None
        self.address = ""
        self._head_is_there = threading.Event()
        self._starting = threading.Lock()  # nodes of one host take names in one folder, one after the other
        self._numbers = count(1)
        self._ips: dict[str, str] = {}
        self._node_ids: dict[str, str] = {}
        self._main: dict[str, subprocess.Popen[bytes]] = {}
        self._beside: dict[str, subprocess.Popen[bytes]] = {}

    def close(self) -> None:
        shutil.rmtree(self.home, ignore_errors=True)

    # As tests.kube.kubelet.Kubelet wants it.

    def start(self, pod: Manifest, exited: Callable[[int], None]) -> str:
        name, container = pod["metadata"]["name"], pod["spec"]["containers"][0]
        is_head = pod["metadata"]["labels"][TYPE] == "head"
        if is_head:
            self.address = f"{LOOPBACK}:{_free_port()}"
            ip = LOOPBACK
        else:
            # As the init container does that KubeRay puts in.
            if not self._head_is_there.wait(_START_S):
                raise StartError("CrashLoopBackOff", "the head is not there")
            ip = f"127.0.1.{next(self._numbers)}"
        self._ips[name] = ip
        log = self.home / f"{name}.log"
        with self._starting:
            self._main[name] = _spawn(self._ray_start(container, ip, is_head), self.environment(pod, container), log)
            self._node_ids[name] = _await_node(self._main[name], log)
        if is_head:
            for other in pod["spec"]["containers"][1:]:
                assert other["name"] == "autoscaler"
                log = self.home / "autoscaler.log"
                self._beside[name] = _spawn(self._autoscaler(pod), self.environment(pod, other), log)
            self._head_is_there.set()
        waiting = threading.Thread(target=lambda: exited(self._main[name].wait()), daemon=True)
        waiting.start()
        return ip

    def stop(self, pod: Manifest, grace_s: float) -> None:
        name, container = pod["metadata"]["name"], pod["spec"]["containers"][0]
        deadline_s = time.monotonic() + grace_s
        trees = [p for p in (self._main.get(name), self._beside.get(name)) if p is not None]
        if grace_s and self._main[name].poll() is None:
            hook = container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command")
            with suppress(subprocess.TimeoutExpired):
                if hook:
                    env, log = self.environment(pod, container), self.home / f"{name}-pre-stop.log"
                    _spawn(hook, env, log).wait(max(0.0, deadline_s - time.monotonic()))
                self._main[name].send_signal(signal.SIGTERM)
                self._main[name].wait(max(0.0, deadline_s - time.monotonic()))
        for process in trees:
            kill_tree(process.pid)
            process.wait()

    def exec(self, pod: Manifest, container: str, command: list[str], streams: ExecStreams) -> int:
        inside = next(c for c in pod["spec"]["containers"] if c["name"] == container)
        sent = b"".join(iter(streams.stdin.get, b""))
        done = subprocess.run(command, env=self.environment(pod, inside), input=sent, capture_output=True, check=False)
        streams.write_stdout(done.stdout)
        streams.write_stderr(done.stderr)
        return done.returncode

    def logs(self, pod: Manifest, container: str) -> str:
        name = "autoscaler" if container == "autoscaler" else pod["metadata"]["name"]
        return (self.home / f"{name}.log").read_text()

    # For tests.

    def pid(self, name: str) -> int:
        """Return the process of a pod's first container; all else of the container is below it."""
        return self._main[name].pid

    def ip(self, name: str) -> str:
        return self._ips[name]

    def node_id(self, name: str) -> str:
        """Return the id of a pod's node, as Ray knows it or knew it."""
        return self._node_ids[name]

    def environment(self, pod: Manifest, container: Manifest) -> dict[str, str]:
        """Return what a container's processes find, and what paths and ports here need beside it."""
        env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        cache = env.get("XDG_CACHE_HOME", str(Path.home() / ".cache"))
        own: dict[str, str] = {}
        for variable in container.get("env", []):
            value = self._value(pod, variable)
            own[variable["name"]] = re.sub(r"\$\((\w+)\)", lambda match: own[match[1]], value)
        binaries = str(Path(sys.executable).parent)
        here = {"HOME": str(self.home), "XDG_CACHE_HOME": cache, "PATH": f"{binaries}:{env.get('PATH', '')}"}
        return {**env, **own, **here, "RAY_ADDRESS": self.address}

    def _value(self, pod: Manifest, variable: Manifest) -> str:
        if "valueFrom" not in variable:
            return str(variable.get("value", ""))
        source = variable["valueFrom"]
        if "secretKeyRef" in source:
            assert self.kube is not None
            reference = source["secretKeyRef"]
            secret = self.kube.store.get(SECRETS, pod["metadata"]["namespace"], reference["name"])
            return base64.b64decode(secret["data"][reference["key"]]).decode()
        path = source["fieldRef"]["fieldPath"]
        if match := re.fullmatch(r"metadata\.labels\['(.+)'\]", path):
            return str(pod["metadata"]["labels"][match[1]])
        if path == "status.podIP":
            return self._ips[pod["metadata"]["name"]]
        found = pod
        for step in path.split("."):
            found = found[step]
        return str(found)

    def _ray_start(self, container: Manifest, ip: str, is_head: bool) -> list[str]:
        """Return the command of a container, for this machine."""
        words = shlex.split(container["args"][0].partition("ray start")[2])
        kept = [word for word in words if not _DROPPED.match(word)]
        kept += [f"--{name}=0" for name in ("min-worker-port", "max-worker-port", "dashboard-agent-listen-port")]
        kept += [f"--node-ip-address={ip}", f"--object-store-memory={_OBJECT_STORE_BYTES}"]
        if is_head:
            port = self.address.partition(":")[2]
            kept += [f"--port={port}", "--include-dashboard=false", f"--ray-client-server-port={_free_port()}"]
            kept += [f"--temp-dir={self.home / 'ray'}"]
        else:
            kept += [f"--address={self.address}"]
        return [sys.executable, "-m", "ray.scripts.scripts", "start", *kept]

    def _autoscaler(self, pod: Manifest) -> list[str]:
        """Return the command of the container `autoscaler`, which asks the API by the certificate of its account."""
        assert self.kube is not None
        namespace, labels = pod["metadata"]["namespace"], pod["metadata"]["labels"]
        account = f"system:serviceaccount:{namespace}:{pod['spec']['serviceAccountName']}"
        cert_file, key_file = self.kube.certificate(account)
        given = {
            "KUBERNETES_SERVICE_HOST": LOOPBACK,
            "KUBERNETES_SERVICE_PORT_HTTPS": str(self.kube.port),
            "RAY_KUBERAY_CLIENT_CERT_PATH": str(cert_file),
            "RAY_KUBERAY_CLIENT_KEY_PATH": str(key_file),
            "RAY_KUBERAY_CA_CERT_PATH": str(self.kube.ca_file),
            "AUTOSCALER_METRIC_PORT": str(_free_port()),
        }
        command = ["ray", "kuberay-autoscaler", "--cluster-name", labels["ray.io/cluster"]]
        command += ["--cluster-namespace", namespace, "--gcs-address", self.address]
        return ["env", *(f"{name}={value}" for name, value in given.items()), *command]


def kill_tree(pid: int) -> None:
    """Kill a process and all below it; those that are gone already are no matter."""
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for one in [process, *process.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                one.kill()


def _spawn(command: list[str], env: dict[str, str], log: Path) -> "subprocess.Popen[bytes]":
    with log.open("wb") as output:
        return subprocess.Popen(command, env=env, stdout=output, stderr=output)


def _await_node(process: "subprocess.Popen[bytes]", log: Path) -> str:
    """Wait until a node is there, and return its id."""
    deadline_s = time.monotonic() + _START_S
    while True:
        if process.poll() is not None:
            raise StartError("CrashLoopBackOff", log.read_text())
        if "--block" in log.read_text():  # it waits now
            for child in psutil.Process(process.pid).children(recursive=True):
                with suppress(psutil.Error):
                    ids = [word.partition("=")[2] for word in child.cmdline() if word.startswith("--node_id=")]
                    if ids:
                        return ids[0]
        assert time.monotonic() < deadline_s, log.read_text()
        time.sleep(0.05)


def _free_port() -> int:
    with socket.create_server((LOOPBACK, 0)) as listener:
        port: int = listener.getsockname()[1]
    return port
