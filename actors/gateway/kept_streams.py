"""Which streams can be read again, from where and how long: generations that outlive their readers' connections."""

import asyncio
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing

from expertmesh.actors.gateway.engine import NOT_READ, Engine, Piece
from expertmesh.actors.gateway.validation import ValidRequest
from expertmesh.actors.logs import EventLog
from expertmesh.cluster.errors import CapacityError, ExpertMeshError, InputError, NotFoundError
from expertmesh.cluster.requests import FinishReason
from expertmesh.cluster.token_budget import Account, num_tokens

_log = EventLog(__name__)

TimeLeft = Callable[[], float | None]


class KeptStream:
    """One generation and all that came of it. Any number of readers may come and leave, each with its own position."""

    def __init__(
        self, request: ValidRequest, fingerprint: bytes, engine: Engine, resume_s: float, account: Account
    ) -> None:
        """Begin to generate; without a reader for resume_s seconds it is cancelled. account: for what is kept."""
        self.request = request
        self.fingerprint = fingerprint
        self.pieces: list[Piece] = []
        self.error: ExpertMeshError | None = None
        self.account = account
        self._resume_s = resume_s
        self._why = FinishReason.CANCELLED
        self._num_readers = 0
        self._is_whole = False
        self._grown = asyncio.Event()
        self.task = asyncio.create_task(self._run(engine), name=f"generate {request.request_id}")
        self.task.add_done_callback(self._over)
        self._orphaned = asyncio.get_running_loop().call_later(resume_s, self.end)

    def end(self, why: FinishReason = FinishReason.CANCELLED) -> None:
        """Cancel what has not ended: its samples end for this reason."""
        self._orphaned.cancel()
        if not self.task.done():
            self._why = why
            self.task.cancel()

    def give_up(self) -> None:
        """Drop all that is kept, and end what has not ended, with an error."""
        self.error = CapacityError(NOT_READ)
        self.pieces.clear()
        self._orphaned.cancel()
        self.task.cancel()

    def read(
        self, received: Sequence[int] = (), ended: Sequence[int] = (), *, time_left: TimeLeft = lambda: None
    ) -> AsyncGenerator[Piece, None]:
        """Yield the pieces that a reader has not got, then those that come.

        Args:
            received: tokens that it has of each sample, in order; none of those left out.
            ended: samples whose last piece it has.
            time_left: seconds until the reader's deadline; None: it has none. A stream whose only reader's deadline
                passes is cancelled.

        Raises:
            InputError: at once; no piece of the sample ended at this number of tokens.
            ExpertMeshError: the generation failed.
        """
        samples = range(len(self.request.sampling))
        if len(received) > len(samples):
            message = f"tokens_received has {len(received)} numbers; the request has {len(samples)} samples"
            raise InputError(message, field="tokens_received")
        if strange := [index for index in ended if index not in samples]:
            message = f"samples_ended has {strange[0]}; the request has {len(samples)} samples"
            raise InputError(message, field="samples_ended")
        ends = self._ends()
        for index, count in enumerate(received):
            if count not in ends[index]:
                message = f"tokens_received of sample {index} is {count}; no message of it ended there"
                raise InputError(message, field="tokens_received")
        return self._read(dict(enumerate(received)), frozenset(ended), time_left)

    def _ends(self) -> defaultdict[int, set[int]]:
        ends: defaultdict[int, set[int]] = defaultdict(lambda: {0})
        counts: defaultdict[int, int] = defaultdict(int)
        for piece in self.pieces:
            counts[piece.index] += len(piece.tokens)
            ends[piece.index].add(counts[piece.index])
        return ends

    async def _read(
        self, received: dict[int, int], ended: frozenset[int], time_left: TimeLeft
    ) -> AsyncGenerator[Piece, None]:
        self._num_readers += 1
        self._orphaned.cancel()
        counts: defaultdict[int, int] = defaultdict(int)
        position = 0
        try:
            while True:
                grown = self._grown
                while position < len(self.pieces):
                    piece = self.pieces[position]
                    position += 1
                    start = counts[piece.index]
                    counts[piece.index] += len(piece.tokens)
                    # A last piece may have no tokens: then it is `ended` that says whether it came.
                    if start >= received.get(piece.index, 0) and piece.index not in ended:
                        yield piece
                # Not `task.done()`: a cancelled task is done before its samples have their last pieces.
                if self._is_whole and position >= len(self.pieces):
                    if self.error is not None:
                        raise self.error
                    return
                await grown.wait()
        finally:
            self._num_readers -= 1
            self._left(time_left())

    def _left(self, time_left_s: float | None) -> None:
        if self._num_readers or self.task.done():
            return
        if time_left_s is not None and time_left_s < self._resume_s:
            # The client's clock may be ahead of this one by some milliseconds.
            grace_s, why = time_left_s, FinishReason.DEADLINE
        else:
            grace_s, why = self._resume_s, FinishReason.CANCELLED
        self._orphaned = asyncio.get_running_loop().call_later(grace_s, self.end, why)

    async def _run(self, engine: Engine) -> None:
        try:
            async with aclosing(engine.generate(self.request)) as pieces:
                async for piece in pieces:
                    self._add(piece)
        except ExpertMeshError as error:
            self.error = error
        except Exception as error:  # noqa: BLE001 - it is logged, and the readers are told
            _log.tell("request_failed", error, request_id=self.request.request_id)
            self.error = ExpertMeshError(f"{type(error).__name__}: {error}")

    def _over(self, task: asyncio.Task[None]) -> None:
        """Do what is left when the task is done; a cancelled one may never have begun."""
        self._orphaned.cancel()
        if task.cancelled() and self.error is None:
            self._end_samples()
        self._is_whole = True
        self._wake()

    def _end_samples(self) -> None:
        over = {piece.index for piece in self.pieces if piece.finish_reason is not None}
        for index in range(len(self.request.sampling)):
            if index not in over:
                count = sum(len(piece.tokens) for piece in self.pieces if piece.index == index)
                self._add(Piece(index=index, text="", tokens=(), finish_reason=self._why, num_output_tokens=count))

    def _add(self, piece: Piece) -> None:
        self.pieces.append(piece)
        self.account.add(num_tokens(piece.tokens))
        self._wake()

    def _wake(self) -> None:
        self._grown.set()
        self._grown = asyncio.Event()


class KeptStreams:
    """The streams of one gateway that can be read again: those that run, and for a while those that have ended.

    Guarantees:
        - A request sent again under its key while the first is kept is not generated twice.
        - A stream is its owner's, the API key that it was asked for with: for any other it is not there.
        - What failed before its first token is not kept: the key may be tried again.
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
            fingerprint: equal for equal requests.
            owner: who asks for it.

        Raises:
            InputError: the key was used for another request.
        """
        kept = self._by_key.get((owner, key))
        if kept is not None:
            if kept.fingerprint != fingerprint:
                raise InputError("idempotency_key was used for another request", field="idempotency_key")
            return kept
        account = self._engine.unread.open(lambda: self._give_up((owner, key)))
        stream = KeptStream(request, fingerprint, self._engine, self._resume_s, account)
        self._by_key[owner, key] = self._by_id[owner, request.request_id] = stream
        stream.task.add_done_callback(lambda _: self._keep_a_while(stream, (owner, key)))
        return stream

    def find(self, request_id: str, *, owner: str) -> KeptStream:
        """Return a kept stream of an owner.

        Raises:
            NotFoundError: it has none of this id.
        """
        stream = self._by_id.get((owner, request_id))
        if stream is None:
            raise NotFoundError(f"no stream of request {request_id!r} is kept; one without idempotency_key never is")
        return stream

    async def close(self) -> None:
        """Cancel all that run, and forget all."""
        tasks = [stream.task for stream in self._by_key.values()]
        for stream in tuple(self._by_key.values()):
            stream.end()
        await asyncio.gather(*tasks, return_exceptions=True)
        for stream, timer in self._ended.items():
            stream.account.close()
            timer.cancel()
        self._by_key.clear()
        self._by_id.clear()
        self._ended.clear()

    def _keep_a_while(self, stream: KeptStream, key: tuple[str, str]) -> None:
        if stream.error is not None and not stream.pieces:
            self._forget(stream, key)
            return
        timer = asyncio.get_running_loop().call_later(self._resume_s, self._forget, stream, key)
        self._ended[stream] = timer
        while len(self._ended) > self._max_ended:
            oldest = next(iter(self._ended))
            self._forget(oldest, next(other for other, kept in self._by_key.items() if kept is oldest))

    def _give_up(self, key: tuple[str, str]) -> None:
        stream = self._by_key[key]
        stream.give_up()
        if stream in self._ended:
            self._forget(stream, key)

    def _forget(self, stream: KeptStream, key: tuple[str, str]) -> None:
        stream.account.close()
        if stream in self._ended:
            self._ended.pop(stream).cancel()
        if self._by_key.get(key) is stream:
            del self._by_key[key]
        by_id = key[0], stream.request.request_id
        if self._by_id.get(by_id) is stream:
            del self._by_id[by_id]
