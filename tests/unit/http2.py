"""HTTP/2 by hand, for what no well-behaved client would send. Source: RFC 9113 (frames), RFC 7541 (headers)."""

import socket
import struct
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Self

import hpack
from google.protobuf.message import Message

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = 0, 1, 3, 4, 5, 6, 7, 8, 9
END_STREAM, ACK, END_HEADERS = 0x1, 0x1, 0x4
INITIAL_WINDOW_SIZE = 0x4
GENERATE = "/expertmesh.v1.Inference/Generate"


def frame(kind: int, flags: int = 0, stream: int = 0, payload: bytes = b"", *, length: int | None = None) -> bytes:
    """Return a frame; `length`: what it claims, in place of what it is."""
    claimed = len(payload) if length is None else length
    return struct.pack(">I", claimed)[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def grpc_message(body: bytes, *, length: int | None = None, compressed: int = 0) -> bytes:
    """Return gRPC's frame around a message; `length`: what it claims."""
    return struct.pack(">BI", compressed, len(body) if length is None else length) + body


def literal_header(name: str, value: str) -> bytes:
    """Return one encoded header that refers to no other."""
    return bytes(hpack.Encoder().encode([(name, value)], huffman=False))


def request_headers(*more: tuple[str, str], method: str = GENERATE) -> list[tuple[str, str]]:
    """Return the headers of a call."""
    fields = [(":method", "POST"), (":scheme", "http"), (":path", method), (":authority", "x")]
    return [*fields, ("te", "trailers"), ("content-type", "application/grpc"), *more]


class Http2Client:
    """A connection on which a test writes what it likes. Reads nothing unless it is asked to."""

    def __init__(self, port: int, *, initial_window: int | None = None) -> None:
        """Connect and open the connection in order; initial_window: bytes of each stream that the server may send."""
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=20)
        self._encoder, self._decoder = hpack.Encoder(), hpack.Decoder()
        self._next_stream = 1
        window = b"" if initial_window is None else struct.pack(">HI", INITIAL_WINDOW_SIZE, initial_window)
        self.socket.sendall(PREFACE + frame(SETTINGS, payload=window))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def headers(self, *more: tuple[str, str], method: str = GENERATE, flags: int = END_HEADERS) -> int:
        """Begin a call; return the number of its stream."""
        stream, self._next_stream = self._next_stream, self._next_stream + 2
        fields = request_headers(*more, method=method)
        self.send(frame(HEADERS, flags, stream, self._encoder.encode(fields, huffman=False)))
        return stream

    def generate(self, request: Message) -> int:
        """Send a whole request."""
        stream = self.headers()
        self.send(frame(DATA, END_STREAM, stream, grpc_message(request.SerializeToString())))
        return stream

    def allow(self, num_bytes: int, streams: Sequence[int] = (1,)) -> None:
        """Let the server send more on these streams and on the connection."""
        for stream in (0, *streams):
            self.send(frame(WINDOW_UPDATE, stream=stream, payload=struct.pack(">I", num_bytes)))

    def frames(self) -> Iterator[tuple[int, int, int, bytes]]:
        """Yield kind, flags, stream and payload of what the server sends, until it closes the connection."""
        with self.socket.makefile("rb") as stream:
            while len(head := stream.read(9)) == 9:
                length = int.from_bytes(head[:3], "big")
                kind, flags, number = struct.unpack(">BBI", head[3:])
                yield kind, flags, number, stream.read(length)

    def ping(self) -> None:
        """Wait until the server has seen all that was sent."""
        self.send(frame(PING, payload=b"seen all"))
        for kind, flags, _, _ in self.frames():
            if (kind, flags) == (PING, ACK):
                return
        raise ConnectionError("the server closed the connection")

    def trailers(self) -> tuple[str, str]:
        """Read up to the end of the first call that ends; return its grpc-status and grpc-message."""
        for kind, flags, _, payload in self.frames():
            if kind == HEADERS:
                fields = {str(name): str(value) for name, value in self._decoder.decode(payload)}
                if flags & END_STREAM:
                    return fields["grpc-status"], fields.get("grpc-message", "")
        raise ConnectionError("the server closed the connection before a call ended")
