"""Who may call which HTTP path, with keys and without, and what each is told."""

from pathlib import Path
from typing import Any

import openai
import pytest

from expertmesh.actors.gateway.http_access import needed_role
from expertmesh.actors.gateway.key_book import KeyBook
from expertmesh.cluster.api_keys import Role
from tests.unit.api_keys import book, key, secret_of, write_keys
from tests.unit.gateway_fakes import MODEL, FakeWorker
from tests.unit.openai_server import running

OPEN = ("/health", "/ready", "/docs", "/openapi.json")
ASKED: dict[str, Any] = {"model": MODEL.name, "prompt": [10, 20, 30], "max_tokens": 5}


def both(tmp_path: Path) -> KeyBook:
    return book(tmp_path, key("alice"), key("root", "admin"))


def header(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret_of(name)}"}


@pytest.mark.parametrize(
    ("path", "role"),
    [
        ("/", None),
        ("/health", None),
        ("/page/live.css", None),
        ("/v1/completions", Role.INFERENCE),
        ("/v1/models/a/b", Role.INFERENCE),
        ("/v1", Role.ADMIN),
        ("/live/state", Role.ADMIN),
        ("/live", Role.ADMIN),
        ("/healthy", Role.ADMIN),
        ("/health/x", Role.ADMIN),
        ("//v1/completions", Role.ADMIN),
        ("/new", Role.ADMIN),
        ("", Role.ADMIN),
    ],
)
def test_roles_of_paths(path: str, role: Role | None) -> None:
    assert needed_role(path) is role


async def test_openais_client_with_a_key_an_unknown_one_and_none(tmp_path: Path) -> None:
    worker = FakeWorker("a")
    async with running(worker, keys=both(tmp_path)) as up:
        alice = up.client.with_options(api_key=secret_of("alice"))
        assert (await alice.completions.create(**ASKED)).usage
        num_submitted = len(worker.submitted)
        for stream in (False, True):
            with pytest.raises(openai.AuthenticationError) as caught:
                await up.client.completions.create(**ASKED, stream=stream)
            assert (caught.value.code, caught.value.type) == ("invalid_api_key", "invalid_request_error")
            assert caught.value.response.headers["www-authenticate"] == "Bearer"
        answer = await up.http.post("/v1/completions", json=ASKED)
    assert answer.status_code == 401
    assert answer.json()["error"]["message"] == "an API key is needed: send it as `authorization: Bearer KEY`"
    assert len(worker.submitted) == num_submitted


async def test_health_and_the_description_are_open(tmp_path: Path) -> None:
    async with running(FakeWorker("a"), keys=both(tmp_path), host="0.0.0.0") as up:  # noqa: S104 - not bound
        assert [(await up.http.get(path)).status_code for path in OPEN] == [200] * len(OPEN)


async def test_what_is_live_is_for_admins(tmp_path: Path) -> None:
    keys = both(tmp_path)
    async with running(FakeWorker("a"), keys=keys) as up:
        answers = [await up.http.get("/live/state", headers=who) for who in ({}, header("alice"), header("root"))]
    # There is no such path here: only who is let in learns that.
    assert [answer.status_code for answer in answers] == [401, 403, 404]
    assert answers[1].json()["error"]["code"] == "insufficient_permissions"
    assert keys.refused == {"UNAUTHENTICATED": 1, "PERMISSION_DENIED": 1}


async def test_without_keys_what_is_live_is_for_loopback_by_address_and_by_name() -> None:
    async with running(FakeWorker("a")) as up:
        hosts = ("127.0.0.1:8000", "localhost", "[::1]:8000", "evil.example:8000", "127.0.0.1.evil.example")
        codes = [(await up.http.get("/live/state", headers={"Host": host})).status_code for host in hosts]
        assert codes == [404, 404, 404, 403, 403]
        assert (await up.http.get("/v1/models", headers={"Host": "any.example"})).status_code == 200
    async with running(FakeWorker("a"), host="0.0.0.0") as up:  # noqa: S104 - not bound
        refused = await up.http.get("/live/state", headers=header("root"))
        assert refused.status_code == 403
        assert "has no API keys: `expertmesh keys create" in refused.json()["error"]["message"]
        assert (await up.client.completions.create(**ASKED)).usage


async def test_a_key_that_was_just_made_and_one_that_was_revoked(tmp_path: Path) -> None:
    keys = both(tmp_path)
    async with running(FakeWorker("a"), keys=keys) as up:
        write_keys(tmp_path / "keys.toml", key("bob"))
        keys.look()
        codes = [(await up.http.get("/v1/models", headers=header(name))).status_code for name in ("alice", "bob")]
    assert codes == [401, 200]
