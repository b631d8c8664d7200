"""The client for threads."""

import time
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, Self, Unpack

import grpc

from expertmesh.client.connection import Connection, ConnectionOptions
from expertmesh.client.requests import Options, Received, generate_request
from expertmesh.v1.admin_pb2 import GetStatusRequest, StatusResponse
from expertmesh.v1.inference_pb2 import (
    DetokenizeRequest,
    GenerateOnceResponse,
    GenerateRequest,
    GenerateResponse,
    TokenizeRequest,
)


class Client(Connection):
    """Calls one server. Any thread may call; close it, or use it as a context manager.

    All calls raise grpc.RpcError when the server refuses them, stays away for longer than the retries last, or the
    deadline passes.
    """

    def __init__(self, address: str, **options: Unpack[ConnectionOptions]) -> None:
        """Connect to host:port at the first call; see ConnectionOptions.

        Raises:
            ValueError: an API key that is not to be sent there.
        """
        super().__init__(address, options, grpc.insecure_channel, grpc.secure_channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()

    def generate(
        self, prompt: str | Sequence[int], **options: Unpack[Options]
    ) -> Generator[GenerateResponse, None, None]:
        """Yield the messages of a stream as they come. A broken one is resumed: no token is missing, none comes twice.

        It goes on at another gateway if its own is gone.

        Close the generator to end the request before its time.

        Raises:
            ValueError, TypeError: an option is unknown or outside what a request can hold.
        """
        return self._generate(generate_request(prompt, options))

    def _generate(self, request: GenerateRequest) -> Generator[GenerateResponse, None, None]:
        received, attempts = Received(request), self._attempts()
        try:
            while not received.is_over:
                try:
                    for message in self._stream(received, attempts.left_s):
                        received.add(message)
                        attempts.succeed()
                        yield message
                except grpc.RpcError as error:
                    if not received.is_unknown(error):
                        time.sleep(attempts.fail(error))
        except (GeneratorExit, KeyboardInterrupt):
            with suppress(grpc.RpcError):
                self._cancel(request)
            raise

    def generate_once(self, prompt: str | Sequence[int], **options: Unpack[Options]) -> GenerateOnceResponse:
        """Return all samples when they have ended. A request that is sent again is not generated twice."""
        request = generate_request(prompt, options)
        answer: GenerateOnceResponse = self._retried(self._inference.GenerateOnce, request)
        return answer

    def tokenize(self, text: str) -> list[int]:
        """Return the tokens of a text."""
        return list(self._retried(self._inference.Tokenize, TokenizeRequest(text=text)).token_ids)

    def detokenize(self, token_ids: Sequence[int]) -> str:
        """Return the text of tokens."""
        return str(self._retried(self._inference.Detokenize, DetokenizeRequest(token_ids=token_ids)).text)

    def status(self) -> StatusResponse:
        """Return what runs where."""
        answer: StatusResponse = self._retried(self._admin.GetStatus, GetStatusRequest())
        return answer

    def _retried(self, method: Callable[..., Any], message: Any) -> Any:
        attempts = self._attempts()
        while True:
            try:
                return self._call(method, message, attempts.left_s)
            except grpc.RpcError as error:
                time.sleep(attempts.fail(error))
