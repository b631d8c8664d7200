"""Which servers run on this machine: a small file for each, so that `stop` finds them."""

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil

from expertmesh.cluster.errors import StateError


class RunningServer(NamedTuple):
    """A `serve` process of this user. started_s tells it from a later process of the same pid (seconds, as psutil has it)."""

    pid: int
    started_s: float
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
    pid = os.getpid()
    record = RunningServer(pid, psutil.Process(pid).create_time(), grpc_address, str(model))
    path = state_home() / f"running-{pid}.json"
    unfinished = path.with_suffix(".new")
    unfinished.write_text(json.dumps(record._asdict()))
    unfinished.replace(path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def find_running() -> list[RunningServer]:
    """Return the servers of this user that are alive; records of dead ones are removed.

    Raises:
        StateError: a record is damaged; the message names its file.
    """
    found: list[RunningServer] = []
    for path in sorted(state_home().glob("running-*.json")):
        try:
            record = RunningServer(**json.loads(path.read_text()))
        except FileNotFoundError:
            continue  # its server ended a moment ago
        except (ValueError, TypeError) as error:
            raise StateError(f"{path}: not the record of a server ({error}); remove it") from error
        if _is_alive(record):
            found.append(record)
        else:
            path.unlink(missing_ok=True)
    return found


def _is_alive(record: RunningServer) -> bool:
    try:
        process = psutil.Process(record.pid)
        return process.create_time() == record.started_s and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
