"""Which server does a command call, and what does it show there? The options that all client commands share."""

import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import grpc
import typer

from expertmesh.client.connection import ConnectionOptions, key_metadata
from expertmesh.cluster.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Server:
    """A server as the command line names it. Each field is an option, which the environment may give as well."""

    url: Annotated[
        str, typer.Option("--url", metavar="HOST:PORT", envvar="EXPERTMESH_URL", help="Address of the server.")
    ] = "localhost:50051"
    tls_ca: Annotated[
        Path | None,
        typer.Option(metavar="FILE", envvar="EXPERTMESH_TLS_CA", help="Use TLS; authorities to trust (PEM)."),
    ] = None
    tls_cert: Annotated[
        Path | None,
        typer.Option(metavar="FILE", envvar="EXPERTMESH_TLS_CERT", help="Certificate to show, with its chain (PEM)."),
    ] = None
    tls_key: Annotated[
        Path | None, typer.Option(metavar="FILE", envvar="EXPERTMESH_TLS_KEY", help="Private key of --tls-cert (PEM).")
    ] = None
    api_key: Annotated[
        str,
        typer.Option(
            metavar="KEY",
            envvar="EXPERTMESH_API_KEY",
            show_default=False,
            help="Key to send; others on this machine see it here, not in the environment.",
        ),
    ] = ""
    api_key_in_clear: Annotated[
        bool,
        typer.Option(
            "--api-key-in-clear",
            envvar="EXPERTMESH_API_KEY_IN_CLEAR",
            help="Send the key to another machine over plaintext, for all between to read.",
        ),
    ] = False

    def __repr__(self) -> str:  # without the key
        return f"Server({self.url})"

    def connection_options(self) -> ConnectionOptions:
        """Read the files.

        Raises:
            InputError: the address is not host:port, a file cannot be used, or the key is not to be sent there; the
                message says which and why.
        """
        # Else gRPC writes lines of its own about what the error says.
        os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
        host, _, port = self.url.rpartition(":")
        if not host or not port.isdecimal() or "/" in self.url:
            raise InputError(f"--url {self.url!r} is not of the form host:port")
        options: ConnectionOptions = {
            "credentials": self._credentials(),
            "api_key": self.api_key,
            "api_key_in_clear": self.api_key_in_clear,
        }
        try:
            key_metadata(self.url, options)
        except ValueError as error:
            raise InputError(f"--api-key: {error}") from error
        return options

    def _credentials(self) -> grpc.ChannelCredentials | None:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise InputError("--tls-cert and --tls-key go together")
        if self.tls_ca is None:
            if self.tls_cert is not None:
                raise InputError("--tls-cert is for TLS: --tls-ca says whom to trust")
            return None
        from expertmesh.actors.certificates import KeyPair, certificates_of, check_key_pair, read_file, utc_now

        roots = read_file(self.tls_ca)
        certificates_of(roots, self.tls_ca)
        if self.tls_cert is None or self.tls_key is None:
            return grpc.ssl_channel_credentials(roots)
        pair = KeyPair(cert_pem=read_file(self.tls_cert), key_pem=read_file(self.tls_key))
        check_key_pair(pair, self.tls_cert, self.tls_key, utc_now())
        return grpc.ssl_channel_credentials(roots, pair.key_pem, pair.cert_pem)


def calls_a_server(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of Server in place of its parameter `server`, which is made from them."""
    own = inspect.signature(command)
    options = [
        inspect.Parameter(one.name, inspect.Parameter.KEYWORD_ONLY, default=one.default, annotation=one.type)
        for one in fields(Server)
    ]
    others = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for parameter in own.parameters.values()
        if parameter.name != "server"
    ]

    @wraps(command)
    def called(**given: Any) -> None:
        server = Server(**{option.name: given.pop(option.name) for option in options})
        command(server=server, **given)

    # What the command line's library looks at.
    called.__signature__ = own.replace(parameters=[*others, *options])  # type: ignore[attr-defined]
    called.__annotations__ = {one.name: one.annotation for one in (*others, *options)}
    return called
