"""The Admin service: plain values of the controller to messages."""

from collections.abc import Awaitable, Callable, Mapping, Sequence

from google.protobuf import json_format

from expertmesh.actors.gateway.status_codes import Context, errors_to_status
from expertmesh.v1 import admin_pb2, admin_pb2_grpc

Status = Mapping[str, object]
Loads = Mapping[int, Sequence[int]]


class AdminService(admin_pb2_grpc.AdminServicer):
    """Answers from two async callables, so that it needs to know nothing of the controller."""

    def __init__(self, get_status: Callable[[], Awaitable[Status]], get_loads: Callable[[], Awaitable[Loads]]) -> None:
        """Answer GetStatus from `get_status` and GetLoads from `get_loads`.

        Args:
            get_status: returns the fields of StatusResponse by name, nested ones as mappings and lists; None is absent.
            get_loads: returns, by layer index, the tokens of each expert in order of expert.
        """
        self._get_status = get_status
        self._get_loads = get_loads

    async def GetStatus(  # noqa: N802
        self, request: admin_pb2.GetStatusRequest, context: Context
    ) -> admin_pb2.StatusResponse:
        """Return what runs where."""
        response = admin_pb2.StatusResponse()
        async with errors_to_status(context, "GetStatus"):
            json_format.ParseDict(dict(await self._get_status()), response)
        return response

    async def GetLoads(  # noqa: N802
        self, request: admin_pb2.GetLoadsRequest, context: Context
    ) -> admin_pb2.LoadsResponse:
        """Return tokens per layer and expert since start."""
        response = admin_pb2.LoadsResponse()
        async with errors_to_status(context, "GetLoads"):
            loads = await self._get_loads()
            for layer in sorted(loads):
                response.layers.add(layer=layer, tokens=loads[layer])
        return response
