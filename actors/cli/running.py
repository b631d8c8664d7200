"""Which servers run on this machine: a small file for each, so that `stop` finds them."""

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil


class RunningServer(NamedTuple):
    """A `serve` process of this user."""

    pid: int
    grpc_address: str
    model: str


def state_home() -> Path:
    """Return the folder for logs and records of running servers, made if it is not there."""
    root = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    folder = Path(root) / "expertmesh"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder


def new_log_file() -> Path:
    """Return a path for the log of a server in the background."""
    return state_home() / f"serve-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"


@contextlib.contextmanager
def registered(grpc_address: str, model: Path) -> Iterator[None]:
    """Let `stop` find this process while the context lasts."""
    path = state_home() / f"running-{os.getpid()}.json"
    path.write_text(json.dumps({"pid": os.getpid(), "grpc_address": grpc_address, "model": str(model)}))
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def find_running() -> list[RunningServer]:
    """Return the servers of this user that are alive; records of dead ones are removed."""
    found: list[RunningServer] = []
    for path in sorted(state_home().glob("running-*.json")):
        record = RunningServer(**json.loads(path.read_text()))
        if psutil.pid_exists(record.pid):
            found.append(record)
        else:
            path.unlink(missing_ok=True)
    return found
