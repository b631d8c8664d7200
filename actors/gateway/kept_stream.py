"""One generation that outlives its readers' connections: all that came of it, and who reads it from where."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing

from expertmesh.actors.gateway.engine import NOT_READ, Engine, Piece
from expertmesh.actors.gateway.received import SampleSoFar
from expertmesh.actors.gateway.validation import ValidRequest
from expertmesh.actors.logs import EventLog
from expertmesh.cluster.errors import CapacityError, ExpertMeshError, InputError
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
        self.num_readers = 0
        self.is_abandoned = False  # it was ended since nobody read it
        self._resume_s = resume_s
        self._why = FinishReason.CANCELLED
        self._is_whole = False
        self._grown = asyncio.Event()
        self.task = asyncio.create_task(self._run(engine), name=f"generate {request.request_id}")
        self.task.add_done_callback(self._over)
        self._orphaned = asyncio.get_running_loop().call_later(resume_s, self._abandon)

    def end(self, why: FinishReason = FinishReason.CANCELLED) -> None:
        """Cancel what has not ended: its samples end for this reason."""
        self._orphaned.cancel()
        if not self.task.done():
            self._why = why
            self.task.cancel()

    def _abandon(self) -> None:
        self.is_abandoned = True
        self.end()

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
            received: tokens that it has of each sample, in order, those included that the request came with; none of
                those left out.
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
        counts = [*received, *(0 for _ in samples[len(received) :])]
        for index, (count, ends) in enumerate(zip(counts, self._ends(), strict=True)):
            if count not in ends and index not in ended:
                message = f"tokens_received of sample {index} is {count}; no message of it ended there"
                raise InputError(message, field="tokens_received")
        return self._read(counts, frozenset(ended), time_left)

    def gave(self, so_far: Sequence[SampleSoFar]) -> bool:
        """Return whether a reader who has this of each sample can go on here: it is what came, up to ends of pieces."""
        if self.is_abandoned:
            return False
        outputs, ends = [list(one.token_ids) for one in self.request.so_far], self._ends()
        for piece in self.pieces:
            outputs[piece.index].extend(event.token_id for event in piece.tokens if event.token_id is not None)
        return all(
            len(one.token_ids) in ends[index] and outputs[index][: len(one.token_ids)] == list(one.token_ids)
            for index, one in enumerate(so_far)
        )

    def _ends(self) -> list[set[int]]:
        counts = self._begins()
        ends = [{count} for count in counts]
        for piece in self.pieces:
            counts[piece.index] += len(piece.tokens)
            ends[piece.index].add(counts[piece.index])
        return ends

    def _begins(self) -> list[int]:
        """Return how many tokens of each sample the request came with."""
        return [len(one.token_ids) for one in self.request.so_far]

    async def _read(
        self, received: Sequence[int], ended: frozenset[int], time_left: TimeLeft
    ) -> AsyncGenerator[Piece, None]:
        self.num_readers += 1
        self._orphaned.cancel()
        counts = self._begins()
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
                    if start >= received[piece.index] and piece.index not in ended:
                        yield piece
                # Not `task.done()`: a cancelled task is done before its samples have their last pieces.
                if self._is_whole and position >= len(self.pieces):
                    if self.error is not None:
                        raise self.error
                    return
                await grown.wait()
        finally:
            self.num_readers -= 1
            self._left(time_left())

    def _left(self, time_left_s: float | None) -> None:
        if self.num_readers or self.task.done():
            return
        loop = asyncio.get_running_loop()
        if time_left_s is not None and time_left_s < self._resume_s:
            # The client's clock may be ahead of this one by some milliseconds.
            self._orphaned = loop.call_later(time_left_s, self.end, FinishReason.DEADLINE)
        else:
            self._orphaned = loop.call_later(self._resume_s, self._abandon)

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
        over |= {index for index, one in enumerate(self.request.so_far) if one.has_ended}
        for index, begin in enumerate(self._begins()):
            if index not in over:
                count = begin + sum(len(piece.tokens) for piece in self.pieces if piece.index == index)
                self._add(Piece(index=index, text="", tokens=(), finish_reason=self._why, num_output_tokens=count))

    def _add(self, piece: Piece) -> None:
        self.pieces.append(piece)
        self.account.add(num_tokens(piece.tokens))
        self._wake()

    def _wake(self) -> None:
        self._grown.set()
        self._grown = asyncio.Event()
