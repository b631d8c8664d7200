"""Keys with a real server: commands, gRPC and HTTP; a file that changes; a flood; and no secret in any log."""

import asyncio
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx2
import pytest

from expertmesh.v1.admin_pb2 import GetStatusRequest
from expertmesh.v1.admin_pb2_grpc import AdminStub
from expertmesh.v1.inference_pb2 import GenerateRequest, TokenIds
from expertmesh.v1.inference_pb2_grpc import InferenceStub
from tests.integration.conftest import CLI, POCKET, Server, serving

# A batch of two sequences, so that a flood waits at the gateway.
CONFIG = "max_sequences = 2\n"
WITHIN_S = 30.0


@dataclass
class Keyed:
    """A server with keys. secrets: by name. logs: the folder of all that it and its Ray write."""

    server: Server
    file: Path
    secrets: dict[str, str]
    logs: Path

    def code(self, name: str) -> grpc.StatusCode:
        """Return what a short request of a key ends with."""
        request = GenerateRequest(token_ids=TokenIds(ids=[5, 6, 7]), max_tokens=2)
        with self.server.channel() as channel:
            try:
                InferenceStub(channel).GenerateOnce(request, metadata=self.bearer(name), timeout=60)
            except grpc.RpcError as error:
                code: grpc.StatusCode = error.code()
                return code
        return grpc.StatusCode.OK

    def bearer(self, name: str) -> tuple[tuple[str, str], ...]:
        return (("authorization", f"Bearer {self.secrets[name]}"),)


def keys(*args: str) -> str:
    return subprocess.run([*CLI, "keys", *args], capture_output=True, text=True, check=True, timeout=60).stdout


def create(file: Path, name: str, *options: str) -> str:
    """Make a key and return its secret."""
    return str(json.loads(keys("create", name, *options, "--file", str(file), "--json"))["secret"])


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keyed]:
    home = tmp_path_factory.mktemp("keys")
    config = home / "serve.toml"
    config.write_text(CONFIG)
    file = home / "keys.toml"
    secrets = {name: create(file, name) for name in ("alice", "bob")}
    secrets["root"] = create(file, "root", "--role", "admin")
    # Short, as Ray's sockets are in it.
    logs = Path(tempfile.mkdtemp(prefix="em-keys-"))
    options = ["--keys", str(file), "--config", str(config), "--dtype", "float32", "--http-port", "0"]
    try:
        with serving(POCKET, home, *options, env={"TMPDIR": str(logs)}) as server:
            yield Keyed(server, file, secrets, logs)
    finally:
        shutil.rmtree(logs, ignore_errors=True)


def test_roles_over_grpc_http_and_the_command_line(keyed: Keyed) -> None:
    assert keyed.code("alice") is keyed.code("root") is grpc.StatusCode.OK
    keyed.secrets["mallory"] = "em-" + "m" * 43
    assert keyed.code("mallory") is grpc.StatusCode.UNAUTHENTICATED
    with keyed.server.channel() as channel:
        admin = AdminStub(channel)
        assert admin.GetStatus(GetStatusRequest(), metadata=keyed.bearer("root"), timeout=60).ready
        with pytest.raises(grpc.RpcError) as caught:
            admin.GetStatus(GetStatusRequest(), metadata=keyed.bearer("alice"), timeout=60)
    assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
    body = {"model": POCKET.name, "prompt": [5, 6, 7], "max_tokens": 2}
    with httpx2.Client(base_url=keyed.server.http_url, timeout=60) as http:
        codes = [
            http.post("/v1/completions", json=body, headers={"authorization": f"Bearer {secret}"}).status_code
            for secret in (keyed.secrets["alice"], keyed.secrets["mallory"])
        ]
        assert [*codes, http.post("/v1/completions", json=body).status_code] == [200, 401, 401]
        assert http.get("/health").status_code == 200
    status = [*CLI, "status", "--url", keyed.server.address, "--json"]
    for name, exit_code in (("root", 0), ("alice", 1)):
        env = {**os.environ, "EXPERTMESH_API_KEY": keyed.secrets[name]}
        ended = subprocess.run(status, capture_output=True, text=True, env=env, timeout=60, check=False)
        assert ended.returncode == exit_code, ended.stderr
        assert keyed.secrets[name] not in ended.stdout + ended.stderr


def test_the_file_is_followed_while_streams_run(keyed: Keyed) -> None:
    keyed.secrets["carol"] = create(keyed.file, "carol")
    assert until(keyed, "carol", grpc.StatusCode.OK)
    request = GenerateRequest(token_ids=TokenIds(ids=[5, 6, 7]), max_tokens=300, ignore_eos=True)
    with keyed.server.channel() as channel:
        stream = InferenceStub(channel).Generate(request, metadata=keyed.bearer("carol"))
        num_tokens = len(next(stream).token_ids)
        keys("revoke", "carol", "--file", str(keyed.file))
        assert until(keyed, "carol", grpc.StatusCode.UNAUTHENTICATED)
        num_tokens += sum(len(message.token_ids) for message in stream)
    assert num_tokens == 300
    whole = keyed.file.read_text()
    keyed.file.write_text("[[key]")
    time.sleep(1.5)  # the gateway looks twice a second; what it must not do has no event to wait for
    assert keyed.code("alice") is grpc.StatusCode.OK
    keyed.file.write_text(whole)


def until(keyed: Keyed, name: str, code: grpc.StatusCode) -> bool:
    deadline_s = time.monotonic() + WITHIN_S
    while (seen := keyed.code(name)) is not code and time.monotonic() < deadline_s:
        time.sleep(0.1)
    return seen is code


async def test_a_flood_of_one_key_leaves_another_its_share(keyed: Keyed) -> None:
    ended: list[str] = []

    async def run(stub: Any, name: str) -> None:
        request = GenerateRequest(token_ids=TokenIds(ids=[5, 6, 7]), max_tokens=24, ignore_eos=True)
        await stub.GenerateOnce(request, metadata=keyed.bearer(name))
        ended.append(name)

    async with grpc.aio.insecure_channel(keyed.server.address) as channel:
        stub: Any = InferenceStub(channel)
        flood = [asyncio.create_task(run(stub, "alice")) for _ in range(40)]
        while not ended:  # noqa: ASYNC110 - all were sent once the first has ended
            await asyncio.sleep(0.01)
        await asyncio.gather(*(run(stub, "bob") for _ in range(5)))
        num_alice = ended.count("alice")
        await asyncio.gather(*flood)
    assert ended.count("alice") == 40
    # One for one, and what was under way: some 10 of 40. First come, first served would be 40.
    assert num_alice < 25, ended


def test_no_secret_is_in_any_log(keyed: Keyed) -> None:
    files = [path for path in keyed.logs.rglob("*") if path.is_file()] + [keyed.server.log, keyed.file]
    texts = {path: path.read_bytes() for path in files}
    assert any("gateway" in path.name.lower() or "serve" in path.name.lower() for path in texts), sorted(texts)
    for name, secret in keyed.secrets.items():
        assert not [path for path, text in texts.items() if secret.encode() in text], name
