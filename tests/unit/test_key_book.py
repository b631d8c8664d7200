"""The file of keys may change at any time; one that is broken changes nothing."""

import logging
import os
from datetime import UTC, datetime
from pathlib import Path

import pytest

from expertmesh.actors.gateway.key_book import KeyBook
from expertmesh.cluster.api_keys import Role
from expertmesh.cluster.errors import InputError, RateLimitError
from expertmesh.cluster.rate_limits import Limits
from tests.recorded_metrics import Recorded
from tests.unit.api_keys import book, key, secret_of, write_keys


def test_a_changed_file_is_followed(tmp_path: Path) -> None:
    keys = book(tmp_path, key("alice"))
    assert not keys.look()
    assert keys.names == ["alice"]
    write_keys(tmp_path / "keys.toml", key("bob", "admin", weight=2))
    assert keys.look()
    assert not keys.look()
    assert keys.find(secret_of("alice")) is None
    bob = keys.find(secret_of("bob"))
    assert bob is not None
    assert (bob.name, bob.role, bob.weight) == ("bob", Role.ADMIN, 2)


def test_a_file_that_was_replaced_by_one_of_the_same_time_and_size_is_followed(tmp_path: Path) -> None:
    path = write_keys(tmp_path / "keys.toml", key("alice"))
    keys, before = KeyBook(path), path.stat()
    new = write_keys(tmp_path / "new.toml", key("carol"))
    os.utime(new, ns=(before.st_atime_ns, before.st_mtime_ns))
    new.replace(path)
    assert path.stat().st_size == before.st_size
    assert keys.look()
    assert keys.names == ["carol"]


def test_a_broken_file_keeps_the_keys_and_is_told_of_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    keys = book(tmp_path, key("alice"))
    path = tmp_path / "keys.toml"
    path.write_text(f"[[key]]\nname = 'alice'\nsha256 = '{secret_of('alice')}'")
    with caplog.at_level(logging.INFO):
        assert [keys.look() for _ in range(3)] == [False] * 3
        path.unlink()
        assert [keys.look() for _ in range(3)] == [False] * 3
    assert [record.getMessage() for record in caplog.records] == [
        f"keys file {path}: key 1, sha256: String should match pattern '^[0-9a-f]{{64}}$'; "
        "the 1 keys of before stay in force",
        f"keys file {path}: No such file or directory; the 1 keys of before stay in force",
    ]
    assert keys.find(secret_of("alice")) is not None
    write_keys(path, key("bob"))
    assert keys.look()
    assert keys.names == ["bob"]


def test_what_a_key_has_used_outlives_a_change_of_its_limits(tmp_path: Path) -> None:
    keys = book(tmp_path, key("alice", requests_per_minute=2), clock=lambda: 100.0)
    alice = keys.find(secret_of("alice"))
    assert alice is not None
    alice.limiter.admit(num_sequences=1, num_prompt_tokens=1, now_s=100.0)
    write_keys(tmp_path / "keys.toml", key("alice", "admin", requests_per_minute=3, max_concurrent=9))
    assert keys.look()
    assert keys.find(secret_of("alice")) is alice
    assert (alice.role, alice.limiter.num_sequences) == (Role.ADMIN, 1)
    assert alice.limiter.limits == Limits(requests_per_minute=3, max_concurrent=9)
    for _ in range(2):
        alice.limiter.admit(num_sequences=1, num_prompt_tokens=1, now_s=100.0)
    with pytest.raises(RateLimitError):
        alice.limiter.admit(num_sequences=1, num_prompt_tokens=1, now_s=100.0)


def test_a_key_expires_while_the_gateway_runs(tmp_path: Path) -> None:
    now_s = datetime(2030, 1, 1, tzinfo=UTC).timestamp()
    times = [now_s - 1, now_s]
    keys = book(tmp_path, key("alice", expires=datetime(2030, 1, 1, tzinfo=UTC)), now_s=lambda: times.pop(0))
    assert keys.find(secret_of("alice")) is not None
    assert keys.find(secret_of("alice")) is None


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "No such file"), (b"\xff\xfe", "it is no text"), (b"[[key]", "it is no TOML")],
)
def test_a_gateway_does_not_start_with_a_wrong_file(content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=f"keys file {path}: {message}"):
        KeyBook(path)


def test_refusals_are_counted() -> None:
    recorded, keys = Recorded(), KeyBook()
    keys.refused["PERMISSION_DENIED"] = 3
    keys.report(recorded.metrics)
    assert recorded.value("refused_calls_total", code="PERMISSION_DENIED") == 3
    assert recorded.value("refused_calls_total", code="UNAUTHENTICATED") == 0
