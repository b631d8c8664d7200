"""`expertmesh logs`: what the processes of a server on this machine logged, all of it or one request's way."""

import json
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from expertmesh.actors.cli.running import choose, find_running
from expertmesh.cluster.errors import InputError

LEVELS = ("debug", "info", "warning", "error", "critical")
_LOOK_AGAIN_S = 0.3
Line = dict[str, Any]


def logs(
    request: Annotated[str, typer.Option(help="Only lines about the request of this id, and its steps.")] = "",
    level: Annotated[str, typer.Option(help="The least: debug, info, warning or error.")] = "debug",
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what is logged from now on.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the lines as they are.")] = False,
    url: Annotated[str, typer.Option(help="gRPC address of the server; needed when several run here.")] = "",
) -> None:
    """Print the events that gateway, controller, workers and shards logged, in order of time.

    Raises:
        InputError: no such level or server, or its log_format is text.
    """
    if level not in LEVELS:
        raise InputError(f"--level is {level!r}; it must be one of {', '.join(LEVELS)}")
    server = choose(find_running(), url)
    folder, choice, files = Path(server.logs), Choice(request, level), LogFiles()
    if not server.logs or not folder.is_dir():
        raise InputError(f"the server at {server.grpc_address} joined a cluster: each node has its own logs there")
    while True:
        for line in choice.of(files.read(folder)):
            typer.echo(json.dumps(line) if as_json else _text(line))
        if not follow:
            break
        time.sleep(_LOOK_AGAIN_S)
    if not files.num_lines:
        raise InputError(f"there are no JSON lines in {folder}; with log_format=text read the files there")


class LogFiles:
    """Reads what was added to the files of a folder since it last looked."""

    def __init__(self) -> None:
        self.num_lines = 0
        self._read_bytes: dict[Path, int] = {}

    def read(self, folder: Path) -> list[Line]:
        """Return the new lines that are events, in order of time; a line that is not whole yet waits."""
        lines = [line for path in sorted(folder.glob("*.err")) for line in self._read_file(path)]
        self.num_lines += len(lines)
        return sorted(lines, key=lambda line: str(line["time"]))

    def _read_file(self, path: Path) -> Iterator[Line]:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size < self._read_bytes.get(path, 0):
                self._read_bytes[path] = 0  # it was begun anew
            file.seek(self._read_bytes.get(path, 0))
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._read_bytes[path] = self._read_bytes.get(path, 0) + len(line)
                event = _event(line)
                if event is not None:
                    yield event


class Choice:
    """Which lines are wanted. A worker's lines say which of its steps have the request; a shard's name such a step."""

    def __init__(self, request: str, level: str) -> None:
        self._request = request
        self._levels = LEVELS[LEVELS.index(level) :]
        self._steps: set[tuple[str, int]] = set()  # of a worker

    def of(self, lines: Iterable[Line]) -> list[Line]:
        """Return those of these lines that are wanted."""
        lines = list(lines)
        # A shard may tell of a step before its worker does.
        self._steps |= {(str(line["process"]), line["step"]) for line in lines if "step" in line and self._names(line)}
        return [line for line in lines if line["level"] in self._levels and self._is_wanted(line)]

    def _is_wanted(self, line: Line) -> bool:
        if not self._request or self._names(line):
            return True
        return (line.get("peer"), line.get("step")) in self._steps

    def _names(self, line: Line) -> bool:
        return line.get("request_id") == self._request or self._request in line.get("request_ids", ())


def _event(line: bytes) -> Line | None:
    try:
        fields = json.loads(line)
    except ValueError:
        return None
    return fields if isinstance(fields, dict) and {"time", "level", "event", "process"} <= set(fields) else None


def _text(line: Line) -> str:
    message = "".join(c if c.isprintable() else "?" for c in str(line.get("message", "")))
    return f"{line['time']} {line['level']:7} {line['process']:16} {line['event']}: {message}"
