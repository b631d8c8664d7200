"""A process's log: one line an event on standard error, as JSON for machines or as text for people.

Ray keeps each process's standard error in a file of its own. The standard library does the work: levels, handlers and
what other libraries log come to one place, and a line below the level costs a comparison.
"""

import json
import logging
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TextIO

from expertmesh.actors.log_events import BY_NAME
from expertmesh.cluster.settings import ServeSettings

Value = str | int | float | bool | Sequence[str] | None
# What a line has before its own fields.
RESERVED = ("time", "level", "event", "message", "process", "node", "pid", "logger", "exception")
# Of a text that came from elsewhere: a reason may quote a whole reply.
_MAX_CHARS = 2000
_MAX_TRACE_CHARS = 20_000
_EVENT_OF_OTHERS = "log"


@dataclass(frozen=True, slots=True)
class _Message:
    """Made into text only where a handler wants it."""

    template: str
    fields: Mapping[str, Value]

    def __str__(self) -> str:
        return self.template.format_map({name: _joined(value) for name, value in self.fields.items()})


class EventLog:
    """Tells events of one module. A field that is None is left out of the line."""

    def __init__(self, name: str) -> None:
        """Tell them under the module's name."""
        self._logger = logging.getLogger(name)

    def is_told(self, event: str) -> bool:
        """Say whether a line would be written, for fields that cost something."""
        return self._logger.isEnabledFor(BY_NAME[event].level)

    def tell(self, event: str, error: BaseException | None = None, /, **fields: Value) -> None:
        """Write a line.

        Args:
            event: a name of the table in log_events.py.
            error: whose traceback goes with it.
            fields: those that the event's message names, and more. No prompt, no output, no secret.
        """
        row = BY_NAME[event]
        if self._logger.isEnabledFor(row.level):
            extra = {"event": event, "fields": fields}
            self._logger.log(row.level, _Message(row.message, fields), extra=extra, exc_info=error, stacklevel=2)


class _Formatter(logging.Formatter):
    """Lays a record out as one line. process: its role and number; node: of Ray."""

    def __init__(self, process: str, node: str) -> None:
        super().__init__()
        self._process, self._node, self._pid = process, node, os.getpid()

    def fields(self, record: logging.LogRecord) -> dict[str, Any]:
        """Return what a line says, in order."""
        fields: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
            "level": record.levelname.lower(),
            "event": getattr(record, "event", _EVENT_OF_OTHERS),
            "message": _cut(record.getMessage()),
            "process": self._process,
            "node": self._node,
            "pid": self._pid,
        }
        own: Mapping[str, Value] = getattr(record, "fields", {})
        fields |= {name: _plain(value) for name, value in own.items() if value is not None}
        if "event" not in record.__dict__:
            fields["logger"] = record.name
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)[-_MAX_TRACE_CHARS:]
        return fields


class JsonFormatter(_Formatter):
    """One JSON object a line. Beyond ASCII everything is escaped: nothing in a field ends a line."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        return json.dumps(self.fields(record), ensure_ascii=True, default=str)


class TextFormatter(_Formatter):
    """time level process(pid@node) event: message name=value ...; a traceback follows on lines that are set in."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        fields = self.fields(record)
        time, level, event, message, process, node, pid = (fields.pop(name) for name in RESERVED[:7])
        trace = fields.pop("exception", "")
        rest = "".join(f" {name}={_shown(value)}" for name, value in fields.items())
        line = f"{time} {level:7} {process}({pid}@{node[:8]}) {event}: {_one_line(message)}{rest}"
        return "\n    ".join([line, *map(_one_line, trace.splitlines())])


_FORMATTERS = {"json": JsonFormatter, "text": TextFormatter}


def start_logs(settings: ServeSettings, process: str, node: str, stream: TextIO | None = None) -> None:
    """Have this process log. Again: the last call holds.

    Args:
        settings: format and level.
        process: what it is: its role and, where there are several, its number.
        node: on which it runs.
        stream: standard error unless given.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(_FORMATTERS[settings.log_format](process, node))
    handler.set_name("expertmesh")
    root = logging.getLogger()
    for other in [known for known in root.handlers if known.get_name() == "expertmesh"]:
        root.removeHandler(other)
    root.addHandler(handler)
    logging.getLogger("expertmesh").setLevel(settings.log_level.upper())
    EventLog(__name__).tell("process_started", process_name=process)


def reason_of(error: BaseException) -> str:
    """Return what an error says, or its kind where it says nothing."""
    return str(error) or type(error).__name__


def _joined(value: Value) -> Value:
    return value if value is None or isinstance(value, str | int | float) else ", ".join(value)


def _plain(value: Value) -> Value:
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else str(value)  # JSON has no NaN
    return _cut(value) if isinstance(value, str) else value


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_CHARS else text[:_MAX_CHARS] + f"... ({len(text)} characters)"


def _shown(value: Value) -> str:
    if isinstance(value, str):
        is_plain = value != "" and all(c.isprintable() and c not in ' "=\\' for c in value)
        return value if is_plain else json.dumps(value)
    return str(value) if value is None or isinstance(value, int | float) else ",".join(map(_shown, value))


def _one_line(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
