"""Which API keys are there now? The keys of a file that may change at any time, and what each has used."""

import time
from collections.abc import Callable
from pathlib import Path

from expertmesh.actors.gateway.callers import Caller
from expertmesh.actors.logs import EventLog, reason_of
from expertmesh.actors.metrics import Metrics
from expertmesh.cluster.api_keys import ApiKey, find_key, parse_keys
from expertmesh.cluster.errors import InputError

_log = EventLog(__name__)

# Of calls that were refused for want of a key or role, by the name of the gRPC status.
REFUSALS = ("UNAUTHENTICATED", "PERMISSION_DENIED")


class KeyBook:
    """The keys of one gateway. Without a file there are none, and nobody needs one to generate."""

    def __init__(
        self,
        path: Path | None = None,
        *,
        now_s: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Read the file.

        Args:
            path: of the file.
            now_s: Unix time, for when keys expire.
            clock: seconds that do not step back, for limits.

        Raises:
            InputError: the file cannot be read, or is no file of keys.
        """
        self.path = path
        self.refused = dict.fromkeys(REFUSALS, 0)
        self._now_s = now_s
        self._clock = clock
        self._keys: tuple[ApiKey, ...] = ()
        self._callers: dict[str, Caller] = {}
        self._seen: tuple[int, ...] | None = None
        if path is not None:
            self._seen = _signature(path)
            self._follow(read_keys(path))

    @property
    def names(self) -> list[str]:
        """The names of the keys."""
        return [key.name for key in self._keys]

    def look(self) -> bool:
        """Read the file again if it has changed; return whether there are other keys now.

        One that cannot be used is told of in the log, once, and the keys stay as they were.
        """
        if self.path is None or (seen := _signature(self.path)) == self._seen:
            return False
        self._seen = seen
        try:
            keys = read_keys(self.path)
        except InputError as error:
            _log.tell("keys_unusable", reason=reason_of(error), num_keys=len(self._keys))
            return False
        self._follow(keys)
        _log.tell("keys_read", path=str(self.path), num_keys=len(keys))
        return True

    def find(self, secret: str) -> Caller | None:
        """Return whose secret it is; None if it is nobody's, or its key has expired."""
        key = find_key(self._keys, secret, self._now_s())
        return None if key is None else self._callers[key.name]

    def report(self, metrics: Metrics) -> None:
        """Hand on what was refused so far."""
        for code, count in self.refused.items():
            metrics.count("expertmesh_refused_calls_total", count, code=code)

    def _follow(self, keys: tuple[ApiKey, ...]) -> None:
        known, self._callers = self._callers, {}
        for key in keys:
            caller = self._callers[key.name] = known.get(key.name) or Caller(clock=self._clock)
            caller.follow(key)
        self._keys = keys


def read_keys(path: Path) -> tuple[ApiKey, ...]:
    """Return the keys of a file.

    Raises:
        InputError: it cannot be read, or is no file of keys; the message names the file and what is wrong.
    """
    try:
        return parse_keys(path.read_text())
    except OSError as error:
        raise InputError(f"keys file {path}: {error.strerror}") from error
    except UnicodeDecodeError:
        raise InputError(f"keys file {path}: it is no text") from None
    except InputError as error:
        raise InputError(f"keys file {path}: {error}") from None


def _signature(path: Path) -> tuple[int, ...] | None:
    """Return what differs when a file was written or replaced; None when there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino, status.st_size
