"""TLS and mutual TLS on a real gRPC port: who is let in, and certificates that change while streams run."""

import asyncio
import logging
import socket
import ssl
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import grpc
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, PrivateFormat

from expertmesh.actors.gateway.credentials import CertificateWatch
from expertmesh.cluster.errors import InputError
from expertmesh.cluster.settings import TlsSettings
from expertmesh.v1.inference_pb2 import GetModelRequest
from expertmesh.v1.inference_pb2_grpc import InferenceStub
from tests.certificates import DAY, NOW, Pair, client_context, make
from tests.unit.gateway_fakes import FakeWorker, fake_output
from tests.unit.gateway_server import Running, error_of, request, running, sampling

PROMPT = (10, 20, 30)


@dataclass(frozen=True)
class Files:
    """A server's files, and who signed what is in them."""

    folder: Path
    authority: Pair
    clients_authority: Pair

    @property
    def settings(self) -> TlsSettings:
        return TlsSettings(cert_file=self.folder / "server.pem", key_file=self.folder / "server.key")

    @property
    def mutual(self) -> TlsSettings:
        return TlsSettings(**{**dict(self.settings), "client_ca_file": self.folder / "clients-ca.pem"})

    def put(self, pair: Pair) -> Pair:
        pair.write(self.folder, "server")
        return pair

    def client(self, name: str, issuer: Pair) -> tuple[Path, Path]:
        return make(name, issuer).write(self.folder, name)


@pytest.fixture
def files(tmp_path: Path) -> Files:
    made = Files(tmp_path, make("authority"), make("clients' authority"))
    made.put(make("server", made.authority))
    made.clients_authority.write(tmp_path, "clients-ca")
    return made


def credentials(authority: Pair, own: tuple[Path, Path] | None = None) -> grpc.ChannelCredentials:
    if own is None:
        return grpc.ssl_channel_credentials(authority.cert_pem)
    return grpc.ssl_channel_credentials(authority.cert_pem, own[1].read_bytes(), own[0].read_bytes())


async def answers(up: Running, secret: grpc.ChannelCredentials) -> bool:
    """Say whether a client is let in; one that is not gets UNAVAILABLE and nothing else."""
    async with grpc.aio.secure_channel(up.server.address, secret) as channel:
        try:
            return bool((await InferenceStub(channel).GetModel(GetModelRequest(), timeout=20)).name)
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE:
                raise
            return False


async def handshake(up: Running, context: ssl.SSLContext) -> tuple[str, str]:
    """Return the serial number of the server's certificate, and the version of TLS."""

    def connect() -> tuple[str, str]:
        plain = socket.create_connection(("127.0.0.1", up.server.port), timeout=20)
        with plain, context.wrap_socket(plain, server_hostname="localhost") as secure:
            certificate = secure.getpeercert()
            assert certificate is not None
            return str(certificate["serialNumber"]), str(secure.version())

    return await asyncio.to_thread(connect)


async def test_a_client_that_trusts_another_authority_does_not_connect(files: Files) -> None:
    async with running(FakeWorker("a"), tls=files.settings) as up:
        assert await answers(up, credentials(files.authority))
        assert not await answers(up, credentials(make("another authority")))


async def test_clients_need_a_certificate_of_the_right_authority(files: Files) -> None:
    async with running(FakeWorker("a"), tls=files.mutual) as up:
        own = files.client("client", files.clients_authority)
        assert await answers(up, credentials(files.authority, own))
        assert not await answers(up, credentials(files.authority))
        strange = files.client("stranger", make("another authority"))
        assert not await answers(up, credentials(files.authority, strange))
        assert not await answers(up, credentials(files.authority, files.client("server's", files.authority)))
        expired = make("late", files.clients_authority, begins=NOW - 2 * DAY, ends=NOW - DAY)
        assert not await answers(up, credentials(files.authority, expired.write(files.folder, "late")))


async def test_tls_before_1_2_is_refused(files: Files) -> None:
    async with running(FakeWorker("a"), tls=files.settings) as up:
        context = client_context(files.authority)
        assert (await handshake(up, context))[1] == "TLSv1.3"
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        assert (await handshake(up, context))[1] == "TLSv1.2"
        # OpenSSL itself is talked into offering 1.1, so that it is the server who refuses.
        context = client_context(files.authority)
        context.set_ciphers("ALL:@SECLEVEL=0")
        with pytest.warns(DeprecationWarning, match="TLSv1_1"):
            context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
        with pytest.raises(OSError, match=r"PROTOCOL_VERSION|EOF|reset"):
            await handshake(up, context)


async def test_a_stream_goes_on_while_the_certificate_changes_and_new_connections_get_the_new_one(
    files: Files,
) -> None:
    context = client_context(files.authority)
    async with (
        running(FakeWorker("a", step_s=0.005), tls=files.settings) as up,
        grpc.aio.secure_channel(up.server.address, credentials(files.authority)) as channel,
    ):
        before = (await handshake(up, context))[0]
        stream = aiter(InferenceStub(channel).Generate(request(*PROMPT, seed=6, max_tokens=100)))
        got = list((await anext(stream)).token_ids)
        second = files.put(make("second", files.authority))
        assert (await handshake(up, context))[0] == second.serial != before
        got += [token async for message in stream for token in message.token_ids]
        assert got == fake_output(PROMPT, sampling(6, 100))
        # Even one of another authority: who trusts it connects, who trusted the first does not any more.
        other = make("another authority")
        files.put(make("third", other))
        assert await answers(up, credentials(other))
        assert not await answers(up, credentials(files.authority))


async def test_the_clients_authority_is_reloaded_too(files: Files) -> None:
    own = files.client("client", files.clients_authority)
    async with running(FakeWorker("a"), tls=files.mutual) as up:
        assert await answers(up, credentials(files.authority, own))
        other = make("another authority")
        other.write(files.folder, "clients-ca")
        assert not await answers(up, credentials(files.authority, own))
        assert await answers(up, credentials(files.authority, files.client("new", other)))


def half(pair: Pair) -> bytes:
    return pair.cert_pem[: len(pair.cert_pem) // 2]


def make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


BAD: dict[str, tuple[Callable[[Files], object], str]] = {
    "half written": (lambda f: f.settings.cert_file.write_bytes(half(make("b", f.authority))), "no certificate in PEM"),
    "empty": (lambda f: f.settings.cert_file.write_bytes(b""), "no certificate in PEM"),
    "gone": (lambda f: f.settings.cert_file.unlink(), "No such file"),
    "key gone": (lambda f: f.settings.key_file.unlink(), "No such file"),
    "a folder": (lambda f: make_folder(f.settings.key_file), "Is a directory"),
    "no key": (lambda f: f.settings.key_file.write_bytes(b"-----BEGIN"), "no private key in PEM"),
    "another's key": (
        lambda f: f.settings.key_file.write_bytes(make("b", f.authority).key_pem),
        "not that of the certificate in",
    ),
    "expired": (
        lambda f: f.put(make("b", f.authority, begins=NOW - 2 * DAY, ends=NOW - DAY)),
        "the certificate expired at",
    ),
    "not yet valid": (
        lambda f: f.put(make("b", f.authority, begins=NOW + DAY, ends=NOW + 2 * DAY)),
        "not valid before",
    ),
    "a strange curve": (lambda f: f.put(make("b", f.authority, curve=ec.SECP256K1())), "curve secp256k1"),
    "encrypted": (
        lambda f: f.settings.key_file.write_bytes(
            make("b").key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret"))
        ),
        "is encrypted",
    ),
    "no authority": (lambda f: (f.folder / "clients-ca.pem").write_bytes(b"?"), "clients-ca.pem: no certificate"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_cannot_be_used_is_refused_at_the_start_in_one_line(files: Files, what: str) -> None:
    spoil, message = BAD[what]
    spoil(files)
    with pytest.raises(InputError, match=message) as caught:
        CertificateWatch(files.mutual)
    assert str(caught.value).startswith(str(files.folder))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("what", BAD)
def test_what_cannot_be_used_later_leaves_the_old_one_and_is_said_once(
    files: Files, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    watch = CertificateWatch(files.mutual)
    spoil, message = BAD[what]
    spoil(files)
    assert watch.changed() is None
    assert watch.changed() is None
    (record,) = caplog.records
    assert (record.levelno, "certificate in force stays" in record.message) == (logging.WARNING, True)
    assert message in record.message
    assert "PRIVATE" not in record.message
    if files.settings.key_file.is_dir():
        files.settings.key_file.rmdir()
    files.clients_authority.write(files.folder, "clients-ca")
    files.put(make("good again", files.authority))
    assert watch.changed() is not None
    assert watch.changed() is None


async def test_a_bad_file_disturbs_no_handshake(files: Files) -> None:
    context = client_context(files.authority)
    async with running(FakeWorker("a"), tls=files.settings) as up:
        before = await handshake(up, context)
        files.settings.cert_file.write_bytes(half(make("b", files.authority)))
        assert await handshake(up, context) == before


def test_a_certificate_that_expires_while_it_is_in_force_is_said_once(
    files: Files, caplog: pytest.LogCaptureFixture
) -> None:
    now = [NOW]
    watch = CertificateWatch(files.settings, lambda: now[0])
    now[0] = watch.valid_until + timedelta(seconds=1)
    assert watch.changed() is None
    assert watch.changed() is None
    assert [record.message for record in caplog.records] == [
        f"{files.settings.cert_file}: expired at {watch.valid_until}, clients refuse it"
    ]


async def test_plaintext_and_garbage_on_the_port_are_turned_away_and_disturb_nobody(files: Files) -> None:
    async with (
        running(FakeWorker("a", step_s=0.005), tls=files.settings) as up,
        grpc.aio.secure_channel(up.server.address, credentials(files.authority)) as channel,
    ):
        stream = aiter(InferenceStub(channel).Generate(request(*PROMPT, seed=6, max_tokens=60)))
        got = list((await anext(stream)).token_ids)
        error = await error_of(up.inference.GetModel(GetModelRequest(), timeout=20))  # its channel is in plaintext
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        for noise in (b"\x16\x03\x01\xff\xff" + bytes(200), b"GET / HTTP/1.1\r\n\r\n", bytes(range(256)) * 100):
            reader, writer = await asyncio.open_connection("127.0.0.1", up.server.port)
            writer.write(noise)
            with suppress(ConnectionError):  # it is cut off
                await asyncio.wait_for(reader.read(), 20)
            writer.close()
        got += [token async for message in stream for token in message.token_ids]
    assert got == fake_output(PROMPT, sampling(6, 60))


async def test_a_silent_connection_does_not_keep_others_from_their_handshake(files: Files) -> None:
    async with running(FakeWorker("a"), tls=files.settings) as up:
        silent = [socket.create_connection(("127.0.0.1", up.server.port)) for _ in range(50)]
        assert await answers(up, credentials(files.authority))
        for one in silent:
            one.close()


def test_a_key_is_in_no_text(files: Files) -> None:
    watch = CertificateWatch(files.settings)
    assert "PRIVATE" not in repr(watch._in_force)
    assert "certificates" in repr(watch._in_force)
