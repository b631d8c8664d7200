"""Settings from a configuration file and the command line's options, checked together."""

import tomllib
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from expertmesh.cluster.errors import InputError
from expertmesh.cluster.settings import ServeSettings

# Options of nested tables, and where in the settings they go: first those of the autoscaler's tiers.
BOUNDS = {
    "min_shards": ("autoscale", "shards", "min_count"),
    "max_shards": ("autoscale", "shards", "max_count"),
    "min_workers": ("autoscale", "workers", "min_count"),
    "max_workers": ("autoscale", "workers", "max_count"),
}

TLS = {
    "tls_cert": ("tls", "cert_file"),
    "tls_key": ("tls", "key_file"),
    "tls_client_ca": ("tls", "client_ca_file"),
}


def read_settings(
    config: Path | None,
    given: dict[str, Any],
    *,
    autoscale: bool | None = None,
    bounds: dict[str, int] | None = None,
    tls: dict[str, Path] | None = None,
) -> ServeSettings:
    """Put a configuration file and the options given together.

    Args:
        config: TOML file.
        given: settings of the options given, by name.
        autoscale: whether there is to be a table `autoscale`; None: if the file has one.
        bounds: of the autoscaler's tiers, by the names of BOUNDS.
        tls: files, by the names of TLS.

    Raises:
        InputError: the file cannot be read, or a setting is unknown or out of range.
    """
    try:
        values = {**(tomllib.loads(config.read_text()) if config else {}), **given}
        table = values.pop("autoscale", {} if autoscale else None)
        if autoscale is not False and table is not None:
            values["autoscale"] = _with_bounds(table, bounds or {})
        elif bounds:
            raise InputError(f"--{next(iter(bounds)).replace('_', '-')} is for --autoscale")
        if tls:
            table = values.get("tls", {})
            files = {TLS[option][1]: file for option, file in tls.items()}
            values["tls"] = {**table, **files} if isinstance(table, dict) else table
        return ServeSettings(**values)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"--config {config}: {error}") from error
    except ValidationError as error:
        raise InputError(complaint(error.errors()[0])) from error


def _with_bounds(table: Any, bounds: dict[str, int]) -> Any:
    """Return the table `autoscale` with the bounds given as options; what is no table stays, to be refused later."""
    if not isinstance(table, dict):
        return table
    table = {"shards": {}, "workers": {}, **table}
    for option, value in bounds.items():
        _, tier, key = BOUNDS[option]
        if isinstance(table[tier], dict):
            table[tier] = {**table[tier], key: value}
    return table


def complaint(error: Any) -> str:
    """Say in one line what pydantic found: an option by its name, a key of a nested table by its path."""
    message, path = error["msg"].removeprefix("Value error, "), error["loc"]
    if not path:
        return str(message)
    option = next(
        (name for name, known in {**BOUNDS, **TLS}.items() if known == path), path[0] if len(path) == 1 else ""
    )
    where = "--" + str(option).replace("_", "-") if option else ".".join(str(part) for part in path)
    is_of_one_value = error["type"] != "missing" and not isinstance(error["input"], dict)
    return f"{where}: {message}" + (f", got {error['input']!r}" if is_of_one_value else "")
