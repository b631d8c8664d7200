"""`expertmesh logs` over the files that processes write: order, levels, one request's way, what is not whole yet."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from expertmesh.actors.cli import running
from expertmesh.actors.cli.logs import LogFiles
from tests.unit.test_cli import Run, run

__all__ = ["run"]  # a fixture


def line(second: int, process: str, event: str, level: str = "info", **fields: Any) -> dict[str, Any]:
    time = f"2026-11-28T13:40:{second:02}.000000Z"
    return {"time": time, "level": level, "event": event, "message": f"{event} told", "process": process, **fields}


GATEWAY = [
    line(5, "gateway-1", "request_ended", request_id="r-1"),
    line(6, "gateway-1", "request_ended", request_id="r"),
]
WORKER = [
    line(1, "worker-0", "link_lost", "warning", step=41, request_ids=["r-1", "r-2"]),
    line(2, "worker-0", "step_retried", "warning", step=42, request_ids=["r-2"]),
]
SHARD = [
    line(0, "shard-1", "peer_gone", peer="worker-0", step=41),
    line(3, "shard-1", "packet_slow", "warning", peer="worker-0", step=42),
    line(4, "shard-1", "peer_gone", peer="worker-1", step=41),
]


def write(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(each) + "\n" for each in lines))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The logs of a server that is said to run."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    folder = tmp_path / "logs"
    folder.mkdir()
    write(folder / "worker-a-1.err", WORKER)
    write(folder / "worker-b-2.err", SHARD)
    write(folder / "worker-c-3.err", GATEWAY)
    (folder / "worker-d-4.err").write_text("[not ours]\nSegmentation fault\n{}\n")
    (folder / "raylet.out").write_text("chatter\n")
    with running.registered("127.0.0.1:50051", Path("model"), str(folder)):
        yield folder


def test_lines_of_all_processes_are_shown_in_order_of_time(run: Run, folder: Path) -> None:
    code, out, _ = run("logs")
    assert code == 0
    shown = [shown.split()[2] for shown in out.splitlines()]
    assert shown == ["shard-1", "worker-0", "worker-0", "shard-1", "shard-1", "gateway-1", "gateway-1"]
    assert "peer_gone told" in out.splitlines()[0]


def test_a_request_is_followed_to_the_steps_that_a_shard_tells_of(run: Run, folder: Path) -> None:
    out = run("logs", "--request", "r-1", "--json")[1]
    assert [json.loads(shown) for shown in out.splitlines()] == [SHARD[0], WORKER[0], GATEWAY[0]]
    out = run("logs", "--request", "r-2", "--level", "warning", "--json")[1]
    assert [json.loads(shown) for shown in out.splitlines()] == [*WORKER, SHARD[1]]


def test_a_half_written_line_waits(tmp_path: Path) -> None:
    files, path, text = LogFiles(), tmp_path / "worker-a-1.err", json.dumps(WORKER[0]) + "\n"
    path.write_text(text[:20])
    assert files.read(tmp_path) == []
    with path.open("a") as file:
        file.write(text[20:] + text[:5])
    assert files.read(tmp_path) == [WORKER[0]]
    assert files.read(tmp_path) == []


def test_a_file_that_is_begun_anew_is_read_from_its_beginning(tmp_path: Path) -> None:
    files, path = LogFiles(), tmp_path / "worker-a-1.err"
    write(path, WORKER)
    assert files.read(tmp_path) == WORKER
    write(path, WORKER[:1])
    assert files.read(tmp_path) == WORKER[:1]


def test_what_is_wrong_is_one_line(run: Run, folder: Path) -> None:
    code, _, err = run("logs", "--level", "loud")
    assert (code, err.count("\n")) == (2, 1)
    assert "one of debug, info, warning" in err
    for path in folder.iterdir():
        path.unlink()
    code, _, err = run("logs")
    assert code == 2
    assert "with log_format=text read the files there" in err


def test_a_server_in_a_cluster_is_named(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    with running.registered("127.0.0.1:50051", Path("model")):
        code, _, err = run("logs")
    assert code == 2
    assert "joined a cluster" in err


def test_control_characters_do_not_reach_the_terminal(run: Run, folder: Path) -> None:
    write(folder / "worker-e-5.err", [line(9, "gateway-1", "request_rejected") | {"message": "\x1b[31m\nforged"}])
    out = run("logs")[1]
    assert out.endswith("request_rejected: ?[31m?forged\n")
