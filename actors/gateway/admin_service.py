"""The Admin service: plain values of the controller to messages."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Protocol

from google.protobuf import json_format

from expertmesh.actors.gateway.load_reports import DEFAULT_PERIOD_S, Loads, load_reports
from expertmesh.actors.gateway.status_codes import Context, errors_to_status
from expertmesh.v1 import admin_pb2, admin_pb2_grpc

Status = Mapping[str, object]
OperationFields = Mapping[str, object]


class Operations(Protocol):
    """What the service asks for operations; each is answered with the fields of Operation by name."""

    async def scale(self, shards: int | None, workers: int | None) -> OperationFields:
        """Begin to scale; None leaves a tier as it is."""

    async def drain(self, member: str) -> OperationFields:
        """Begin to take a member out."""

    async def rebalance(self, dry_run: bool) -> OperationFields:
        """Return the fields of RebalanceResponse."""

    async def placement_record(self) -> bytes:
        """Return the placement in force."""

    async def load_placement(self, record: bytes) -> OperationFields:
        """Begin to put a placement in force."""

    async def operations(self, operation_id: str) -> Sequence[OperationFields]:
        """Return one operation, or all when the id is empty."""


class AdminService(admin_pb2_grpc.AdminServicer):
    """Answers from two async callables, so that it needs to know nothing of the controller."""

    def __init__(
        self,
        get_status: Callable[[], Awaitable[Status]],
        get_loads: Callable[[], Awaitable[Loads]],
        operations: Operations,
    ) -> None:
        """Answer GetStatus from `get_status`, GetLoads from `get_loads`, all else from `operations`.

        Args:
            get_status: returns the fields of StatusResponse by name, nested ones as mappings and lists; None is absent.
            get_loads: returns the fields of LayerLoad by name, in order of layer.
            operations: carries out the rest.
        """
        self._get_status = get_status
        self._get_loads = get_loads
        self._operations = operations

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
            for fields in await self._get_loads():
                json_format.ParseDict(dict(fields), response.layers.add())
        return response

    async def WatchLoad(  # type: ignore[override]  # noqa: N802  # see InferenceService.Generate
        self, request: admin_pb2.WatchLoadRequest, context: Context
    ) -> None:
        """Report what is counted, period by period."""
        async with errors_to_status(context, "WatchLoad"):
            period_s = request.period_s if request.HasField("period_s") else DEFAULT_PERIOD_S
            async for interval_s, layers in load_reports(self._get_loads, period_s):
                report = admin_pb2.LoadReport(interval_s=interval_s)
                for fields in layers:
                    json_format.ParseDict(fields, report.layers.add())
                await context.write(report)

    async def Scale(  # noqa: N802
        self, request: admin_pb2.ScaleRequest, context: Context
    ) -> admin_pb2.Operation:
        """Begin to scale."""
        response = admin_pb2.Operation()
        async with errors_to_status(context, "Scale"):
            shards = request.shards if request.HasField("shards") else None
            workers = request.workers if request.HasField("workers") else None
            json_format.ParseDict(dict(await self._operations.scale(shards, workers)), response)
        return response

    async def Drain(  # noqa: N802
        self, request: admin_pb2.DrainRequest, context: Context
    ) -> admin_pb2.Operation:
        """Begin to drain a member."""
        response = admin_pb2.Operation()
        async with errors_to_status(context, "Drain"):
            json_format.ParseDict(dict(await self._operations.drain(request.id)), response)
        return response

    async def Rebalance(  # noqa: N802
        self, request: admin_pb2.RebalanceRequest, context: Context
    ) -> admin_pb2.RebalanceResponse:
        """Plan, and begin to carry out."""
        response = admin_pb2.RebalanceResponse()
        async with errors_to_status(context, "Rebalance"):
            json_format.ParseDict(dict(await self._operations.rebalance(request.dry_run)), response)
        return response

    async def GetPlacement(  # noqa: N802
        self, request: admin_pb2.GetPlacementRequest, context: Context
    ) -> admin_pb2.PlacementRecord:
        """Return the placement in force."""
        response = admin_pb2.PlacementRecord()
        async with errors_to_status(context, "GetPlacement"):
            response.record = await self._operations.placement_record()
        return response

    async def SetPlacement(  # noqa: N802
        self, request: admin_pb2.PlacementRecord, context: Context
    ) -> admin_pb2.Operation:
        """Begin to put a placement in force."""
        response = admin_pb2.Operation()
        async with errors_to_status(context, "SetPlacement"):
            json_format.ParseDict(dict(await self._operations.load_placement(request.record)), response)
        return response

    async def ListOperations(  # noqa: N802
        self, request: admin_pb2.ListOperationsRequest, context: Context
    ) -> admin_pb2.ListOperationsResponse:
        """Return the operations kept."""
        response = admin_pb2.ListOperationsResponse()
        async with errors_to_status(context, "ListOperations"):
            for fields in await self._operations.operations(request.id):
                json_format.ParseDict(dict(fields), response.operations.add())
        return response
