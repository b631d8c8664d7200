"""A connection between a client and a server that a test cuts."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Relay:
    """Passes bytes on between clients and a server, until it is told to cut.

    server_address: where new connections go. It may change, as what a Service of Kubernetes leads to does.
    cut_at: bytes from the server over the first connection after which all are cut.
    """

    def __init__(self, server_address: str, cut_at: int | None = None) -> None:
        self.server_address = server_address
        self._cut_at = cut_at
        self._writers: list[asyncio.StreamWriter] = []
        self._silent: set[asyncio.StreamWriter] = set()
        self.tasks: set[asyncio.Task[None] | None] = set()
        self.num_connections = 0
        self.address = ""

    def cut(self) -> None:
        """Break all connections off; new ones are taken."""
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    def silence(self) -> None:
        """Let nothing more through the connections that there are, and close none: the server vanished."""
        self._silent.update(self._writers)

    async def join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        self.tasks.add(asyncio.current_task())
        host, _, port = self.server_address.rpartition(":")
        try:
            far_reader, far_writer = await asyncio.open_connection(host, int(port))
        except OSError:
            writer.transport.abort()
            return
        self._writers += [writer, far_writer]
        cut_at = self._cut_at if self.num_connections == 1 else None
        await asyncio.gather(self._pass_on(reader, far_writer), self._pass_on(far_reader, writer, cut_at))

    async def _pass_on(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, cut_at: int | None = None
    ) -> None:
        num_bytes = 0
        try:
            while data := await reader.read(1 << 16):
                if writer in self._silent:
                    continue
                writer.write(data)
                await writer.drain()
                num_bytes += len(data)
                if cut_at is not None and num_bytes >= cut_at:
                    self.cut()
        except ConnectionError:
            return  # cut
        finally:
            writer.close()


@asynccontextmanager
async def relayed(port: int, cut_at: int | None = None) -> AsyncIterator[Relay]:
    """Relay to a port of this machine for the length of a block."""
    relay = Relay(f"127.0.0.1:{port}", cut_at)
    server = await asyncio.start_server(relay.join, "127.0.0.1", 0)
    relay.address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield relay
    finally:
        relay.cut()
        server.close()
        await asyncio.gather(*(task for task in relay.tasks if task is not None))
