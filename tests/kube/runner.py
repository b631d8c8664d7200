"""Puts pods on nodes and has the kubelet run them, each by a thread of its own; their states are its to write."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count

from tests.kube.events import record
from tests.kube.kubelet import Kubelet, StartError
from tests.kube.resources import NODES, PODS
from tests.kube.selectors import by_labels
from tests.kube.status import ApiError, Manifest
from tests.kube.store import Store, now

UNSCHEDULABLE = "Unschedulable"


@dataclass
class _Run:
    """The life of one pod. exit_code: of a container that ended by itself."""

    thread: threading.Thread | None = None
    wake: threading.Event = field(default_factory=threading.Event)
    exit_code: int | None = None


class PodRunner:
    """Runs all pods of a store."""

    def __init__(self, store: Store, kubelet: Kubelet, nodes: tuple[str, ...]) -> None:
        self.kubelet = kubelet
        self._store = store
        self._nodes = nodes
        self._turn = count()
        self._failures: dict[str, StartError] = {}
        self._runs: dict[str, _Run] = {}  # by uid
        self._closing = threading.Event()
        self._follower = threading.Thread(target=self._follow, name="pod-runner")
        for name in nodes:
            status = {"conditions": [{"type": "Ready", "status": "True"}]}
            store.create(NODES, "", {"metadata": {"name": name}, "status": status})

    def start(self) -> None:
        self._follower.start()

    def fail(self, selector: str, reason: str, message: str) -> None:
        """Let pods with these labels not start: ImagePullBackOff or another reason of a container, or Unschedulable."""
        by_labels(selector)
        self._failures[selector] = StartError(reason, message)

    def heal(self) -> None:
        """Let all pods start, those too that could not."""
        self._failures.clear()
        for run in list(self._runs.values()):
            run.wake.set()

    def running_pod(self, namespace: str, name: str) -> Manifest:
        """Return a pod that commands can be run in.

        Raises:
            ApiError: for one that does not run.
        """
        pod = self._store.get(PODS, namespace, name)
        if pod["status"].get("phase") != "Running":
            raise ApiError(400, f"container {pod['spec']['containers'][0]['name']} in pod {name} is not running")
        return pod

    def close(self) -> None:
        """End all pods at once."""
        self._closing.set()
        for run in list(self._runs.values()):
            run.wake.set()
        self._follower.join()
        for run in list(self._runs.values()):
            assert run.thread is not None
            run.thread.join()

    def _follow(self) -> None:
        version = -1
        while not self._closing.is_set():
            if not self._store.wait(version, 0.1):
                continue
            version = self._store.version
            pods = {pod["metadata"]["uid"]: pod for pod in self._store.all(PODS)}
            for uid, pod in pods.items():
                if uid not in self._runs and "deletionTimestamp" not in pod["metadata"]:
                    run = self._runs[uid] = _Run()
                    run.thread = threading.Thread(target=self._live, args=(pod, run), name=pod["metadata"]["name"])
                    run.thread.start()
            for uid, run in self._runs.items():
                if uid not in pods or "deletionTimestamp" in pods[uid]["metadata"]:
                    run.wake.set()

    def _live(self, pod: Manifest, run: _Run) -> None:
        namespace, name, uid = (pod["metadata"][key] for key in ("namespace", "name", "uid"))

        def exited(code: int) -> None:
            run.exit_code = code
            run.wake.set()

        started = False
        while True:
            found = self._present(pod)
            ending = self._closing.is_set() or found is None or "deletionTimestamp" in found["metadata"]
            if ending:
                break
            if not started:
                started = self._try_start(pod, exited)
            elif run.exit_code is not None:
                self._set_ended(pod, run.exit_code)
                run.exit_code = None
                # Restarting is not played: KubeRay's pods with autoscaler v2 have restartPolicy Never.
            run.wake.wait()
            run.wake.clear()
        if started:
            grace_s = 0 if found is None or self._closing.is_set() else found["metadata"]["deletionGracePeriodSeconds"]
            self.kubelet.stop(found or pod, grace_s)
        self._store.remove(PODS, namespace, name, uid)

    def _present(self, pod: Manifest) -> Manifest | None:
        try:
            found = self._store.get(PODS, pod["metadata"]["namespace"], pod["metadata"]["name"])
        except ApiError:
            return None
        return found if found["metadata"]["uid"] == pod["metadata"]["uid"] else None

    def _try_start(self, pod: Manifest, exited: Callable[[int], None]) -> bool:
        labels = pod["metadata"].get("labels", {})
        failure = next((f for s, f in self._failures.items() if by_labels(s)({"metadata": {"labels": labels}})), None)
        if failure is not None and failure.reason == UNSCHEDULABLE:
            self._set_unschedulable(pod, failure.message)
            return False
        node = self._next_node()
        if node is None:
            self._set_unschedulable(pod, f"0/{len(self._nodes)} nodes are available: all were unschedulable.")
            return False
        placed = self._change(pod, lambda found: {**found, "spec": {**found["spec"], "nodeName": node}})
        if placed is None:
            return False
        try:
            if failure is not None:
                raise failure
            ip = self.kubelet.start(placed, exited)
        except StartError as error:
            if error.reason == UNSCHEDULABLE:
                self._set_unschedulable(pod, error.message)
            else:
                self._set_waiting(pod, error)
            return False
        self._set_running(pod, ip)
        return True

    def _next_node(self) -> str | None:
        """Return the next node in turn of those that are not cordoned."""
        cordoned = {n["metadata"]["name"] for n in self._store.all(NODES) if n.get("spec", {}).get("unschedulable")}
        for _ in self._nodes:
            name = self._nodes[next(self._turn) % len(self._nodes)]
            if name not in cordoned:
                return name
        return None

    def _set_running(self, pod: Manifest, ip: str) -> None:
        state = {"running": {"startedAt": now()}}
        ready = [
            {"type": kind, "status": "True"} for kind in ("PodScheduled", "Initialized", "ContainersReady", "Ready")
        ]
        status = {"phase": "Running", "podIP": ip, "podIPs": [{"ip": ip}], "hostIP": ip, "startTime": now()}
        self._set_status(pod, {**status, "conditions": ready, "containerStatuses": _containers(pod, state, ready=True)})

    def _set_ended(self, pod: Manifest, code: int) -> None:
        state = {"terminated": {"exitCode": code, "reason": "Completed" if code == 0 else "Error", "finishedAt": now()}}
        status = {"phase": "Failed" if code else "Succeeded", "conditions": [{"type": "Ready", "status": "False"}]}
        self._set_status(pod, {**status, "containerStatuses": _containers(pod, state, ready=False)})

    def _set_waiting(self, pod: Manifest, error: StartError) -> None:
        state = {"waiting": {"reason": error.reason, "message": error.message}}
        conditions = [{"type": "PodScheduled", "status": "True"}, {"type": "Ready", "status": "False"}]
        containers = _containers(pod, state, ready=False)
        self._set_status(pod, {"phase": "Pending", "conditions": conditions, "containerStatuses": containers})
        record(self._store, PODS, pod, "Warning", "Failed", error.message)

    def _set_unschedulable(self, pod: Manifest, message: str) -> None:
        condition = {"type": "PodScheduled", "status": "False", "reason": UNSCHEDULABLE, "message": message}
        self._set_status(pod, {"phase": "Pending", "conditions": [condition], "containerStatuses": []})
        record(self._store, PODS, pod, "Warning", "FailedScheduling", message)

    def _set_status(self, pod: Manifest, status: Manifest) -> None:
        self._change(pod, lambda found: {**found, "status": status})

    def _change(self, pod: Manifest, change: Callable[[Manifest], Manifest]) -> Manifest | None:
        """Change a pod, if it is still there."""
        with self._store.locked():
            if self._present(pod) is None:
                return None
            return self._store.update(PODS, pod["metadata"]["namespace"], pod["metadata"]["name"], change)


def _containers(pod: Manifest, state: Manifest, *, ready: bool) -> list[Manifest]:
    """Return the containers' statuses, all in the same state."""
    return [
        {"name": c["name"], "image": c["image"], "ready": ready, "started": ready, "restartCount": 0, "state": state}
        for c in pod["spec"]["containers"]
    ]
