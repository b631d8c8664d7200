"""What is logged while a block lasts, as the lines that a process writes."""

import io
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from expertmesh.actors.logs import start_logs
from expertmesh.cluster.settings import ServeSettings


class Lines:
    """What was written so far."""

    def __init__(self, stream: io.StringIO) -> None:
        self._stream = stream

    @property
    def text(self) -> str:
        return self._stream.getvalue()

    @property
    def records(self) -> list[dict[str, Any]]:
        """The lines, each of which must be a JSON object."""
        return [json.loads(line) for line in self.text.splitlines()]

    def of(self, event: str) -> list[dict[str, Any]]:
        return [record for record in self.records if record["event"] == event]


@contextmanager
def logged(level: Literal["debug", "info", "warning", "error"] = "debug", **settings: Any) -> Iterator[Lines]:
    """Yield what `start_logs` has written in this process."""
    root, ours = logging.getLogger(), logging.getLogger("expertmesh")
    handlers, before = list(root.handlers), ours.level
    stream = io.StringIO()
    start_logs(ServeSettings(model=Path("model"), log_level=level, **settings), "worker-0", "node-1", stream)
    try:
        yield Lines(stream)
    finally:
        root.handlers[:] = handlers
        ours.setLevel(before)
