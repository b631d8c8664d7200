"""A served model over mutual TLS: clients, commands, HTTP; connections that break; certificates that change."""

import asyncio
import json
import os
import socket
import subprocess
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import grpc
import pytest

from expertmesh.client import AsyncClient, Client, ConnectionOptions
from tests.certificates import Pair, client_context, make
from tests.in_a_thread import in_a_thread
from tests.integration.conftest import CLI, POCKET, Server, serving
from tests.relay import relayed

PROMPT = [5, 6, 7]
NUM_TOKENS = 200
# Of some 60 bytes a message, and a handshake: in the middle of the stream.
CUT_AT = 7000


@dataclass(frozen=True)
class Secured:
    """A server that asks clients for a certificate, and the files of both."""

    server: Server
    folder: Path
    authority: Pair
    temporary: Path

    @property
    def options(self) -> ConnectionOptions:
        files = [(self.folder / name).read_bytes() for name in ("authority.pem", "client.key", "client.pem")]
        return {"credentials": grpc.ssl_channel_credentials(*files), "timeout_s": 60}

    def run(self, *arguments: str, url: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a command with the address and the files in its environment."""
        env = {
            **os.environ,
            "EXPERTMESH_URL": url or self.server.address,
            **{f"EXPERTMESH_TLS_{name}": str(self.folder / file) for name, file in FILES.items()},
            **environment,
        }
        command = [*CLI, *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=90, env=env, check=False)


FILES = {"CA": "authority.pem", "CERT": "client.pem", "KEY": "client.key"}


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    folder = tmp_path_factory.mktemp("secured")
    authority = make("authority")
    authority.write(folder, "authority")
    cert_file, key_file = make("server", authority).write(folder, "server")
    make("client", authority).write(folder, "client")
    tls = ["--tls-cert", str(cert_file), "--tls-key", str(key_file), "--tls-client-ca", str(folder / "authority.pem")]
    # Where Ray's logs are; its sockets need a short path.
    with (
        TemporaryDirectory(prefix="em-") as temporary,
        serving(POCKET, folder, "--http-port", "0", "--dtype", "float32", *tls, env={"TMPDIR": temporary}) as server,
    ):
        yield Secured(server, folder, authority, Path(temporary))


def from_a_thread(address: str, options: ConnectionOptions) -> list[int]:
    with Client(address, **options) as client:
        stream = client.generate(PROMPT, max_tokens=NUM_TOKENS, ignore_eos=True)
        return [token for message in stream for token in message.token_ids]


def from_a_loop(address: str, options: ConnectionOptions) -> list[int]:
    async def generate() -> list[int]:
        async with AsyncClient(address, **options) as client:
            stream = client.generate(PROMPT, max_tokens=NUM_TOKENS, ignore_eos=True)
            return [token async for message in stream for token in message.token_ids]

    return asyncio.run(generate())


Generate = Callable[[str, ConnectionOptions], list[int]]


@pytest.mark.parametrize("generate", [from_a_thread, from_a_loop])
def test_a_stream_whose_connection_breaks_has_each_token_once(pocket: Server, generate: Generate) -> None:
    whole = generate(pocket.address, {})
    with in_a_thread(relayed(int(pocket.address.rpartition(":")[2]), CUT_AT)) as relay:
        assert generate(relay.address, {}) == whole
    assert len(whole) == NUM_TOKENS
    assert relay.num_connections > 1


@pytest.mark.parametrize("generate", [from_a_thread, from_a_loop])
def test_the_same_over_mutual_tls(secured: Secured, generate: Generate) -> None:
    whole = generate(secured.server.address, secured.options)
    with in_a_thread(relayed(int(secured.server.address.rpartition(":")[2]), CUT_AT)) as relay:
        assert generate(relay.address, secured.options) == whole
    assert len(whole) == NUM_TOKENS
    assert relay.num_connections > 1


def test_the_command_resumes_too(secured: Secured) -> None:
    asked = ("generate", "--token-ids", "5,6,7", "--max-tokens", str(NUM_TOKENS), "--ignore-eos", "--json")
    whole = secured.run(*asked)
    with in_a_thread(relayed(int(secured.server.address.rpartition(":")[2]), CUT_AT)) as relay:
        broken = secured.run(*asked, url=relay.address)
    assert json.loads(broken.stdout)["token_ids"] == json.loads(whole.stdout)["token_ids"], broken.stderr
    assert json.loads(whole.stdout)["usage"]["completion_tokens"] == NUM_TOKENS
    assert relay.num_connections > 1


def test_commands_work_with_a_certificate_and_not_without(secured: Secured) -> None:
    assert json.loads(secured.run("status", "--json").stdout)["ready"] is True
    scaled = secured.run("scale", "--shards", "2", "--wait", "--json")
    assert json.loads(scaled.stdout)["phase"] == "DONE", scaled.stderr
    assert json.loads(secured.run("ops", "--json").stdout)
    for without in ({"EXPERTMESH_TLS_CERT": "", "EXPERTMESH_TLS_KEY": ""}, dict.fromkeys(FILES_IN_ENVIRONMENT, "")):
        refused = secured.run("status", **without)
        assert refused.returncode == 1
        assert refused.stderr.startswith("error: no answer from "), refused.stderr


FILES_IN_ENVIRONMENT = [f"EXPERTMESH_TLS_{name}" for name in FILES]


def test_http_is_under_the_same_certificate(secured: Secured) -> None:
    assert secured.server.http_url.startswith("https://")
    context = client_context(secured.authority)
    context.set_alpn_protocols(["http/1.1"])
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context))
    with opener.open(f"{secured.server.http_url}/v1/models", timeout=30) as answer:
        assert json.load(answer)["data"][0]["id"] == "pocket-moe"


def test_a_new_certificate_is_shown_to_new_connections_while_a_stream_goes_on(secured: Secured) -> None:
    def serial() -> str:
        context = client_context(secured.authority, (secured.folder / "client.pem", secured.folder / "client.key"))
        host, _, port = secured.server.address.rpartition(":")
        plain = socket.create_connection((host, int(port)), timeout=20)
        with plain, context.wrap_socket(plain, server_hostname="localhost") as secure:
            certificate = secure.getpeercert()
            assert certificate is not None
            return str(certificate["serialNumber"])

    whole = from_a_thread(secured.server.address, secured.options)
    before = serial()
    with Client(secured.server.address, **secured.options) as client:
        stream = client.generate(PROMPT, max_tokens=NUM_TOKENS, ignore_eos=True)
        got = list(next(stream).token_ids)
        new = make("server", secured.authority)
        new.write(secured.folder, "server")
        assert serial() == new.serial != before
        got += [token for message in stream for token in message.token_ids]
    assert got == whole


def test_no_secret_is_in_a_log(secured: Secured) -> None:
    key = (secured.folder / "server.key").read_text().splitlines()[1]
    refused = secured.run("status", EXPERTMESH_API_KEY="em-a-secret", EXPERTMESH_TLS_CERT="", EXPERTMESH_TLS_KEY="")
    logs = [path for path in secured.temporary.glob("expertmesh-*/ray/session_*/logs/**/*") if path.is_file()]
    assert len(logs) > 5
    texts = [secured.server.log.read_text(), refused.stdout, refused.stderr]
    texts += [path.read_text(errors="replace") for path in logs]
    for text in texts:
        assert key not in text
        assert "em-a-secret" not in text
