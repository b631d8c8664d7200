"""pods/exec over WebSocket and pods/log, by the kubelet's hooks."""

import asyncio
import json
from typing import Any

from aiohttp import WSMsgType, web

from tests.kube.kubelet import ExecStreams
from tests.kube.resources import Path
from tests.kube.runner import PodRunner
from tests.kube.status import ApiError, Manifest

# v5 is v4 with a message that closes a channel: the end of stdin.
PROTOCOLS = ("v5.channel.k8s.io", "v4.channel.k8s.io")
_STDIN, _STDOUT, _STDERR, _STATUS, _RESIZE, _CLOSE = 0, 1, 2, 3, 4, 255


async def execute(request: web.Request, runner: PodRunner, path: Path) -> web.StreamResponse:
    """Run a command in a pod: each message's first byte says which stream it is of.

    Raises:
        ApiError: for a pod that does not run, or a client that speaks no WebSocket.
    """
    pod = runner.running_pod(path.namespace, path.name)
    container = _container(pod, request.query.get("container", ""))
    if request.headers.get("Upgrade", "").lower() != "websocket":
        raise ApiError(400, "unable to upgrade: this server speaks WebSocket alone")
    socket = web.WebSocketResponse(protocols=PROTOCOLS)
    await socket.prepare(request)
    loop = asyncio.get_running_loop()
    frames: asyncio.Queue[bytes | None] = asyncio.Queue()

    def writer(channel: int) -> Any:
        return lambda data: loop.call_soon_threadsafe(frames.put_nowait, bytes([channel]) + data)

    streams = ExecStreams(writer(_STDOUT), writer(_STDERR))
    if request.query.get("stdin") not in ("1", "true"):
        streams.stdin.put(b"")

    async def send() -> None:
        while (frame := await frames.get()) is not None:
            await socket.send_bytes(frame)

    sender, reader = asyncio.create_task(send()), asyncio.create_task(_receive(socket, streams))
    code = await asyncio.to_thread(runner.kubelet.exec, pod, container, request.query.getall("command", []), streams)
    frames.put_nowait(bytes([_STATUS]) + json.dumps(_exit_status(code)).encode())
    frames.put_nowait(None)
    await sender
    reader.cancel()
    await socket.close()
    return socket


async def _receive(socket: web.WebSocketResponse, streams: ExecStreams) -> None:
    async for message in socket:
        if message.type != WSMsgType.BINARY or not message.data:
            continue
        channel, data = message.data[0], message.data[1:]
        if channel == _STDIN and data:
            streams.stdin.put(data)
        elif channel == _RESIZE:
            size = json.loads(data)
            streams.sizes.put((size["Width"], size["Height"]))
        elif channel == _CLOSE and data == bytes([_STDIN]):
            streams.stdin.put(b"")
    streams.stdin.put(b"")


def _exit_status(code: int) -> Manifest:
    if code == 0:
        return {"metadata": {}, "status": "Success"}
    return {
        "metadata": {},
        "status": "Failure",
        "reason": "NonZeroExitCode",
        "message": f"command terminated with non-zero exit code: exit status {code}",
        "details": {"causes": [{"reason": "ExitCode", "message": str(code)}]},
    }


async def logs(request: web.Request, runner: PodRunner, path: Path) -> web.StreamResponse:
    """Answer with what a container has written."""
    pod = runner.running_pod(path.namespace, path.name)
    container = _container(pod, request.query.get("container", ""))
    return web.Response(text=await asyncio.to_thread(runner.kubelet.logs, pod, container))


def _container(pod: Manifest, asked: str) -> str:
    names = [container["name"] for container in pod["spec"]["containers"]]
    if asked and asked not in names:
        raise ApiError(400, f"container {asked} is not valid for pod {pod['metadata']['name']}")
    return asked or str(names[0])
