"""Which servers run on this machine: a small file for each, so that `stop` finds them."""

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

from expertmesh.cluster.errors import InputError, StateError


class RunningServer(NamedTuple):
    """A `serve` process of this user. logs: the folder of its processes' logs, where it has a Ray of its own."""

    pid: int
    grpc_address: str
    model: str
    logs: str = ""


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
def registered(grpc_address: str, model: Path, logs: str = "") -> Iterator[None]:
    """Let `stop` find this process while the context lasts."""
    record = RunningServer(os.getpid(), grpc_address, str(model), logs)
    path = state_home() / f"running-{record.pid}.json"
    unfinished = path.with_suffix(".new")
    with unfinished.open("w") as file:
        # The lock goes with this process, however it ends; a pid may come back as another process.
        fcntl.flock(file, fcntl.LOCK_EX)
        json.dump(record._asdict(), file)
        file.flush()
        unfinished.replace(path)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def find_running() -> list[RunningServer]:
    """Return the servers of this user that are alive; records of dead ones are removed.

    Raises:
        StateError: the record of a living server is damaged; the message names its file.
    """
    found: list[RunningServer] = []
    for path in sorted(state_home().glob("running-*.json")):
        try:
            with path.open() as file:
                if _is_locked(file):
                    found.append(RunningServer(**json.load(file)))
                else:
                    path.unlink(missing_ok=True)
        except FileNotFoundError:
            continue  # its server ended a moment ago
        except (ValueError, TypeError) as error:
            raise StateError(f"{path}: not the record of a server: {error}") from error
    return found


def choose(servers: list[RunningServer], url: str) -> RunningServer:
    """Return the one server, or that at an address.

    Raises:
        InputError: there is none, or there are several.
    """
    listing = ", ".join(f"{s.grpc_address} (pid {s.pid})" for s in servers) or "none"
    matching = [s for s in servers if not url or s.grpc_address == url]
    if len(matching) != 1:
        what = (
            f"no server at {url}"
            if url
            else "no server runs here"
            if not servers
            else "several servers run; give --url"
        )
        raise InputError(f"{what}; running: {listing}")
    return matching[0]


def _is_locked(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False
