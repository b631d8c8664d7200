"""Where the two ends of a link meet: a small key-value server at the shard, and the store that torch asks through it.

torch's own TCPStore asks the name server for the name of every peer's address, which no timeout of its own bounds. This
one knows addresses alone.

A client joins a link's name first, and sees the keys of that link. They live as long as an end is joined: an end that
has met leaves, and one that died has left, so nothing stays behind. A message is its length (4 bytes, little-endian)
and a msgpack value; a client that sends anything else is cut off.
"""

import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import msgpack
from torch.distributed import Store  # type: ignore[attr-defined]  # torch's stubs leave it out

from expertmesh.actors.logs import EventLog, reason_of
from expertmesh.cluster.errors import LinkError

_LENGTH_BYTES = 4
_MAX_MESSAGE_BYTES = 16 << 10
_MAX_KEYS = 64
_MAX_CONNECTIONS = 1024
_MAX_WAIT_S = 24 * 3600.0
# A client that has not said by then which link it wants is none of ours.
_JOIN_S = 10.0
# What a server that runs may take to answer, beyond the wait that was asked of it.
_ANSWER_S = 1.0
_ACCEPT_AGAIN_S = 0.1

_log = EventLog(__name__)


@dataclass
class _Meeting:
    """The keys of one link, and how many clients are joined to it."""

    num_joined: int = 0
    values: dict[str, bytes] = field(default_factory=dict)


class RendezvousServer:
    """Holds the keys of links that are being formed. A thread for each client; none can hold up another."""

    def __init__(self, interface: str) -> None:
        """Listen on a free port.

        Args:
            interface: address of the network interface to listen on, IPv4 or IPv6.
        """
        family = socket.AF_INET6 if ":" in interface else socket.AF_INET
        self._listener = socket.create_server((interface, 0), family=family)
        self.port: int = self._listener.getsockname()[1]
        self._meetings: dict[str, _Meeting] = {}
        self._clients: dict[threading.Thread, socket.socket] = {}
        self._closed = False
        self._changed = threading.Condition()
        self._accepting = threading.Thread(target=self._accept, name=f"rendezvous-{self.port}", daemon=True)
        self._accepting.start()

    @property
    def num_keys(self) -> int:
        """Number of keys held, of all links."""
        with self._changed:
            return sum(len(meeting.values) for meeting in self._meetings.values())

    def close(self) -> None:
        """Stop listening and cut all clients off; what they wait for ends with LinkError. Again: nothing more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            clients = dict(self._clients)
        for connection in (self._listener, *clients.values()):
            with suppress(OSError):  # that one has gone by itself
                connection.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in (self._accepting, *clients):
            thread.join()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError as error:
                if self._closed:
                    return
                _log.tell("rendezvous_refused", reason=reason_of(error))
                time.sleep(_ACCEPT_AGAIN_S)
                continue
            thread = threading.Thread(target=self._serve, args=(connection,), name="rendezvous-client", daemon=True)
            with self._changed:
                if self._closed or len(self._clients) >= _MAX_CONNECTIONS:
                    connection.close()
                    continue
                self._clients[thread] = connection
                thread.start()

    def _serve(self, connection: socket.socket) -> None:
        name = None
        try:
            # A peer whose machine is gone never says so.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            name = self._join(_receive(connection, _JOIN_S))
            _send(connection, None, _JOIN_S)
            while True:
                request = _receive(connection, None)
                _send(connection, self._answer(name, request), _JOIN_S)
        except EOFError:
            return
        except (OSError, ValueError, msgpack.UnpackException) as error:
            _log.tell("rendezvous_cut_off", link=name, reason=reason_of(error))
        finally:
            connection.close()
            self._leave(name)

    def _join(self, request: object) -> str:
        match request:
            case ["join", str(name)]:
                with self._changed:
                    self._meetings.setdefault(name, _Meeting()).num_joined += 1
                return name
        raise ValueError("the first message joins no link")

    def _leave(self, name: str | None) -> None:
        with self._changed:
            del self._clients[threading.current_thread()]
            if name is not None:
                self._meetings[name].num_joined -= 1
                if not self._meetings[name].num_joined:
                    del self._meetings[name]

    def _answer(self, name: str, request: object) -> list[bytes] | int | None:
        with self._changed:
            values = self._meetings[name].values
            match request:
                case ["set", str(key), bytes(value)]:
                    self._put(values, key, value)
                    return None
                case ["add", str(key), int(amount)]:
                    total = int(values.get(key, b"0")) + amount
                    # torch's stores keep a counter as decimal digits.
                    self._put(values, key, str(total).encode())
                    return total
                case ["get", list(keys), float(timeout_s)] if 0 <= timeout_s <= _MAX_WAIT_S and _are_keys(keys):
                    self._changed.wait_for(lambda: self._closed or values.keys() >= set(keys), timeout_s)
                    if self._closed:
                        raise ConnectionAbortedError("the rendezvous was closed")
                    return [values[key] for key in keys] if values.keys() >= set(keys) else None
        raise ValueError("a message that is no request")

    def _put(self, values: dict[str, bytes], key: str, value: bytes) -> None:
        if key not in values and len(values) >= _MAX_KEYS:
            raise ValueError(f"more than {_MAX_KEYS} keys for one link")
        values[key] = value
        self._changed.notify_all()


class RendezvousStore(Store):
    """One end's view of the keys of its link. Any thread may call; one request at a time.

    torch calls it from C++ and does not keep the Python object: hold on to it while a process group may use it.
    """

    def __init__(self, host: str, port: int, name: str, timeout_s: float) -> None:
        """Join the link of this name. A numeric host needs no name server.

        Args:
            host: of the server.
            port: of the server.
            name: of the link, unique for the pair of ends and the generation.
            timeout_s: bounds the connection, each request, and each wait for a key.

        Raises:
            LinkError: nobody answers there within timeout_s.
        """
        super().__init__()
        self._where = f"the rendezvous at {host} port {port}"
        self._timeout_s = timeout_s
        self._one_at_a_time = threading.Lock()
        try:
            self._connection = socket.create_connection((host, port), timeout_s)
        except OSError as error:
            raise LinkError(f"{self._where} cannot be reached: {error}") from error
        self._request(["join", name], timeout_s)

    def set(self, key: str, value: str | bytes) -> None:
        """Set a key, and wake who waits for it."""
        self._request(["set", key, value.encode() if isinstance(value, str) else value], self._timeout_s)

    def get(self, key: str) -> bytes:
        """Wait for a key and return its value.

        Raises:
            LinkError: nobody set it in time, or the server is gone.
        """
        return self._get([key], self._timeout_s)[0]

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        """Wait until all keys are set; timeout can only shorten the store's own.

        Raises:
            LinkError: nobody set them in time, or the server is gone.
        """
        own_s = self._timeout_s
        self._get(keys, own_s if timeout is None else min(own_s, timeout.total_seconds()))

    def check(self, keys: list[str]) -> bool:
        """Return whether all keys are set, without waiting for them."""
        return self._request(["get", keys, 0.0], self._timeout_s) is not None

    def add(self, key: str, value: int) -> int:
        """Add to a counter, which begins at 0, and return its new value."""
        return int(self._request(["add", key, value], self._timeout_s))

    def set_timeout(self, timeout: timedelta) -> None:
        """Give the requests and waits that follow another bound."""
        self._timeout_s = timeout.total_seconds()

    def close(self) -> None:
        """Leave: the link's keys go with the last end that leaves. Requests after it raise LinkError."""
        self._connection.close()

    def _get(self, keys: list[str], wait_s: float) -> list[bytes]:
        values: list[bytes] | None = self._request(["get", keys, float(wait_s)], wait_s + _ANSWER_S)
        if values is None:
            raise LinkError(f"{self._where}: nobody set {', '.join(keys)} within {wait_s:g} s")
        return values

    def _request(self, request: list[object], timeout_s: float) -> Any:
        with self._one_at_a_time:
            try:
                _send(self._connection, request, timeout_s)
                return _receive(self._connection, timeout_s)
            except (OSError, EOFError, ValueError, msgpack.UnpackException) as error:
                # A late answer would be taken for the next request's.
                self._connection.close()
                raise LinkError(f"{self._where} did not answer {request[0]!r}: {error}") from error


def _are_keys(keys: list[object]) -> bool:
    return len(keys) <= _MAX_KEYS and all(isinstance(key, str) for key in keys)


def _send(connection: socket.socket, value: object, timeout_s: float) -> None:
    message = msgpack.packb(value)
    if len(message) > _MAX_MESSAGE_BYTES:
        raise ValueError(f"a message of {len(message)} bytes, more than {_MAX_MESSAGE_BYTES}")
    connection.settimeout(timeout_s)
    connection.sendall(len(message).to_bytes(_LENGTH_BYTES, "little") + message)


def _receive(connection: socket.socket, timeout_s: float | None) -> Any:
    """Read one message. None waits for ever; EOFError: the other side hung up."""
    deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
    size = int.from_bytes(_read(connection, _LENGTH_BYTES, deadline_s), "little")
    if size > _MAX_MESSAGE_BYTES:
        raise ValueError(f"a message of {size} bytes, more than {_MAX_MESSAGE_BYTES}")
    return msgpack.unpackb(_read(connection, size, deadline_s))


def _read(connection: socket.socket, num_bytes: int, deadline_s: float | None) -> bytes:
    data = b""
    while len(data) < num_bytes:
        # 0 would be a socket that does not wait at all.
        connection.settimeout(None if deadline_s is None else max(deadline_s - time.monotonic(), 1e-6))
        part = connection.recv(num_bytes - len(data))
        if not part:
            raise EOFError("the other side hung up")
        data += part
    return data
