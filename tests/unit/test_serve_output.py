"""What `serve` prints: its standard output is one line that scripts read, whatever Ray prints there."""

import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from expertmesh.actors import launch
from expertmesh.actors.cli import running, serve


class Serving:
    """A deployment in whose process Ray prints a warning at any time."""

    grpc_address, http_url, metrics_address = "127.0.0.1:50051", "http://127.0.0.1:8000", ""
    log_folder = ""

    def __init__(self, *_settings: object, **_more: object) -> None:
        """Take what the real one takes."""

    def start(self) -> None:
        sys.stdout.write("(raylet) There are tasks with infeasible resource requests\n")

    def stop(self) -> None:
        sys.stdout.write("(raylet) a worker died\n")


def test_only_the_ready_line_is_on_standard_output(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def interrupted() -> None:
        sys.stdout.write("(raylet) no memory is left\n")
        raise KeyboardInterrupt

    monkeypatch.setattr(launch, "Deployment", Serving)
    monkeypatch.setattr(serve, "_raise_on_signals", lambda: None)
    monkeypatch.setattr(serve, "signal", SimpleNamespace(**{**vars(signal), "pause": interrupted}))
    monkeypatch.setattr(running, "state_home", lambda: tmp_path)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    arguments: dict[str, Any] = {"model": tmp_path, "address": "of a cluster"}
    serve.serve(**arguments)
    printed, said = capsys.readouterr()
    assert printed == "ready 127.0.0.1:50051 http://127.0.0.1:8000\n"
    for warning in ("infeasible", "no memory", "died"):
        assert warning in said
