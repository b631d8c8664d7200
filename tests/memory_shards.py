"""Shards that answer in memory and fail as told, and the same at the other end of a Unix socket.

Shape suffixes: H hidden, R rows that one shard gets, P (row, expert) pairs.
"""

import threading
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace

import torch
from torch import Tensor

from expertmesh.actors.links.base import Link
from expertmesh.actors.wire import Dispatch, combine_packet, read_dispatch
from expertmesh.cluster.errors import LinkError
from expertmesh.cluster.packets import PacketHeader, PacketKind
from tests.fleet import break_link, link_pair

LAYER = 3
NUM_EXPERTS = 8
HIDDEN = 6

EXPERTS_EHH = torch.randn(NUM_EXPERTS, HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(0))


class MemoryShard(Link):
    """A link to a shard in memory. `faults` says what goes wrong with the next packets; "" is nothing."""

    def __init__(self, hosted: set[int]) -> None:
        super().__init__(generation=1)
        self.hosted = hosted
        self.faults: deque[str] = deque()
        self.asked: list[Dispatch] = []
        self.num_bytes_in = 0
        self.num_bytes_out = 0
        self._answers: deque[tuple[PacketHeader, list[Tensor]]] = deque()

    def send(self, header: PacketHeader, parts: Sequence[Tensor] = ()) -> None:
        fault = self.faults.popleft() if self.faults else ""
        if fault == "send":
            raise LinkError("broken on the way there")
        payload = torch.cat([part.reshape(-1).view(torch.uint8) for part in parts])
        dispatch = read_dispatch(header, payload)
        self.asked.append(dispatch)
        self.num_bytes_in += payload.numel()
        self._answers.append(self._answer(header, dispatch, fault))

    def recv(self, timeout_s: float | None = None) -> tuple[PacketHeader, Tensor]:
        header, parts = self._answers.popleft()
        if header.kind is PacketKind.CLOSE:
            raise LinkError("broken on the way back")
        payload = torch.cat([part.reshape(-1).view(torch.uint8) for part in parts])
        if header.kind is PacketKind.COMBINE:
            self.num_bytes_out += payload.numel()
        return header, payload

    def close(self) -> None:
        raise AssertionError("the dispatcher does not own its links")

    def _answer(self, request: PacketHeader, dispatch: Dispatch, fault: str) -> tuple[PacketHeader, list[Tensor]]:
        if not fault and not set(dispatch.expert_P.tolist()) <= self.hosted:
            fault = "not_here"
        kinds = {"recv": PacketKind.CLOSE, "not_here": PacketKind.NOT_HERE, "failed": PacketKind.FAILED}
        if fault in kinds:
            reason = torch.tensor(list(b"no memory"), dtype=torch.uint8)
            header = replace(request, kind=kinds[fault], payload_bytes=reason.numel(), num_rows=0, num_pairs=0)
            return header, [reason]
        rows_PH = dispatch.rows_RH[dispatch.row_P].float()
        pairs_PH = torch.stack([row @ EXPERTS_EHH[e] for row, e in zip(rows_PH, dispatch.expert_P, strict=True)])
        rows_RH = torch.zeros(dispatch.rows_RH.shape)
        if request.by_pair and fault != "summed":
            rows_RH = pairs_PH
        else:
            rows_RH.index_add_(0, dispatch.row_P, pairs_PH * dispatch.weight_P.unsqueeze(1))
        header, parts = combine_packet(request, rows_RH if fault != "no_rows" else rows_RH[:0], epoch=0)
        if fault == "narrow":
            header, parts = combine_packet(request, rows_RH[:, :1].contiguous(), epoch=0)
        if fault == "sequence":
            header = replace(header, sequence=header.sequence - 1)
        if fault == "kind":
            header = replace(header, kind=PacketKind.DISPATCH)
        return header, parts


def over_socket(shard: MemoryShard, stack: ExitStack, kind: str = "local") -> Link:
    """Return a link of a kind that has a socket at whose other end a thread lets the shard answer."""

    def serve() -> None:
        with suppress(LinkError):
            while (message := shard_end.recv(10.0))[0].kind is not PacketKind.CLOSE:
                header, payload = message
                try:
                    shard.send(header, [payload])
                    answer, rows = shard.recv()
                except LinkError:
                    break_link(shard_end)
                    return
                shard_end.send(answer, [rows])

    worker_end, shard_end = stack.enter_context(link_pair("socket", kind=kind))
    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    stack.callback(thread.join, 5.0)
    stack.callback(worker_end.close)
    return worker_end
