"""Which gRPC methods need which role, and the interceptor that holds them to it."""

from collections.abc import Awaitable, Callable, Iterable
from typing import Any, TypeAlias

import grpc

from expertmesh.actors.gateway.access import Access
from expertmesh.actors.gateway.callers import CALLER
from expertmesh.actors.gateway.status_codes import Context, status_of
from expertmesh.cluster.api_keys import Role
from expertmesh.cluster.errors import ForbiddenError, UnauthenticatedError

# By "service" or, before that, "service/Method"; None: open to everybody. What is not here needs admin.
NEEDED_ROLES: dict[str, Role | None] = {
    "grpc.health.v1.Health": None,
    "grpc.reflection.v1.ServerReflection": None,
    "grpc.reflection.v1alpha.ServerReflection": None,
    "inference.GRPCInferenceService": Role.INFERENCE,
    "inference.GRPCInferenceService/ServerLive": None,
    "inference.GRPCInferenceService/ServerReady": None,
    "inference.GRPCInferenceService/ModelReady": None,
    "expertmesh.v1.Inference": Role.INFERENCE,
    "expertmesh.v1.Admin": Role.ADMIN,
}

# None: there is no such method.
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any] | None"


def needed_role(method: str) -> Role | None:
    """Return the role that a method needs, "/package.Service/Method" as gRPC writes it; None: open to everybody."""
    name = method.removeprefix("/")
    return NEEDED_ROLES.get(name, NEEDED_ROLES.get(name.partition("/")[0], Role.ADMIN))


class AccessInterceptor(grpc.aio.ServerInterceptor):
    """Lets a call in before its message is read, or answers UNAUTHENTICATED or PERMISSION_DENIED."""

    def __init__(self, access: Access) -> None:
        """Ask `access`."""
        self._access = access

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        """Go on as the caller, or refuse."""
        authorization = _first(handler_call_details.invocation_metadata or (), "authorization")
        try:
            caller = self._access.admit(needed_role(handler_call_details.method), authorization)
        except (UnauthenticatedError, ForbiddenError) as error:
            return _refusal(error)
        CALLER.set(caller)
        return await continuation(handler_call_details)


def _first(metadata: Iterable[tuple[str, str | bytes]], name: str) -> str | None:
    return next((value for key, value in metadata if key == name and isinstance(value, str)), None)


def _refusal(error: UnauthenticatedError | ForbiddenError) -> Handler:
    """Return a handler that refuses whatever kind of method it is: one of streams does not wait for a message."""

    async def refuse(_requests: object, context: Context) -> None:
        code, trailers = status_of(error)
        await context.abort(code, str(error), trailers)

    return grpc.stream_stream_rpc_method_handler(refuse)
