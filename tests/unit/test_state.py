"""What outlives the controller: the store over a real embedded Redis, and what is said when it is not there."""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from expertmesh.actors import state
from expertmesh.actors.state import EmbeddedRedis, StateStore, connect
from expertmesh.cluster.errors import InputError, StateError, UnavailableError
from expertmesh.cluster.ids import ShardId
from expertmesh.cluster.operations import Operation, Phase
from expertmesh.cluster.placement import Placement, initial_placement

PLACEMENT_KEY = "expertmesh:model:placement"


@pytest.fixture
def directory() -> Iterator[Path]:
    """A folder with a short path: a Unix socket's name has some 100 characters."""
    with tempfile.TemporaryDirectory(prefix="em-") as path:
        yield Path(path)


@pytest.fixture
def server(directory: Path) -> Iterator[EmbeddedRedis]:
    server = EmbeddedRedis(directory)
    yield server
    server.close()


def placement(epoch: int) -> Placement:
    return initial_placement((0, 2), 4, [ShardId("a"), ShardId("b")], 2, epoch=epoch)


def processes_in(directory: Path) -> list[psutil.Process]:
    """Return the living Redis servers whose socket is in a folder."""
    found: list[psutil.Process] = []
    for process in psutil.process_iter(["cmdline", "status"]):
        command = " ".join(process.info["cmdline"] or ())
        if "redis-server" in command and str(directory) in command and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


def wait_until(condition: Callable[[], bool], timeout_s: float) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"not within {timeout_s} s"
        time.sleep(0.02)


def test_a_placement_is_there_after_close_and_start(directory: Path) -> None:
    for epoch in (1, 2, 3):
        server = EmbeddedRedis(directory)
        with closing(connect(server.url)) as client:
            store = StateStore(client, "model")
            assert store.load_placement() == (placement(epoch - 1) if epoch > 1 else None)
            store.save_placement(placement(epoch))
            assert store.load_placement() == placement(epoch)
        server.close()
        assert not processes_in(directory)


def test_deployments_do_not_see_each_other(server: EmbeddedRedis) -> None:
    with closing(connect(server.url)) as client:
        StateStore(client, "model").save_placement(placement(1))
        assert StateStore(client, "other").load_placement() is None


def test_it_dies_with_its_parent_and_the_records_live_on(directory: Path) -> None:
    """The parent is killed outright, in the middle of things: nothing in it can clean up."""
    program = (
        "import sys, time; from pathlib import Path; from expertmesh.actors.state import *\n"
        "server = EmbeddedRedis(Path(sys.argv[1])); connect(server.url).set('told', 'it')\n"
        "print('up', flush=True); time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", program, str(directory)], stdout=subprocess.PIPE)
    try:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"up\n"
        (orphan,) = processes_in(directory)
        assert orphan.ppid() == parent.pid
    finally:
        parent.kill()
        parent.communicate(timeout=10)
    wait_until(lambda: not processes_in(directory), timeout_s=5)
    with pytest.raises(UnavailableError):
        connect(f"unix://{directory}/redis.sock")
    again = EmbeddedRedis(directory)
    with closing(connect(again.url)) as client:
        assert client.get("told") == b"it"
    again.close()


def test_only_this_user_may_speak_to_it(server: EmbeddedRedis, directory: Path) -> None:
    assert (directory / "redis.sock").stat().st_mode & 0o077 == 0
    (process,) = processes_in(directory)
    assert not process.net_connections("inet")


@pytest.mark.parametrize("damage", ["cut", "one bit", "something else", "another type"])
def test_a_damaged_record_is_a_state_error(damage: str, server: EmbeddedRedis) -> None:
    record = placement(7).to_bytes()
    with closing(connect(server.url)) as client:
        if damage == "another type":
            client.rpush(PLACEMENT_KEY, "a")
        else:
            flipped = record[:-1] + bytes([record[-1] ^ 1])
            client.set(PLACEMENT_KEY, {"cut": record[:-3], "one bit": flipped, "something else": b"hello"}[damage])
        with pytest.raises(StateError):
            StateStore(client, "model").load_placement()


def test_a_server_that_goes_away_is_unavailable(directory: Path) -> None:
    server = EmbeddedRedis(directory)
    with closing(connect(server.url)) as client:
        store = StateStore(client, "model")
        server.close()
        with pytest.raises(UnavailableError, match="Redis"):
            store.load_placement()
        with pytest.raises(UnavailableError, match="Redis"):
            store.save_placement(placement(1))


@pytest.mark.parametrize(
    "url", ["", "localhost:6379", "http://localhost:6379", "redis://localhost:port", "redis://h:99999"]
)
def test_a_wrong_url_is_an_input_error(url: str) -> None:
    with pytest.raises(InputError, match="--state"):
        connect(url)


def test_nothing_listening_is_unavailable_and_a_password_is_not_shown() -> None:
    with pytest.raises(UnavailableError, match=r"--state 'redis://127.0.0.1:1': no Redis answers"):
        connect("redis://127.0.0.1:1")
    with pytest.raises(UnavailableError, match=r"redis://\*\*\*@127.0.0.1:1/0") as caught:
        connect("redis://user:secret@127.0.0.1:1/0")
    assert "secret" not in str(caught.value)


def test_a_server_that_cannot_start_says_so_at_once(directory: Path) -> None:
    (directory / "redis.sock").mkdir()  # no socket can be there
    started_s = time.monotonic()
    with pytest.raises(UnavailableError, match=r"ended with exit code 1; see .*redis.log"):
        EmbeddedRedis(directory)
    assert time.monotonic() - started_s < 5


def test_a_damaged_file_is_set_aside_and_told(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    (directory / "appendonly.aof").write_text("no record of commands")
    server = EmbeddedRedis(directory)
    with closing(connect(server.url)) as client:
        assert StateStore(client, "model").load_placement() is None
    server.close()
    assert (directory / "appendonly.aof.damaged").read_text() == "no record of commands"
    assert "begins without records; what it refused is now" in caplog.text


def test_a_server_that_hangs_is_waited_for_once(
    server: EmbeddedRedis, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state, "_ANSWER_S", 0.3)
    monkeypatch.setattr(state, "_AWAY_S", 1.0)
    with closing(connect(server.url)) as client:
        store = StateStore(client, "model")
        (process,) = processes_in(directory)
        process.suspend()
        started_s = time.monotonic()
        try:
            for _ in range(5):
                with pytest.raises(UnavailableError, match="Redis"):
                    store.save_placement(placement(1))
            assert time.monotonic() - started_s < 1.0  # one wait, not five
        finally:
            process.resume()
        wait_until(lambda: _saves(store), timeout_s=10)


def _saves(store: StateStore) -> bool:
    try:
        store.save_placement(placement(2))
    except UnavailableError:
        return False
    return store.load_placement() == placement(2)


def operation(number: int) -> Operation:
    return Operation(
        id=f"op-{number}", request="rebalance", adding=(), removing=(), phase=Phase.DONE, progress="", error="",
        started_s=1.0, ended_s=2.0, deadline_s=9.0,
    )  # fmt: skip


def test_operations_go_on_beside_each_other(server: EmbeddedRedis) -> None:
    with closing(connect(server.url)) as client:
        store = StateStore(client, "model")
        for number in range(3):
            store.save_operation(operation(number))
        store.save_operation(replace(operation(0), error="no room", node="node-a"))
        assert [(found.id, found.error, found.node) for found in store.load_operations()] == [
            ("op-2", "", ""),
            ("op-1", "", ""),
            ("op-0", "no room", "node-a"),
        ]


def test_damaged_operations_are_passed_over_and_told(server: EmbeddedRedis, caplog: pytest.LogCaptureFixture) -> None:
    key = "expertmesh:model:operations"
    with closing(connect(server.url)) as client:
        store = StateStore(client, "model")
        for number in range(3):
            store.save_operation(operation(number))
        client.lset(key, 1, "hello")
        assert [found.id for found in store.load_operations()] == ["op-2", "op-0"]
        assert "operations, number 1 is damaged and passed over" in caplog.text
        client.set(key, "no list")
        with pytest.raises(StateError, match="operations"):
            store.load_operations()
        store.save_operation(operation(3))
        assert [found.id for found in store.load_operations()] == ["op-3"]
