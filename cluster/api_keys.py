"""API keys: what is kept of each, which key a secret is, and the file that holds them.

A secret is PREFIX and 256 random bits, so its plain SHA-256 may be kept: nobody can try 2^256 secrets, however fast one
try is. Of a password, which people choose from far fewer, a plain hash would be wrong: it needs a slow, salted one.
"""

import hashlib
import hmac
import tomllib
from collections.abc import Iterable, Sequence
from datetime import UTC, date, datetime
from enum import StrEnum
from functools import cached_property
from typing import Any

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError, field_validator

from expertmesh.cluster.errors import InputError
from expertmesh.cluster.rate_limits import Limits

# Of every secret, so that scanners of texts and repositories find one that was left there: em-[A-Za-z0-9_-]{43}.
PREFIX = "em-"
# Every call compares with every key, and metrics have a series for each.
MAX_KEYS = 1000
# Of a name: it is a label of metrics and stands between quotes in the file.
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"

_HEADER = "# API keys of ExpertMesh, written by `expertmesh keys`. Secrets are not here, only their SHA-256.\n"


class Role(StrEnum):
    """What a key may call. admin includes inference."""

    INFERENCE = "inference"
    ADMIN = "admin"

    def includes(self, needed: "Role") -> bool:
        """Whether this role may do what needs the other."""
        return self is Role.ADMIN or self is needed


class ApiKey(BaseModel):
    """One key, without its secret. weight: its share of the service, beside others that wait."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, hide_input_in_errors=True)

    name: str = Field(pattern=NAME_PATTERN)
    role: Role = Role.INFERENCE
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    requests_per_minute: int | None = Field(default=None, ge=1)
    tokens_per_minute: int | None = Field(default=None, ge=1)
    max_concurrent: int | None = Field(default=None, ge=1)
    weight: float = Field(default=1.0, ge=0.001, le=1000)
    expires: AwareDatetime | None = None

    @field_validator("expires", mode="before")
    @classmethod
    def _date_is_its_first_moment(cls, value: Any) -> Any:
        is_date = isinstance(value, date) and not isinstance(value, datetime)
        return datetime(value.year, value.month, value.day, tzinfo=UTC) if is_date else value

    @property
    def limits(self) -> Limits:
        """What it may use."""
        return Limits(
            requests_per_minute=self.requests_per_minute,
            tokens_per_minute=self.tokens_per_minute,
            max_concurrent=self.max_concurrent,
        )

    @cached_property
    def digest(self) -> bytes:
        """The SHA-256, to compare with."""
        return bytes.fromhex(self.sha256)

    def is_expired(self, now_s: float) -> bool:
        """Whether it is of no use any more at a Unix time in seconds."""
        return self.expires is not None and self.expires.timestamp() <= now_s


def hash_secret(secret: str) -> str:
    """Return what is kept of a secret: its SHA-256 in hexadecimal digits."""
    return hashlib.sha256(secret.encode()).hexdigest()


def find_key(keys: Iterable[ApiKey], secret: str, now_s: float) -> ApiKey | None:
    """Return the key of a secret; None if there is none, or if it has expired.

    Compares with every key and each time in full, so that the time it takes tells nothing about any of them.
    """
    digest, found = hashlib.sha256(secret.encode()).digest(), None
    for key in keys:
        if hmac.compare_digest(digest, key.digest):
            found = key
    return None if found is None or found.is_expired(now_s) else found


def parse_keys(text: str) -> tuple[ApiKey, ...]:
    """Return the keys of a file's text, in its order.

    Raises:
        InputError: it is no such file, a value is out of range, or a name or hash is there twice; the message never
            shows a value, which might be a secret put in the wrong place.
    """
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"it is no TOML: {error}") from None
    entries = tables.pop("key", [])
    if tables or not isinstance(entries, list):
        raise InputError(f"it holds {sorted(tables) or 'no list of keys'}; it may hold tables [[key]] alone")
    if len(entries) > MAX_KEYS:
        raise InputError(f"it holds {len(entries)} keys; at most {MAX_KEYS} are allowed")
    keys = tuple(_parse_entry(entry, number) for number, entry in enumerate(entries, 1))
    for what, values in (("name", [key.name for key in keys]), ("sha256", [key.sha256 for key in keys])):
        if len(set(values)) < len(values):
            number = next(n for n, value in enumerate(values) if value in values[:n]) + 1
            raise InputError(f"key {number} has the {what} of another")
    return keys


def _parse_entry(entry: Any, number: int) -> ApiKey:
    try:
        return ApiKey.model_validate(entry)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InputError(f"key {number}, {where or 'as a whole'}: {first['msg']}") from None


def format_keys(keys: Sequence[ApiKey]) -> str:
    """Return the text of a file that holds these keys."""
    return _HEADER + "".join(_format_entry(key) for key in keys)


def _format_entry(key: ApiKey) -> str:
    lines = ["\n[[key]]"]
    for name, value in key.model_dump(exclude_defaults=True).items():
        if isinstance(value, str):
            lines.append(f'{name} = "{value}"')
        elif isinstance(value, datetime):
            lines.append(f"{name} = {value.isoformat()}")
        else:
            lines.append(f"{name} = {value}")
    return "\n".join(lines) + "\n"
