"""Which streams can be read again, and how long: generations that outlive their readers' connections."""

import asyncio

from expertmesh.actors.gateway.engine import Engine
from expertmesh.actors.gateway.kept_stream import KeptStream
from expertmesh.actors.gateway.validation import ValidRequest
from expertmesh.cluster.errors import InputError, NotFoundError, UnavailableError


class KeptStreams:
    """The streams of one gateway that can be read again: those that run, and for a while those that have ended.

    Guarantees:
        - A request sent again under its key while the first is kept is not generated twice.
        - A stream is its owner's, the API key that it was asked for with: for any other it is not there.
        - A request that comes with what was received goes on with the stream kept under its key if that gave it, and
          else begins anew from there: then the other is kept no more, and ends unless somebody reads it.
        - What failed before its first token or because a part was away, or was ended since nobody read it, is not kept:
          the key may be tried again.
        - What is kept counts among the engine's unread tokens; when those are too many, the largest stream is ended.
    """

    def __init__(self, engine: Engine, *, resume_s: float, max_ended: int) -> None:
        """Keep none yet.

        Args:
            engine: generates.
            resume_s: seconds that a stream is kept after its end, and that it goes on without a reader.
            max_ended: most that are kept after their end; the oldest are forgotten first.
        """
        self._engine = engine
        self._resume_s = resume_s
        self._max_ended = max_ended
        # Each by its owner's name and the key, or the request id.
        self._by_key: dict[tuple[str, str], KeptStream] = {}
        self._by_id: dict[tuple[str, str], KeptStream] = {}
        self._running: set[KeptStream] = set()
        self._ended: dict[KeptStream, asyncio.TimerHandle] = {}

    def __len__(self) -> int:
        return len(self._by_key)

    def has(self, key: str, *, owner: str) -> bool:
        """Return whether a stream of an owner is kept under a key."""
        return (owner, key) in self._by_key

    def open(self, request: ValidRequest, key: str, fingerprint: bytes, *, owner: str) -> KeptStream:
        """Return the stream kept under a key, or begin one. Of streams with one request id the newest is found by it.

        Args:
            request: what to generate, where it is new.
            key: of the client's.
            fingerprint: equal for requests that are equal but for what was received of them.
            owner: who asks for it.

        Raises:
            InputError: the key was used for another request.
        """
        kept = self._by_key.get((owner, key))
        if kept is not None:
            if kept.fingerprint != fingerprint:
                raise InputError("idempotency_key was used for another request", field="idempotency_key")
            if kept.gave(request.so_far):
                return kept
            self._replace(kept, (owner, key))
        account = self._engine.unread.open(lambda: self._give_up(stream, (owner, key)))
        stream = KeptStream(request, fingerprint, self._engine, self._resume_s, account)
        self._by_key[owner, key] = self._by_id[owner, request.request_id] = stream
        self._running.add(stream)
        stream.task.add_done_callback(lambda _: self._keep_a_while(stream, (owner, key)))
        return stream

    def find(self, request_id: str, *, owner: str) -> KeptStream:
        """Return a kept stream of an owner.

        Raises:
            NotFoundError: it has none of this id.
        """
        stream = self._by_id.get((owner, request_id))
        if stream is None or stream.is_abandoned:
            raise NotFoundError(f"no stream of request {request_id!r} is kept; one without idempotency_key never is")
        return stream

    async def close(self) -> None:
        """Cancel all that run, and forget all."""
        tasks = [stream.task for stream in self._running]
        for stream in tuple(self._running):
            stream.end()
        await asyncio.gather(*tasks, return_exceptions=True)
        for stream, timer in self._ended.items():
            stream.account.close()
            timer.cancel()
        self._by_key.clear()
        self._by_id.clear()
        self._ended.clear()

    def _keep_a_while(self, stream: KeptStream, key: tuple[str, str]) -> None:
        self._running.discard(stream)
        is_listed = self._by_key.get(key) is stream
        has_failed = stream.error is not None and not stream.pieces
        if not is_listed or stream.is_abandoned or has_failed or isinstance(stream.error, UnavailableError):
            self._forget(stream, key)
            return
        timer = asyncio.get_running_loop().call_later(self._resume_s, self._forget, stream, key)
        self._ended[stream] = timer
        while len(self._ended) > self._max_ended:
            oldest = next(iter(self._ended))
            self._forget(oldest, next(other for other, kept in self._by_key.items() if kept is oldest))

    def _replace(self, stream: KeptStream, key: tuple[str, str]) -> None:
        if stream in self._ended:
            self._forget(stream, key)
            return
        self._unlist(stream, key)  # it counts what it keeps until it ends
        if not stream.num_readers:
            stream.end()

    def _give_up(self, stream: KeptStream, key: tuple[str, str]) -> None:
        stream.give_up()
        if stream in self._ended:
            self._forget(stream, key)

    def _forget(self, stream: KeptStream, key: tuple[str, str]) -> None:
        stream.account.close()
        if stream in self._ended:
            self._ended.pop(stream).cancel()
        self._unlist(stream, key)

    def _unlist(self, stream: KeptStream, key: tuple[str, str]) -> None:
        if self._by_key.get(key) is stream:
            del self._by_key[key]
        by_id = key[0], stream.request.request_id
        if self._by_id.get(by_id) is stream:
            del self._by_id[by_id]
