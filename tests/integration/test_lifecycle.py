"""Starting, refusing to start, and stopping."""

import json
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from expertmesh.cluster.errors import CapacityError
from tests.integration.conftest import CLI, POCKET, serving


def _run(home: Path, *arguments: str, timeout_s: float = 90.0) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "HOME": str(home), "XDG_STATE_HOME": str(home / "state")}
    return subprocess.run([*CLI, *arguments], capture_output=True, text=True, timeout=timeout_s, env=env, check=False)


def _last_line(result: subprocess.CompletedProcess[str]) -> str:
    assert "Traceback" not in result.stderr, result.stderr
    return result.stderr.strip().splitlines()[-1]


def test_a_checkpoint_without_tokenizer_is_served_by_token_ids(tiny: Path, tmp_path: Path) -> None:
    with serving(tiny, tmp_path, "--shards", "3") as server:
        answer = _run(
            tmp_path, "generate", "--token-ids", "5,6,7", "--url", server.address, "--max-tokens", "6", "--json"
        )
        assert len(json.loads(answer.stdout)["token_ids"]) == 6, answer.stderr
        refused = _run(tmp_path, "generate", "some text", "--url", server.address)
        assert refused.returncode == 2
        assert "tokenizer" in _last_line(refused)
        taken = _run(tmp_path, "serve", str(tiny), "--grpc-port", server.address.rpartition(":")[2])
        assert taken.returncode == 2
        assert "cannot listen on" in _last_line(taken)
        doctor = _run(tmp_path, "doctor", "--json")
        assert json.loads(doctor.stdout), doctor.stderr


def test_detached_server_is_found_and_stopped(tiny: Path, tmp_path: Path) -> None:
    started = _run(tmp_path, "serve", str(tiny), "--grpc-port", "0", "--no-http", "--detach")
    assert started.returncode == 0, started.stderr
    address = started.stdout.split()[1]
    pid = int(started.stdout.split("pid ")[1].split(",")[0])
    tree = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    try:
        status = json.loads(_run(tmp_path, "status", "--url", address, "--json").stdout)
        assert status["ready"] is True
    finally:
        stopped = _run(tmp_path, "stop")
        left = psutil.wait_procs(tree, timeout=10)[1]
        for survivor in left:
            survivor.kill()
    assert stopped.returncode == 0, stopped.stderr
    assert not left
    assert _run(tmp_path, "stop").returncode == 2


def test_interrupted_start_leaves_nothing(tiny: Path, tmp_path: Path) -> None:
    env = {**os.environ, "HOME": str(tmp_path), "TMPDIR": str(tmp_path)}
    process = subprocess.Popen(
        [*CLI, "serve", str(tiny), "--grpc-port", "0", "--no-http"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "loading experts" in line:
            break
    tree = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[1]
    left = psutil.wait_procs(tree, timeout=5)[1]
    for survivor in left:
        survivor.kill()
    assert not left
    assert "Traceback" not in output, output
    assert not list(tmp_path.glob("expertmesh-*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/no/such/directory"], "no such directory"),
        (["{pocket}", "--replicas", "5"], "replicas=5 needs at least as many shards"),
        (["{pocket}", "--dtype", "int3"], "--dtype"),
        (["{pocket}", "--state", "redis://127.0.0.1:1"], "no Redis answers"),
        (["{pocket}", "--config", "/no/such/file.toml"], "--config"),
        (["{pocket}", "--tls-cert", "/no/such.pem", "--tls-key", "/no/such.key"], "/no/such.pem: No such file"),
        (["{truncated}"], "truncated or damaged"),
    ],
)
def test_what_cannot_be_served_is_one_clear_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    truncated = tmp_path / "truncated"
    truncated.mkdir()
    (truncated / "config.json").write_bytes((POCKET / "config.json").read_bytes())
    (truncated / "model.safetensors").write_bytes((POCKET / "model.safetensors").read_bytes()[:100_000])
    filled = [a.format(pocket=POCKET, truncated=truncated) for a in arguments]
    result = _run(tmp_path, "serve", "--grpc-port", "0", "--no-http", *filled)
    assert result.returncode in (1, 2)
    line = _last_line(result)
    assert line.startswith("error: ")
    assert message in line


def test_too_little_memory_is_refused_with_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    from expertmesh.actors import launch
    from expertmesh.cluster.settings import ServeSettings
    from expertmesh.models.describe import inspect_checkpoint

    facts = inspect_checkpoint(POCKET, "float32", 0)
    memory = psutil.virtual_memory()._replace(available=1_000_000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    deployment = launch.Deployment(ServeSettings(model=POCKET), None, lambda _line: None)
    with pytest.raises(CapacityError, match=r"GiB of experts .* do not fit in the 0\.00 GiB"):
        deployment._check_memory(facts)
    deployment.stop()


def test_a_port_of_another_program_is_refused_at_once(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        started_s = time.monotonic()
        result = _run(tmp_path, "serve", str(POCKET), "--grpc-port", str(other.getsockname()[1]))
        assert time.monotonic() - started_s < 30
    assert result.returncode == 2
    assert "cannot listen on" in _last_line(result)
