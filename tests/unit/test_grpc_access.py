"""Who may call which gRPC method, with keys and without, and what each is told."""

import asyncio
import logging
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from expertmesh.actors.gateway.access import is_loopback
from expertmesh.actors.gateway.grpc_access import needed_role
from expertmesh.actors.gateway.key_book import KeyBook
from expertmesh.cluster.api_keys import Role
from expertmesh.v1 import admin_pb2, inference_pb2
from expertmesh.v1.admin_pb2 import GetStatusRequest, WatchLoadRequest
from expertmesh.v1.inference_pb2 import CancelRequest, GetModelRequest, ResumeRequest
from tests.unit.api_keys import bearer, book, key, secret_of, write_keys
from tests.unit.gateway_fakes import FakeWorker, fake_output
from tests.unit.gateway_server import Running, error_of, request, running, sampling, until

PROMPT = (10, 20, 30)
WRONG = (
    (),
    (("authorization", f"Bearer {secret_of('mallory')}"),),
    (("authorization", secret_of("alice")),),
    (("authorization", f"Basic {secret_of('alice')}"),),
    (("authorization", ""),),
    (("x-api-key", secret_of("alice")),),
)


def both(tmp_path: Path) -> KeyBook:
    return book(tmp_path, key("alice"), key("root", "admin"))


def calls(up: Running, metadata: Any) -> dict[str, Any]:
    """Return a call of each kind of method."""
    return {
        "GetModel": up.inference.GetModel(GetModelRequest(), metadata=metadata),
        "Generate": up.inference.Generate(request(seed=6), metadata=metadata),
        "GenerateOnce": up.inference.GenerateOnce(request(seed=6), metadata=metadata),
        "GetStatus": up.admin.GetStatus(GetStatusRequest(), metadata=metadata),
        "WatchLoad": up.admin.WatchLoad(WatchLoadRequest(period_s=0.1), metadata=metadata),
    }


@pytest.mark.parametrize("metadata", WRONG)
async def test_without_a_known_key_nothing_is_answered(metadata: Any, tmp_path: Path) -> None:
    worker = FakeWorker("a")
    async with running(worker, keys=both(tmp_path)) as up:
        errors = {name: await error_of(call) for name, call in calls(up, metadata).items()}
    assert {name: error.code() for name, error in errors.items()} == dict.fromkeys(
        errors, grpc.StatusCode.UNAUTHENTICATED
    )
    assert not worker.submitted


async def test_a_key_of_the_role_inference_generates_and_does_not_administer(tmp_path: Path) -> None:
    keys = both(tmp_path)
    async with running(FakeWorker("a"), keys=keys) as up:
        made = calls(up, bearer("alice"))
        answer = await made.pop("GenerateOnce")
        assert (await made.pop("GetModel")).vocab_size == 257
        got = [token async for message in made.pop("Generate") for token in message.token_ids]
        errors = [await error_of(call) for call in made.values()]
    assert list(answer.outputs[0].token_ids) == got
    assert [error.code() for error in errors] == [grpc.StatusCode.PERMISSION_DENIED] * 2
    assert errors[0].details() == "this needs an API key of the role admin; alice has inference"
    assert keys.refused == {"UNAUTHENTICATED": 0, "PERMISSION_DENIED": 2}


async def test_an_admin_may_do_all(tmp_path: Path) -> None:
    async with running(FakeWorker("a"), keys=both(tmp_path)) as up:
        assert (await up.admin.GetStatus(GetStatusRequest(), metadata=bearer("root"))).epoch == 3
        assert (await up.inference.GenerateOnce(request(), metadata=bearer("root"))).outputs[0].token_ids


async def test_health_and_reflection_are_open(tmp_path: Path) -> None:
    async with running(keys=both(tmp_path), host="0.0.0.0") as up:  # noqa: S104 - the worst case
        answer = await health_pb2_grpc.HealthStub(up.channel).Check(health_pb2.HealthCheckRequest())
        assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING
        stub = reflection_pb2_grpc.ServerReflectionStub(up.channel)
        asked = reflection_pb2.ServerReflectionRequest(list_services="")
        async for listed in stub.ServerReflectionInfo(iter([asked])):
            assert "expertmesh.v1.Admin" in {one.name for one in listed.list_services_response.service}


async def test_without_keys_loopback_is_open_and_another_address_not_to_administer() -> None:
    async with running(FakeWorker("a")) as up:
        assert (await up.admin.GetStatus(GetStatusRequest())).epoch == 3
        assert (await up.inference.GenerateOnce(request(), metadata=bearer("any"))).outputs[0].token_ids
    async with running(FakeWorker("a"), host="0.0.0.0") as up:  # noqa: S104 - that is what is tested
        assert (await up.inference.GenerateOnce(request())).outputs[0].token_ids
        error = await error_of(up.admin.GetStatus(GetStatusRequest(), metadata=bearer("root")))
    assert error.code() is grpc.StatusCode.PERMISSION_DENIED
    assert "listens on 0.0.0.0 and has no API keys: `expertmesh keys create" in (error.details() or "")


@pytest.mark.parametrize(
    ("host", "is_local"),
    [
        ("127.0.0.1", True),
        ("127.8.9.1", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),  # noqa: S104 - not bound
        ("::", False),
        ("10.0.0.1", False),
        ("", False),
        ("localhost.example.org", False),
        ("127.0.0.1.example.org", False),
    ],
)
def test_what_loopback_is(host: str, is_local: bool) -> None:
    assert is_loopback(host) == is_local


def test_every_method_that_we_serve_has_a_role_and_any_other_needs_admin() -> None:
    for file, role in ((inference_pb2, Role.INFERENCE), (admin_pb2, Role.ADMIN)):
        for service in file.DESCRIPTOR.services_by_name.values():
            assert {needed_role(f"/{service.full_name}/{method.name}") for method in service.methods} == {role}
    for unknown in ("/new.Service/Do", "/grpc.health.v1.Healthy/Check", "nothing", "", "//expertmesh.v1.Inference/X"):
        assert needed_role(unknown) is Role.ADMIN


async def test_a_method_that_there_is_not_is_told_to_admins_alone(tmp_path: Path) -> None:
    async with running(keys=both(tmp_path)) as up:
        unknown: Any = up.channel.unary_unary("/new.Service/Do")
        codes = [(await error_of(unknown(b"", metadata=who))).code() for who in ((), bearer("alice"), bearer("root"))]
    assert codes == [
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.UNIMPLEMENTED,
    ]


async def test_a_revoked_key_is_refused_and_its_running_stream_goes_on(tmp_path: Path) -> None:
    worker, keys = FakeWorker("a"), both(tmp_path)
    async with running(worker, keys=keys) as up:
        stream = aiter(up.inference.Generate(request(max_tokens=200, seed=6), metadata=bearer("alice")))
        got = list((await anext(stream)).token_ids)
        write_keys(tmp_path / "keys.toml", key("root", "admin"))
        assert keys.look()
        error = await error_of(up.inference.GenerateOnce(request(), metadata=bearer("alice")))
        got += [token async for message in stream for token in message.token_ids]
    assert error.code() is grpc.StatusCode.UNAUTHENTICATED
    assert got == fake_output(PROMPT, sampling(6, 200))


async def test_a_stream_is_there_for_its_own_key_alone(tmp_path: Path) -> None:
    worker, keys = FakeWorker("a", step_s=0.01), book(tmp_path, key("alice"), key("bob"), key("root", "admin"))
    kept = request(max_tokens=500, seed=6, request_id="r", idempotency_key="k")
    async with running(worker, keys=keys) as up:
        stream = up.inference.Generate(kept, metadata=bearer("alice"))
        first = await stream.read()
        for other in ("bob", "root"):
            resumed = await error_of(up.inference.Resume(ResumeRequest(request_id="r"), metadata=bearer(other)))
            assert resumed.code() is grpc.StatusCode.NOT_FOUND
            cancelled = await error_of(up.inference.Cancel(CancelRequest(request_id="r"), metadata=bearer(other)))
            assert cancelled.code() is grpc.StatusCode.NOT_FOUND
        # The same names of another key are another stream, and what bob cancels is his own.
        own = up.inference.Generate(
            request(max_tokens=5, seed=7, request_id="r", idempotency_key="k"), metadata=bearer("bob")
        )
        assert [token async for one in own for token in one.token_ids] == fake_output(PROMPT, sampling(7, 5))
        await up.inference.Cancel(CancelRequest(request_id="r"), metadata=bearer("bob"))
        await until(lambda: len(worker.live_ids) == 1)
        again = up.inference.Resume(
            ResumeRequest(request_id="r", tokens_received=[len(first.token_ids)]), metadata=bearer("alice")
        )
        assert (await again.read()).token_ids
        await up.inference.Cancel(CancelRequest(request_id="r"), metadata=bearer("alice"))
        await until(lambda: not worker.live_ids)
        stream.cancel()
        again.cancel()


async def test_no_secret_is_in_a_log_an_error_or_a_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = ("alice", "root", "mallory")
    texts = []
    with caplog.at_level(logging.DEBUG):
        keys = both(tmp_path)
        async with running(FakeWorker("a"), keys=keys) as up:
            for metadata in (*(bearer(name) for name in names), *WRONG):
                for name, call in calls(up, metadata).items():
                    if name == "WatchLoad":
                        call.cancel()
                    elif name == "Generate":
                        texts += [repr(await asyncio.gather(_read(call), return_exceptions=True))]
                    else:
                        texts += [repr(await asyncio.gather(call, return_exceptions=True))]
            texts += [repr(keys.__dict__), repr([vars(up.engine), keys.find(secret_of("alice"))])]
            (tmp_path / "keys.toml").write_text(f"[[key]]\nsha256 = '{secret_of('alice')}'")
            keys.look()
    texts += [caplog.text, *(str(vars(record)) for record in caplog.records)]
    assert "alice" in " ".join(texts)
    assert "keys file" in caplog.text
    for name in names:
        assert secret_of(name)[4:] not in " ".join(texts)


async def _read(call: Any) -> int:
    return len([message async for message in call])
