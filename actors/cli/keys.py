"""`expertmesh keys create|list|revoke`: the file of API keys that `serve --keys` reads, and follows."""

import fcntl
import json
import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from expertmesh.actors.cli.client import JsonOption
from expertmesh.actors.gateway.key_book import read_keys
from expertmesh.cluster.api_keys import MAX_KEYS, PREFIX, ApiKey, Role, format_keys, hash_secret
from expertmesh.cluster.errors import InputError

# 256 bits, see cluster/api_keys.py.
_SECRET_BYTES = 32

keys = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)
NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="Of the key: letters, digits, and . _ - within.")]
FileOption = Annotated[Path, typer.Option("--file", help="The file of keys.")]
DEFAULT_FILE = Path("keys.toml")


@keys.callback()
def about() -> None:
    """Create, list and revoke API keys. A server with `--keys FILE` follows the file within a second."""


@keys.command()
def create(
    name: NameArgument,
    role: Annotated[Role, typer.Option(help="What it may call; admin includes inference.")] = Role.INFERENCE,
    requests_per_minute: Annotated[int | None, typer.Option(help="Most requests; no limit unless given.")] = None,
    tokens_per_minute: Annotated[int | None, typer.Option(help="Most tokens, of prompts and output together.")] = None,
    max_concurrent: Annotated[int | None, typer.Option(help="Most sequences that run or wait at once.")] = None,
    weight: Annotated[float, typer.Option(help="Share of the service beside other keys that wait.")] = 1.0,
    expires: Annotated[str | None, typer.Option(metavar="DATE", help="When it ends: 2030-01-31, UTC.")] = None,
    file: FileOption = DEFAULT_FILE,
    as_json: JsonOption = False,
) -> None:
    """Make a key and print its secret, which is not kept: only its hash goes into the file."""
    secret = PREFIX + secrets.token_urlsafe(_SECRET_BYTES)
    fields = {
        "name": name,
        "role": role,
        "sha256": hash_secret(secret),
        "requests_per_minute": requests_per_minute,
        "tokens_per_minute": tokens_per_minute,
        "max_concurrent": max_concurrent,
        "weight": weight,
        "expires": None if expires is None else _moment(expires),
    }
    key = _checked(fields)
    with _changed(file) as entries:
        if any(known.name == name for known in entries):
            raise InputError(f"{file} has a key {name} already; `expertmesh keys revoke {name}` ends it")
        if len(entries) >= MAX_KEYS:
            raise InputError(f"{file} has {len(entries)} keys; at most {MAX_KEYS} are allowed")
        entries.append(key)
    if as_json:
        typer.echo(json.dumps({**_shown(key), "secret": secret}))
    else:
        typer.echo(secret)
        typer.echo(f"key {name} of the role {role}, in {file}; the secret is shown this once", err=True)


@keys.command("list")
def list_keys(file: FileOption = DEFAULT_FILE, as_json: JsonOption = False) -> None:
    """Show the keys of a file."""
    shown = [_shown(key) for key in read_keys(file)]
    if as_json:
        typer.echo(json.dumps({"keys": shown}))
        return
    table = Table("name", "role", "requests/min", "tokens/min", "at once", "weight", "expires")
    for row in shown:
        table.add_row(*("-" if value is None else str(value) for value in row.values()))
    Console().print(table)


@keys.command()
def revoke(name: NameArgument, file: FileOption = DEFAULT_FILE, as_json: JsonOption = False) -> None:
    """Take a key out: its new calls are refused, its running streams go on to their end."""
    if not file.exists():
        raise InputError(f"there is no file {file}")
    with _changed(file) as entries:
        left = [key for key in entries if key.name != name]
        if len(left) == len(entries):
            raise InputError(f"{file} has no key {name!r}; it has {', '.join(key.name for key in entries) or 'none'}")
        entries[:] = left
    typer.echo(json.dumps({"revoked": name}) if as_json else f"revoked {name}")


def _moment(text: str) -> datetime:
    """Read a date, or a time with its zone; a date is its first moment in UTC."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise InputError(f"--expires {text!r} is no date such as 2030-01-31") from error
    if moment.tzinfo is None and len(text) > len("2030-01-31"):
        raise InputError(f"--expires {text!r} has no time zone; write 2030-01-31T12:00:00Z or only the date")
    return moment.replace(tzinfo=moment.tzinfo or UTC)


def _checked(fields: dict[str, Any]) -> ApiKey:
    try:
        return ApiKey(**fields)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        option = str(first["loc"][0])
        where = "NAME" if option == "name" else "--" + option.replace("_", "-")
        raise InputError(f"{where} {fields[option]!r}: {first['msg']}") from None


def _shown(key: ApiKey) -> dict[str, Any]:
    """Return what may be shown of a key."""
    return key.model_dump(mode="json", exclude={"sha256"})


@contextmanager
def _changed(file: Path) -> Iterator[list[ApiKey]]:
    """Yield the keys of a file, or none yet, and write what the block makes of them.

    One command after another; a reader sees the file of before or that of after; nobody but the owner reads it.
    """
    folder = file.resolve().parent
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise InputError(f"{folder}: {error.strerror}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        entries = list(read_keys(file)) if file.exists() else []
        yield entries
        _replace(file.resolve(), format_keys(entries))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _replace(file: Path, text: str) -> None:
    try:
        # mkstemp's files are of mode 0600.
        descriptor, name = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
        try:
            with os.fdopen(descriptor, "w") as output:
                output.write(text)
                output.flush()
                os.fsync(output.fileno())
            Path(name).replace(file)
        except BaseException:
            Path(name).unlink()
            raise
    except OSError as error:
        raise InputError(f"{file}: {error.strerror}") from error
