"""What is kept of keys, how a secret finds its own, and the file that holds them."""

from datetime import UTC, datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.cluster.api_keys import MAX_KEYS, ApiKey, Role, find_key, format_keys, hash_secret, parse_keys
from expertmesh.cluster.errors import InputError
from expertmesh.cluster.rate_limits import Limits

SECRET = "em-" + "x" * 43
HASH = hash_secret(SECRET)


def test_the_hash_is_that_of_coreutils() -> None:
    # printf em-abc | sha256sum
    assert hash_secret("em-abc") == "9ced393c1ab134ceb20124ab76132656335156f123161b38ef107a7ead35d4f8"


def test_roles() -> None:
    assert Role.ADMIN.includes(Role.INFERENCE)
    assert Role.ADMIN.includes(Role.ADMIN)
    assert Role.INFERENCE.includes(Role.INFERENCE)
    assert not Role.INFERENCE.includes(Role.ADMIN)


def test_a_secret_finds_its_key_and_no_other() -> None:
    keys = [ApiKey(name=f"k{index}", sha256=hash_secret(f"em-{index}")) for index in range(5)]
    assert [find_key(keys, f"em-{index}", 0) for index in range(5)] == keys
    for wrong in ("", "em-", "em-5", "EM-1", keys[1].sha256, "em-1\n", "\ud800".encode("utf-8", "replace").decode()):
        assert find_key(keys, wrong, 0) is None


def test_every_key_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time that it takes does not tell at which key it was found."""
    compared: list[bytes] = []

    def compare(one: bytes, other: bytes) -> bool:
        compared.append(other)
        return one == other

    monkeypatch.setattr("hmac.compare_digest", compare)
    keys = [ApiKey(name=f"k{index}", sha256=hash_secret(f"em-{index}")) for index in range(5)]
    assert find_key(keys, "em-0", 0) == keys[0]
    assert compared == [bytes.fromhex(key.sha256) for key in keys]


def test_an_expired_key_is_unknown() -> None:
    key = ApiKey(name="k", sha256=HASH, expires=datetime(2030, 1, 1, tzinfo=UTC))
    end_s = datetime(2030, 1, 1, tzinfo=UTC).timestamp()
    assert find_key([key], SECRET, end_s - 0.001) == key
    assert find_key([key], SECRET, end_s) is None


def test_a_file_by_hand() -> None:
    text = f"""
        [[key]]
        name = "alice"
        sha256 = "{HASH}"
        role = "admin"
        expires = 2030-01-01
        [[key]]
        name = "batch.jobs_2"
        sha256 = "{"0" * 64}"
        requests_per_minute = 60
        tokens_per_minute = 9000
        max_concurrent = 4
        weight = 0.5
        expires = 2030-01-01T12:00:00+02:00
    """
    alice, batch = parse_keys(text)
    assert (alice.name, alice.role, alice.expires) == ("alice", Role.ADMIN, datetime(2030, 1, 1, tzinfo=UTC))
    assert alice.limits == Limits()
    assert batch.limits == Limits(requests_per_minute=60, tokens_per_minute=9000, max_concurrent=4)
    assert (batch.role, batch.weight, batch.expires) == (Role.INFERENCE, 0.5, datetime(2030, 1, 1, 10, tzinfo=UTC))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[key]", "it is no TOML"),
        ("key = 3", "it holds no list of keys"),
        ("[server]\nport = 3", r"it holds \['server'\]; it may hold tables"),
        ("[[key]]\nname = 'a'", "key 1, sha256: Field required"),
        (f"[[key]]\nname = 'a b'\nsha256 = '{HASH}'", "key 1, name: String should match"),
        (f"[[key]]\nname = 'a'\nsha256 = '{HASH}'\nrole = 'root'", "key 1, role: Input should be"),
        (f"[[key]]\nname = 'a'\nsha256 = '{HASH}'\nweight = 0", "key 1, weight: Input should be greater"),
        (f"[[key]]\nname = 'a'\nsha256 = '{HASH}'\nmax_concurrent = 0", "key 1, max_concurrent: Input should be"),
        (f"[[key]]\nname = 'a'\nsha256 = '{HASH}'\nexpires = 2030-01-01T00:00:00", "key 1, expires: Input should have"),
        (f"[[key]]\nname = 'a'\nsha256 = '{HASH}'\nquota = 3", "key 1, quota: Extra inputs"),
        (f"[[key]]\nname = 'a'\nsha256 = '{HASH}'\n" * 2, "key 2 has the name of another"),
        (
            f"[[key]]\nname = 'a'\nsha256 = '{HASH}'\n[[key]]\nname = 'b'\nsha256 = '{HASH}'",
            "key 2 has the sha256 of another",
        ),
        ("[[key]]\n" * (MAX_KEYS + 1), f"it holds {MAX_KEYS + 1} keys; at most {MAX_KEYS} are allowed"),
    ],
)
def test_a_wrong_file_is_refused_by_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_keys(text)


def test_a_secret_in_the_wrong_place_is_not_repeated() -> None:
    with pytest.raises(InputError) as caught:
        parse_keys(f"[[key]]\nname = 'a'\nsha256 = '{SECRET}'")
    assert SECRET not in repr(caught.value) + str(caught.value.__cause__) + str(caught.value.__context__)


@settings(deadline=None)
@given(
    st.lists(
        st.builds(
            ApiKey,
            name=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", fullmatch=True),
            role=st.sampled_from(Role),
            sha256=st.from_regex(r"[0-9a-f]{64}", fullmatch=True),
            requests_per_minute=st.none() | st.integers(1, 10**9),
            tokens_per_minute=st.none() | st.integers(1, 10**9),
            max_concurrent=st.none() | st.integers(1, 10**9),
            weight=st.floats(0.001, 1000),
            expires=st.none() | st.datetimes(min_value=datetime(1000, 1, 1), timezones=st.just(UTC)),
        ),
        max_size=4,
        unique_by=(lambda key: key.name, lambda key: key.sha256),
    )
)
def test_what_is_written_is_read(keys: list[ApiKey]) -> None:
    assert parse_keys(format_keys(keys)) == tuple(keys)
