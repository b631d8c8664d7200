"""May this caller do that? One answer for gRPC and HTTP; each has one of these for the address that it listens on."""

import ipaddress

from expertmesh.actors.gateway.callers import Caller
from expertmesh.actors.gateway.key_book import KeyBook
from expertmesh.cluster.api_keys import Role
from expertmesh.cluster.errors import ForbiddenError, UnauthenticatedError

_SCHEME = "bearer "
_HOW = "`expertmesh keys create NAME --role admin --file FILE`, then `expertmesh serve --keys FILE`"


class Access:
    """Lets callers in to one listening address.

    With a file of keys whoever calls needs one, of the right role. Without one anybody may generate, and may administer
    what listens on loopback alone.
    """

    def __init__(self, keys: KeyBook, host: str) -> None:
        """Guard what listens on `host`."""
        self.keys = keys
        self._host = host
        self._anybody = Caller(role=Role.ADMIN if is_loopback(host) else Role.INFERENCE)

    def admit(self, needed: Role | None, authorization: str | None, *, named_host: str | None = None) -> Caller:
        """Return who calls.

        Args:
            needed: role that the call needs; None: it is open to everybody.
            authorization: of the call's metadata or headers.
            named_host: by which an HTTP client says that it knows this server; None: it does not say.

        Raises:
            UnauthenticatedError: it needs a key, and there is none or an unknown one.
            ForbiddenError: the caller's role does not allow it.
        """
        try:
            return self._anybody if needed is None else self._find(needed, authorization, named_host)
        except UnauthenticatedError:
            self.keys.refused["UNAUTHENTICATED"] += 1
            raise
        except ForbiddenError:
            self.keys.refused["PERMISSION_DENIED"] += 1
            raise

    def _find(self, needed: Role, authorization: str | None, named_host: str | None) -> Caller:
        if self.keys.path is None:
            if not self._anybody.role.includes(needed):
                raise ForbiddenError(f"this server listens on {self._host} and has no API keys: {_HOW}")
            # A page from elsewhere may have its own name point to loopback, and so call from a browser on this machine.
            if needed is Role.ADMIN and named_host is not None and not is_loopback(named_host):
                raise ForbiddenError(f"without API keys this is for loopback alone, and was called as {named_host}")
            return self._anybody
        if authorization is None:
            raise UnauthenticatedError("an API key is needed: send it as `authorization: Bearer KEY`")
        if not authorization.lower().startswith(_SCHEME):
            raise UnauthenticatedError("authorization is not of the form `Bearer KEY`")
        caller = self.keys.find(authorization[len(_SCHEME) :].strip())
        if caller is None:
            raise UnauthenticatedError("the API key is unknown, revoked or expired")
        if not caller.role.includes(needed):
            raise ForbiddenError(f"this needs an API key of the role {needed}; {caller.name} has {caller.role}")
        return caller


def is_loopback(host: str) -> bool:
    """Whether an address can be reached from this machine alone. A name other than localhost cannot be known to be."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
