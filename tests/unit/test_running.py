"""Servers of one machine: the records by which `stop` finds them, and what is checked before a start."""

import contextlib
import json
import os
import pickle
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from expertmesh.actors import launch
from expertmesh.actors.cli import main, running
from expertmesh.actors.cli.stop import stop
from expertmesh.actors.inspection import inspect
from expertmesh.cluster.errors import CapacityError, CheckpointError, InputError, StateError, UnavailableError
from expertmesh.cluster.model_info import CheckpointFacts, ModelInfo
from expertmesh.cluster.settings import ServeSettings

MODEL = Path("models/tiny")
POCKET = Path(__file__).resolve().parents[2] / "examples" / "pocket-moe"
GIB = 2**30
# Registers itself as `serve` does, says so, and waits; told "deaf" it ignores SIGTERM.
SERVER = """
import signal, sys, time
from pathlib import Path
from expertmesh.actors.cli.running import registered
if sys.argv[2] == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
else:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
with registered(sys.argv[1], Path(sys.argv[3])):
    print("up", flush=True)
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of records, empty."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return tmp_path / "expertmesh"


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Start stand-ins for servers; those still alive at the end are killed."""
    processes: list[subprocess.Popen[bytes]] = []

    def run(address: str, manner: str = "") -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", SERVER, address, manner, str(MODEL)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        processes.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        return process

    yield run
    for process in processes:
        process.kill()
        process.communicate(timeout=10)


def records(home: Path) -> list[Path]:
    return sorted(home.glob("running-*"))


# Records.


def test_a_server_is_found_while_it_runs(home: Path) -> None:
    assert running.find_running() == []
    with running.registered("127.0.0.1:50051", MODEL):
        (found,) = running.find_running()
        assert (found.pid, found.grpc_address, found.model) == (os.getpid(), "127.0.0.1:50051", str(MODEL))
        assert len(records(home)) == 1
    assert running.find_running() == []
    assert records(home) == []


def test_a_failing_server_takes_its_record_along(home: Path) -> None:
    with contextlib.suppress(ZeroDivisionError), running.registered("127.0.0.1:50051", MODEL):
        raise ZeroDivisionError
    assert records(home) == []


def test_the_record_of_a_killed_server_is_removed(home: Path, start: Callable[..., subprocess.Popen[bytes]]) -> None:
    process = start("127.0.0.1:50051")
    assert [server.pid for server in running.find_running()] == [process.pid]
    process.kill()
    # Dead, but its parent has not waited for it: it still has its pid.
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert len(records(home)) == 1
    assert running.find_running() == []
    assert records(home) == []


def test_another_process_of_a_dead_servers_pid_is_left_alone(home: Path) -> None:
    """The record that a killed server left names this process by chance: `stop` must not end it."""
    home.mkdir()
    record = {"pid": os.getpid(), "grpc_address": "127.0.0.1:50051", "model": str(MODEL)}
    (home / f"running-{os.getpid()}.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match="no server runs here"):
        stop()
    assert records(home) == []


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"pid": 1}', '{"what": "else"}'])
def test_a_damaged_record_is_named_while_its_server_lives(content: str, home: Path) -> None:
    with running.registered("127.0.0.1:50051", MODEL):
        (path,) = records(home)
        path.write_text(content)
        with pytest.raises(StateError, match=f"{path}: not the record of a server"):
            running.find_running()
    path.write_text(content)
    assert running.find_running() == []
    assert records(home) == []


def test_the_folder_is_the_users_own_and_logs_go_there(home: Path) -> None:
    assert running.state_home() == home
    assert home.stat().st_mode & 0o777 == 0o700
    assert running.new_log_file().parent == home


# Stop.


def test_stop_ends_a_server(
    home: Path, start: Callable[..., subprocess.Popen[bytes]], capsys: pytest.CaptureFixture[str]
) -> None:
    process = start("127.0.0.1:50051")
    stop()
    assert process.wait(5) == 0
    assert capsys.readouterr().out == f"stopped 127.0.0.1:50051 (pid {process.pid}, {MODEL})\n"
    assert records(home) == []


def test_stop_of_nothing() -> None:
    with pytest.raises(InputError, match="no server runs here; running: none"):
        stop()
    with pytest.raises(InputError, match=r"no server at 127.0.0.1:9; running: none"):
        stop(url="127.0.0.1:9")


def test_stop_among_several_needs_the_address(start: Callable[..., subprocess.Popen[bytes]]) -> None:
    first, second = start("127.0.0.1:50051"), start("127.0.0.1:50052")
    with pytest.raises(InputError, match="several servers run; give --url; running: ") as caught:
        stop()
    for address, process in (("127.0.0.1:50051", first), ("127.0.0.1:50052", second)):
        assert f"{address} (pid {process.pid})" in str(caught.value)
    with pytest.raises(InputError, match=r"no server at 127.0.0.1:50053; running: 127.0.0.1:5005"):
        stop(url="127.0.0.1:50053")
    stop(url="127.0.0.1:50052")
    assert second.wait(5) == 0
    assert first.poll() is None
    assert [server.pid for server in running.find_running()] == [first.pid]


def test_stop_says_when_a_server_does_not_end(start: Callable[..., subprocess.Popen[bytes]]) -> None:
    process = start("127.0.0.1:50051", "deaf")
    with pytest.raises(UnavailableError, match=f"process {process.pid} did not end within 0.2 s"):
        stop(timeout_s=0.2)
    assert process.poll() is None


def test_the_command_line_says_it_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["expertmesh", "stop"])
    with pytest.raises(SystemExit) as caught:
        main.main()
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: no server runs here; running: none\n"


# Checks before a start.


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_port_in_use_is_refused(host: str) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        try:
            listener.bind((host, 0))
        except OSError:
            pytest.skip(f"this machine has no {host}")
        listener.listen()
        port = listener.getsockname()[1]
        with pytest.raises(InputError, match=f"cannot listen on {host}:{port}: Address already in use"):
            launch._require_free_port(host, port)
    launch._require_free_port(host, port)
    launch._require_free_port(host, 0)


def test_a_host_that_is_not_ours_is_refused() -> None:
    with pytest.raises(InputError, match=r"cannot listen on nowhere\.invalid:1: "):
        launch._require_free_port("nowhere.invalid", 1)


def test_a_metrics_port_is_free_and_of_a_ray_of_our_own() -> None:
    launch._check_metrics_port(0, "ray.example:6379")
    with pytest.raises(InputError, match=r"metrics_port=8080 is for a Ray that is started here; that at ray\.example:"):
        launch._check_metrics_port(8080, "ray.example:6379")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        with pytest.raises(InputError, match=f"cannot listen on :{port}: Address already in use"):
            launch._check_metrics_port(port, None)
    launch._check_metrics_port(port, None)


def deployment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, free: int, **settings: object) -> launch.Deployment:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=free, available=free))
    return launch.Deployment(ServeSettings.model_validate({"model": MODEL, **settings}), None, print)


def test_an_http_port_in_use_is_refused_before_anything_starts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        unstarted = deployment(monkeypatch, tmp_path, GIB, grpc_port=0, http_port=port)
        with pytest.raises(InputError, match=f"cannot listen on 127.0.0.1:{port}: "):
            unstarted.start()
        unstarted.stop()
        # Whoever wants no HTTP does not mind, and fails over the model alone.
        without = deployment(monkeypatch, tmp_path, GIB, grpc_port=0, http_port=port, http=False)
        with pytest.raises(CheckpointError, match="no such directory"):
            without.start()
        without.stop()


# 4 layers of 8 experts of 1 GiB: 32 GiB. A dense half of 2 GiB for each worker.
FACTS = CheckpointFacts(
    expert_bytes=GIB,
    expert_width=64,
    dense_bytes=2 * GIB,
    info=ModelInfo(
        name="m",
        architecture="A",
        dtype="bfloat16",
        num_layers=4,
        moe_layers=(0, 1, 2, 3),
        num_experts=8,
        top_k=2,
        hidden_size=8,
        vocab_size=8,
        max_context=8,
    ),
)


@pytest.mark.parametrize(
    ("settings", "needed"), [({}, 34), ({"replicas": 2}, 66), ({"workers": 3}, 38), ({"replicas": 2, "workers": 3}, 70)]
)
def test_a_model_that_does_not_fit_is_refused(
    settings: dict[str, object], needed: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    deployment(monkeypatch, tmp_path, needed * GIB, **settings)._check_memory(FACTS)
    short = deployment(monkeypatch, tmp_path, needed * GIB - 1, **settings)
    with pytest.raises(CapacityError, match=f"{MODEL}: .* GiB of experts and .* do not fit in the .* that are free"):
        short._check_memory(FACTS)


def test_memory_of_accelerators_is_not_judged_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    deployment(monkeypatch, tmp_path, GIB, device="cuda")._check_memory(FACTS)


def test_a_deployment_that_never_came_up_stops_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    unstarted = deployment(monkeypatch, tmp_path, GIB)
    assert list(tmp_path.glob("expertmesh-*"))
    unstarted.stop()
    assert not list(tmp_path.glob("expertmesh-*"))


def test_what_is_known_of_a_checkpoint_comes_without_torch() -> None:
    facts = inspect(ServeSettings(model=POCKET))
    code = (
        "import pickle, sys; facts = pickle.load(sys.stdin.buffer);"
        "print(facts.info.num_experts, [m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], input=pickle.dumps(facts), capture_output=True, check=True)
    assert run.stdout.split(maxsplit=1) == [b"16", b"[]\n"]
