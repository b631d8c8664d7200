"""What clients show a server, and whom they trust: the Python clients and the commands, over TLS and with a key."""

import asyncio
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import grpc
import pytest
from google.protobuf.message import Message

from expertmesh.actors.cli import main
from expertmesh.actors.cli.server_options import Server
from expertmesh.client import AsyncClient, Client, ConnectionOptions
from expertmesh.client.connection import key_metadata
from expertmesh.v1.admin_pb2 import ListOperationsResponse, StatusResponse
from expertmesh.v1.inference_pb2 import FINISH_REASON_STOP, GenerateResponse
from tests.certificates import make

KEY = "em-0123456789"


@dataclass
class Heard:
    """A server that notes the key of each call."""

    folder: Path
    address: str = ""
    keys: list[str] = field(default_factory=list)

    def credentials(self, authority: str = "authority") -> grpc.ChannelCredentials:
        files = [f"{authority}.pem", "client.key", "client.pem"]
        return grpc.ssl_channel_credentials(*((self.folder / name).read_bytes() for name in files))


class Handler(grpc.GenericRpcHandler):
    """Answers what the tests ask, whatever the request says."""

    ANSWERS: ClassVar[dict[str, Message]] = {
        "GetStatus": StatusResponse(plan="a plan"),
        "ListOperations": ListOperationsResponse(),
        "Generate": GenerateResponse(text="ok", token_ids=[1], finish_reason=FINISH_REASON_STOP),
    }

    def __init__(self, heard: Heard) -> None:
        self._heard = heard

    def service(self, handler_call_details: Any) -> Any:
        metadata = dict(handler_call_details.invocation_metadata)
        self._heard.keys.append(metadata.get("authorization", ""))
        name = handler_call_details.method.rpartition("/")[2]
        answer = self.ANSWERS[name].SerializeToString()
        if name == "Generate":
            return grpc.unary_stream_rpc_method_handler(lambda _request, _context: iter([answer]))
        return grpc.unary_unary_rpc_method_handler(lambda _request, _context: answer)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Heard]:
    """A server that asks its clients for certificates."""
    heard = Heard(tmp_path)
    authority = make("authority")
    for name, pair in (("authority", authority), ("client", make("client", authority)), ("other", make("other"))):
        pair.write(tmp_path, name)
    own = make("server", authority)
    with ThreadPoolExecutor(4) as threads:
        listening = grpc.server(threads, handlers=[Handler(heard)])
        secret = grpc.ssl_server_credentials(
            [(own.key_pem, own.cert_pem)], authority.cert_pem, require_client_auth=True
        )
        heard.address = f"localhost:{listening.add_secure_port('127.0.0.1:0', secret)}"
        listening.start()
        yield heard
        listening.stop(grace=0).wait()


async def test_both_clients_show_certificate_and_key(server: Heard) -> None:
    options: ConnectionOptions = {"credentials": server.credentials(), "api_key": KEY, "timeout_s": 20}

    def from_a_thread() -> list[str]:
        with Client(server.address, **options) as client:
            return [client.status().plan, *(message.text for message in client.generate([1]))]

    async with AsyncClient(server.address, **options) as client:
        assert (await client.status()).plan == "a plan"
        assert [message.text async for message in client.generate([1])] == ["ok"]
    assert await asyncio.to_thread(from_a_thread) == ["a plan", "ok"]
    assert server.keys == [f"Bearer {KEY}"] * 4


def test_a_server_of_another_authority_hears_no_key(server: Heard) -> None:
    with (
        Client(server.address, credentials=server.credentials("other"), api_key=KEY, retries=0) as client,
        pytest.raises(grpc.RpcError) as caught,
    ):
        client.status()
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert server.keys == []


@pytest.mark.parametrize(
    ("address", "is_sent"),
    [
        *((address, True) for address in ("localhost:1", "127.0.0.1:1", "[::1]:1", "unix:/tmp/x")),
        *((address, False) for address in ("10.0.0.1:1", "example.org:1", "localhost.example.org:1", "[::]:1")),
    ],
)
def test_a_key_goes_over_plaintext_to_this_machine_alone(address: str, is_sent: bool) -> None:
    sent = (("authorization", f"Bearer {KEY}"),)
    secret = grpc.ssl_channel_credentials()
    assert key_metadata(address, {"api_key": KEY, "credentials": secret}) == sent
    assert key_metadata(address, {"api_key": KEY, "api_key_in_clear": True}) == sent
    assert key_metadata(address, {}) == ()
    if is_sent:
        assert key_metadata(address, {"api_key": KEY}) == sent
        return
    for kind in (Client, AsyncClient):
        with pytest.raises(ValueError, match=r"is not sent to .* over plaintext") as caught:
            kind(address, api_key=KEY)
        assert KEY not in str(caught.value)


@pytest.mark.parametrize("key", ["a b", "a\nb", "a\0b", "k\u00e9y"])
def test_a_key_that_no_header_can_hold_is_refused_and_not_shown(key: str) -> None:
    with pytest.raises(ValueError, match="not printable ASCII") as caught:
        key_metadata("localhost:1", {"api_key": key})
    assert key not in str(caught.value)


@dataclass
class Commands:
    """Runs the command line in this process, with the options of a server in the environment."""

    monkeypatch: pytest.MonkeyPatch
    capsys: pytest.CaptureFixture[str]

    def environment(self, **values: object) -> None:
        for name, value in values.items():
            self.monkeypatch.setenv(f"EXPERTMESH_{name.upper()}", str(value))

    def run(self, *args: str) -> tuple[int, str, str]:
        self.monkeypatch.setattr(sys, "argv", ["expertmesh", *args])
        with pytest.raises(SystemExit) as caught:
            main.main()
        captured = self.capsys.readouterr()
        assert isinstance(caught.value.code, int)
        return caught.value.code, captured.out, captured.err


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Commands:
    return Commands(monkeypatch, capsys)


def test_commands_take_files_and_key_from_options(server: Heard, commands: Commands) -> None:
    files = [str(server.folder / name) for name in ("authority.pem", "client.pem", "client.key")]
    options = ["--url", server.address, "--tls-ca", files[0], "--tls-cert", files[1], "--tls-key", files[2]]
    assert commands.run("status", "--json", *options, "--api-key", KEY)[0] == 0
    assert commands.run("generate", "x", *options, "--api-key", KEY)[:2] == (0, "ok\n")
    assert commands.run("ops", "--json", *options)[:2] == (0, "[]\n")
    assert server.keys == [f"Bearer {KEY}"] * 2 + [""]


def test_commands_take_files_and_key_from_the_environment(server: Heard, commands: Commands) -> None:
    commands.environment(url=server.address, api_key=KEY, tls_ca=server.folder / "authority.pem")
    commands.environment(tls_cert=server.folder / "client.pem", tls_key=server.folder / "client.key")
    assert commands.run("status", "--json")[0] == 0
    assert commands.run("generate", "x")[:2] == (0, "ok\n")
    assert server.keys == [f"Bearer {KEY}"] * 2


def test_what_commands_cannot_use_is_one_line_that_names_it(server: Heard, commands: Commands) -> None:
    folder = server.folder
    (folder / "not.pem").write_text("-----BEGIN")
    commands.environment(url=server.address, api_key=KEY)
    ca, cert, key = (str(folder / name) for name in ("authority.pem", "client.pem", "client.key"))
    for options, code, message in (
        (["--tls-ca", "/no/such"], 2, "/no/such: No such file"),
        (["--tls-ca", str(folder / "not.pem")], 2, "not.pem: no certificate"),
        (["--tls-cert", cert], 2, "--tls-cert and --tls-key go together"),
        (["--tls-cert", cert, "--tls-key", key], 2, "--tls-ca says whom to trust"),
        (["--tls-ca", ca, "--tls-cert", cert, "--tls-key", str(folder / "other.key")], 2, "other.key: the private key"),
        (["--tls-ca", ca], 1, "no answer from"),
        ([], 1, "--tls-ca is for a server with TLS"),
        (["--url", "example.org:1"], 2, "--api-key: the API key is not sent to example.org:1 over plaintext"),
    ):
        found_code, out, err = commands.run("status", *options)
        assert (found_code, out, err.count("\n")) == (code, "", 1), err
        assert message in err
        assert KEY not in err
    assert server.keys == []


def test_a_key_may_be_sent_in_clear_where_that_is_asked_for() -> None:
    options = Server(url="example.org:1", api_key=KEY, api_key_in_clear=True).connection_options()
    assert options["api_key"] == KEY


def test_a_server_shows_its_key_in_no_text() -> None:
    assert KEY not in repr(Server(url="localhost:1", api_key=KEY))
