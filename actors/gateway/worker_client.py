"""What the gateway asks of an attention worker, and the gateway's tie to one."""

from dataclasses import dataclass
from typing import Protocol

from expertmesh.cluster.requests import SequenceRequest, TokenEvent

GATEWAY_ENDS = "this gateway is being ended; another one may go on with the request"


class WorkerClient(Protocol):
    """A way to call one attention worker. All three calls raise UnavailableError once the worker is gone."""

    @property
    def worker_id(self) -> str:
        """Name of the worker; a restarted worker may keep it."""

    async def submit(self, requests: list[SequenceRequest]) -> None:
        """Take on all of these sequences, or none.

        Raises:
            InputError: a sequence can never run there.
            CapacityError: no room now.
        """

    async def cancel(self, sequence_ids: list[str]) -> None:
        """Drop these sequences from the batch; unknown ones are passed over."""

    async def poll(self, after: int) -> tuple[int, list[TokenEvent]]:
        """Return the events newer than `after` in order, and the number to pass next time; 0 is before the first.

        Waits for one to happen, half of the longest silence that a worker may keep, and then returns none. Events up to
        `after` are never asked for again.
        """


@dataclass(eq=False, slots=True)
class WorkerLink:
    """The gateway's tie to one life of a worker. A worker that comes back gets a new one.

    named: whether it is among those that new requests may go to; false for a worker that is to empty and leave.
    suspect: whether it hung before and has not answered since.
    """

    client: WorkerClient
    named: bool = True
    suspect: bool = False

    @property
    def routable(self) -> bool:
        """Whether new requests go there."""
        return self.named and not self.suspect

    @property
    def worker_id(self) -> str:
        """Name of the worker."""
        return self.client.worker_id


@dataclass(frozen=True, slots=True)
class NotRead:
    """Told to a request whose tokens waited for its reader until they were too many."""


@dataclass(frozen=True, slots=True)
class GatewayEnds:
    """Told to each request that is alive when the gateway's time is over."""


@dataclass(frozen=True, slots=True)
class WorkerLost:
    """Told to each request that lives on a link that broke."""

    link: WorkerLink
