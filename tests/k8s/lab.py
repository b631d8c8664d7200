"""A fake cluster with KubeRay, manifests and a file for `ray up`; its pods' commands run on this machine."""

import contextlib
import copy
import os
import queue
import re
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests.kube.cluster import FakeKubernetes
from tests.kube.kubelet import ExecStreams, PlainKubelet
from tests.kube.operator import RAY_CLUSTERS
from tests.kube.rays import ray_cluster
from tests.kube.resources import PODS
from tests.kube.status import Manifest

NAMESPACE = "ml"
NAME = "mesh"
APPLICATION = "applications: [{name: mesh, import_path: a.b:build}]\n"
# What `ray up` reads without asking whether it is there, and this provider has no use for.
EMPTY: dict[str, Any] = {
    "initialization_commands": [],
    "setup_commands": [],
    "head_setup_commands": [],
    "worker_setup_commands": [],
    "worker_start_ray_commands": [],
    "cluster_synced_files": [],
    "rsync_exclude": [],
    "rsync_filter": [],
    "file_mounts": {},
    "file_mounts_sync_continuously": False,
    "auth": {},
    "max_workers": 0,
}


@dataclass
class Head:
    """The commands of a head's pod: `serve` is played, all others run here, with a home of their own."""

    home: Path
    states: dict[str, str] = field(default_factory=lambda: {"mesh": "RUNNING"})
    message: str = ""
    deployed: list[str] = field(default_factory=list)
    """What `serve deploy` was given, each time."""
    refusals: list[str] = field(default_factory=list)
    """What the next times of `serve deploy` fail with."""
    silence: str = ""
    """What `serve status` fails with."""
    scripts: list[str] = field(default_factory=list)

    def __call__(self, command: list[str], streams: ExecStreams) -> int:
        script = command[-1]
        self.scripts.append(script)
        if "serve deploy" in script:
            text = _read(streams.stdin).decode()
            if self.refusals:
                streams.write_stderr(f"Traceback\n{self.refusals.pop(0)}\n".encode())
                return 1
            self.deployed.append(text)
            return 0
        if "serve status" in script and self.silence:
            streams.write_stderr(f"{self.silence}\n".encode())
            return 1
        if "serve status" in script:
            found = {name: {"status": state, "message": self.message} for name, state in self.states.items()}
            streams.write_stdout(yaml.safe_dump({"proxies": {}, "applications": found}).encode())
            return 0
        return self._run(command, streams)

    def _run(self, command: list[str], streams: ExecStreams) -> int:
        env = {"PATH": os.environ["PATH"], "HOME": str(self.home)}
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, env=env, cwd=self.home)
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        feeder = threading.Thread(target=_feed, args=(streams.stdin, process.stdin), daemon=True)
        feeder.start()
        errors = threading.Thread(target=_pass_on, args=(process.stderr, streams.write_stderr))
        errors.start()
        _pass_on(process.stdout, streams.write_stdout)
        errors.join()
        process.stdout.close()
        process.stderr.close()
        return process.wait()


def _read(stdin: "queue.SimpleQueue[bytes]") -> bytes:
    return b"".join(iter(stdin.get, b""))


def _feed(stdin: "queue.SimpleQueue[bytes]", pipe: Any) -> None:
    with contextlib.suppress(BrokenPipeError), pipe:  # the command may end before it has read all
        for data in iter(stdin.get, b""):
            pipe.write(data)
            pipe.flush()


def _pass_on(pipe: Any, write: Any) -> None:
    for data in iter(lambda: pipe.read1(65536), b""):
        write(data)


@dataclass
class EndingKubelet(PlainKubelet):
    """Has pods whose names begin so end with code 1 a moment after they have begun."""

    ending: str = "nobody"

    def start(self, pod: Manifest, exited: Callable[[int], None]) -> str:
        if pod["metadata"]["name"].startswith(self.ending):
            time.sleep(0.3)  # others are made at once, thousands if nothing held them up
            exited(1)
        return super().start(pod, exited)


@dataclass
class Lab:
    """A cluster, what is to be applied to it, and the file that says so."""

    kube: FakeKubernetes
    kubelet: "EndingKubelet"
    head: Head
    folder: Path
    kubectl: str
    config: Path

    def __post_init__(self) -> None:
        self.manifests = self.folder / "manifests"
        self.manifests.mkdir()
        (self.manifests / "application.yaml").write_text(APPLICATION)
        self.kube.add_namespace(NAMESPACE)
        self.objects = beside()
        self.ray = with_gateway(ray_cluster(NAME))
        self.write()
        self.write_file()

    @property
    def file(self) -> Path:
        return self.folder / "up.yaml"

    def write(self) -> None:
        """Write the manifests as they are now."""
        names = []
        for number, manifest in enumerate([*self.objects, self.ray]):
            names.append(f"{number}.yaml")
            (self.manifests / names[-1]).write_text(yaml.safe_dump(manifest))
        (self.manifests / "kustomization.yaml").write_text(yaml.safe_dump({"resources": names}))

    def write_file(self, **provider: object) -> None:
        """Write the file for `ray up`, with other settings of the provider than usual."""
        usual = {
            "type": "external",
            "module": "expertmesh.actors.kubernetes.provider.KubernetesProvider",
            "namespace": NAMESPACE,
            "kubeconfig": str(self.config),
            "kubectl": self.kubectl,
            "manifests": "manifests",
            "timeout_s": 60,
            "patience_s": 0.3,
            "poll_s": 0.1,
        }
        table = {
            **EMPTY,
            "cluster_name": NAME,
            "provider": {**usual, **provider},
            "head_node_type": "headgroup",
            "available_node_types": {"headgroup": {"resources": {}, "node_config": {}}},
            "head_start_ray_commands": ["ray start --head --autoscaling-config=~/ray_bootstrap_config.yaml"],
        }
        self.file.write_text(yaml.safe_dump(table))

    def cluster(self) -> Manifest:
        """Return the live RayCluster."""
        return self.kube.store.get(RAY_CLUSTERS, NAMESPACE, NAME)

    def group(self) -> Manifest:
        """Return the live group of experts."""
        groups = {found["groupName"]: found for found in self.cluster()["spec"]["workerGroupSpecs"]}
        found: Manifest = groups["experts"]
        return found

    def scale(self, replicas: int) -> None:
        """Change what the autoscaler changes, and nothing else."""

        def change(found: Manifest) -> Manifest:
            for group in found["spec"]["workerGroupSpecs"]:
                if group["groupName"] == "experts":
                    group |= {"replicas": replicas, "scaleStrategy": {"workersToDelete": ["mesh-gone"]}}
            return found

        self.kube.store.update(RAY_CLUSTERS, NAMESPACE, NAME, change)

    def pods(self) -> list[str]:
        return [pod["metadata"]["name"] for pod in self.kube.store.all(PODS, NAMESPACE)]

    def phases(self) -> list[str]:
        """Return the phases of the pods, by the alphabet; of a pod that nobody has looked at yet, none."""
        return sorted(pod["status"].get("phase", "none") for pod in self.kube.store.all(PODS, NAMESPACE))

    def looks(self) -> int:
        """Return how often somebody asked for pods."""
        return sum((found.verb, found.resource) == ("list", "pods") for found in list(self.kube.faults.log))

    def writes(self) -> list[str]:
        """Return what was asked of the server that changes it, in order, without what was refused."""
        verbs = ("create", "update", "patch", "delete", "deletecollection")
        log = [found for found in self.kube.faults.log if found.verb in verbs and found.code < 400]
        return [f"{found.verb} {found.resource}/{found.name}" for found in log]


def with_gateway(ray: Manifest) -> Manifest:
    """Put a second group before that of the experts."""
    (experts,) = ray["spec"]["workerGroupSpecs"]
    gateway = {**copy.deepcopy(experts), "groupName": "gateway", "replicas": 1, "labels": {"tier": "gateway"}}
    return {**ray, "spec": {**ray["spec"], "workerGroupSpecs": [gateway, experts]}}


def beside() -> list[Manifest]:
    """Return what a Ray cluster needs beside it."""
    ports = [{"name": "grpc", "port": 50051, "appProtocol": "kubernetes.io/h2c"}]
    return [
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "settings"}, "data": {"a.toml": "shards = 2"}},
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "mesh"}},
        {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "mesh-grpc"}, "spec": {"ports": ports}},
    ]


def one_line(text: str) -> str:
    """Return the line of the error in what a command wrote on stderr; there is only one."""
    (line,) = re.findall(r"^error: (.*)$", text, re.MULTILINE)
    return str(line)
