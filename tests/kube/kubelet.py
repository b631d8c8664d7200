"""What runs pods: the protocol that tests give, and a plain one that only says that they run."""

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from tests.kube.status import Manifest

LOOPBACK = "127.0.0.1"


@dataclass
class ExecStreams:
    """The ends of a command that is run in a pod. The writers may be called by any thread."""

    write_stdout: Callable[[bytes], None]
    write_stderr: Callable[[bytes], None]
    stdin: "queue.SimpleQueue[bytes]" = field(default_factory=queue.SimpleQueue)
    """What comes in; b"" is its end. Without stdin it has ended at once."""
    sizes: "queue.SimpleQueue[tuple[int, int]]" = field(default_factory=queue.SimpleQueue)
    """Columns and rows of the terminal, each time they change."""


class StartError(Exception):
    """A pod cannot run. reason is a waiting container's (ImagePullBackOff), or Unschedulable."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message


class Kubelet(Protocol):
    """Runs pods. Methods are called by a thread of each pod, and may block."""

    def start(self, pod: Manifest, exited: Callable[[int], None]) -> str:
        """Start a pod and return its IP; call `exited` with its code if it ends by itself. May raise StartError."""

    def stop(self, pod: Manifest, grace_s: float) -> None:
        """End a pod: preStop, SIGTERM, and SIGKILL when grace_s are over. Returns when nothing of it is left."""

    def exec(self, pod: Manifest, container: str, command: list[str], streams: ExecStreams) -> int:
        """Run a command in a pod and return its exit code."""

    def logs(self, pod: Manifest, container: str) -> str:
        """Return what a container has written."""


@dataclass
class PlainKubelet:
    """Says that pods run. It remembers what it was told, runs nothing, and answers commands by `answers`."""

    answers: Callable[[list[str], ExecStreams], int] = lambda command, streams: 0
    events: list[tuple[str, str]] = field(default_factory=list)
    """(start or stop, name of the pod)"""
    _exits: dict[str, Callable[[int], None]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def start(self, pod: Manifest, exited: Callable[[int], None]) -> str:
        with self._lock:
            self.events.append(("start", pod["metadata"]["name"]))
            self._exits[pod["metadata"]["name"]] = exited
        return LOOPBACK

    def stop(self, pod: Manifest, grace_s: float) -> None:
        with self._lock:
            self.events.append(("stop", pod["metadata"]["name"]))

    def exec(self, pod: Manifest, container: str, command: list[str], streams: ExecStreams) -> int:
        return self.answers(command, streams)

    def logs(self, pod: Manifest, container: str) -> str:
        return f"{container} of {pod['metadata']['name']}\n"

    def end(self, name: str, code: int) -> None:
        """Let a pod end by itself."""
        self._exits[name](code)
