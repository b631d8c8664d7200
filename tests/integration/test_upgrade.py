"""One fleet takes the place of another, as when KubeRay upgrades a RayService: every stream is whole and the same.

A relay stands for the Service before the gateways: it leads new connections to the gateway that is ready.
"""

import asyncio
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx2
import psutil
import pytest
import yaml

from expertmesh.client import AsyncClient, Options
from expertmesh.v1.inference_pb2 import GenerateResponse
from tests.in_a_thread import in_a_thread
from tests.integration.conftest import CLI, POCKET, serving
from tests.integration.ray_nodes import LOOPBACK, ray_nodes
from tests.integration.test_application import BASE, TIER, Application, free_port, serve_run
from tests.relay import relayed

pytestmark = pytest.mark.timeout(400)  # two fleets are started
GATEWAY_HOST = "127.0.0.2"
START_S = 150
# Less than most of the streams have left when it begins.
DRAIN_S = 0.2
PROMPTS = ("def main():", "| U+00E9 | LATIN SMALL LETTER", "import os\n", "class Node:")
LENGTHS = (15, 60, 150, 300)
SAMPLES = (1, 2, 1, 1)
# To the bit the same, whoever else is in a batch, and computed as a prompt or token by token.
SETTINGS = {"dtype": "float32", "shards": 2, "deterministic": True}


@dataclass
class Came:
    """What came of one request, by sample."""

    texts: dict[int, str] = field(default_factory=dict)
    token_ids: dict[int, list[int]] = field(default_factory=dict)
    completion_tokens: dict[int, int] = field(default_factory=dict)

    def add(self, message: GenerateResponse) -> None:
        self.texts[message.index] = self.texts.get(message.index, "") + message.text
        self.token_ids.setdefault(message.index, []).extend(message.token_ids)
        if message.finish_reason:
            assert message.index not in self.completion_tokens, "it ended twice"
            self.completion_tokens[message.index] = message.usage.completion_tokens


def asked() -> list[tuple[str, Options]]:
    """Return requests of all lengths, greedy and sampled."""
    return [
        (prompt, {"max_tokens": length, "n": n, "ignore_eos": True, "temperature": temperature, "seed": length})
        for prompt, length, n in zip(PROMPTS, LENGTHS, SAMPLES, strict=True)
        for temperature in (0.0, 0.9)
    ]


class Streams:
    """All requests, each again when it has ended, read behind a test's back by clients that wait for a gateway."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._is_over = threading.Event()
        self.came: list[list[Came]] = [[] for _ in asked()]
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))

    @contextmanager
    def running(self) -> Iterator["Streams"]:
        self._thread.start()
        try:
            yield self
        finally:
            self.end()

    def end(self) -> None:
        """Let those that run end, and begin no more."""
        self._is_over.set()
        self._thread.join(100)
        assert not self._thread.is_alive(), "streams hang"

    def wait_for_more(self) -> None:
        """Wait until something of each request has come that was not there at the call."""
        before = [len(came) for came in self.came]
        while not all(len(came) > count and came[-1].token_ids for came, count in zip(self.came, before, strict=True)):
            assert self._thread.is_alive(), "a stream failed"
            time.sleep(0.005)

    async def _run(self) -> None:
        async with AsyncClient(self._address, timeout_s=200, retries=100) as client, asyncio.TaskGroup() as group:
            for request, came in zip(asked(), self.came, strict=True):
                group.create_task(self._repeat(client, request, came))

    async def _repeat(self, client: AsyncClient, request: tuple[str, Options], into: list[Came]) -> None:
        prompt, options = request
        while not self._is_over.is_set():
            into.append(Came())
            async for message in client.generate(prompt, **options):
                into[-1].add(message)


async def undisturbed(address: str) -> list[Came]:
    """Return what comes of each request at a gateway that goes on."""
    async with AsyncClient(address) as client:
        answers = await asyncio.gather(*(client.generate_once(prompt, **options) for prompt, options in asked()))
    return [
        Came(
            texts={output.index: output.text for output in answer.outputs},
            token_ids={output.index: list(output.token_ids) for output in answer.outputs},
            completion_tokens={output.index: options["max_tokens"] for output in answer.outputs},
        )
        for answer, (_, options) in zip(answers, asked(), strict=True)
    ]


@contextmanager
def application(home: Path) -> Iterator[Application]:
    """Run a fleet that Ray Serve's application brings up, its gateway on a node of its own."""
    settings = {"model": str(POCKET), **SETTINGS, "member_cpus": 1, "grpc_host": GATEWAY_HOST, "grpc_port": free_port()}
    lines = [f"{name} = {str(value).lower() if value is True else repr(value)}" for name, value in settings.items()]
    (home / "settings.toml").write_text("\n".join([*lines, "[nodes]", f'gateways = {{ "{TIER}" = "gateway" }}']))
    (service,) = yaml.safe_load_all((BASE / "rayservice.yaml").read_text())
    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    http_port = free_port()
    config["http_options"] |= {"host": LOOPBACK, "port": http_port}
    (wanted,) = config["applications"]
    wanted["args"] = {"config": str(home / "settings.toml"), "drain_s": DRAIN_S, "state_dir": str(home / "state")}
    wanted["deployments"][0]["num_replicas"] = 1
    (home / "application.yaml").write_text(yaml.safe_dump(config))
    with ray_nodes() as nodes:
        nodes.start(3)
        nodes.start(0, host=GATEWAY_HOST, labels={TIER: "gateway"})
        addresses = f"{GATEWAY_HOST}:{settings['grpc_port']}", f"http://{LOOPBACK}:{http_port}"
        with serve_run(nodes, home / "application.yaml", *addresses) as started:
            yield started


def leave(fleet: Application) -> None:
    """Do what the preStop of a gateway's pod does, and wait until the gateway takes nothing more."""
    port = fleet.grpc_address.rpartition(":")[2]
    options = ["--address", fleet.cluster.address, "--node-ip", GATEWAY_HOST, "--grpc-port", port, "--grace-s", "5"]
    subprocess.run([*CLI, "leave", *options], env={**os.environ, **fleet.cluster.env}, timeout=60, check=False)
    deadline_s = time.monotonic() + START_S
    while listeners(fleet.grpc_address):
        assert time.monotonic() < deadline_s
        time.sleep(0.1)


def listeners(address: str) -> list[int]:
    """Return the processes that listen there."""
    port = int(address.rpartition(":")[2])
    found = psutil.net_connections("tcp")
    return [
        one.pid for one in found if one.status == psutil.CONN_LISTEN and tuple(one.laddr)[1:] == (port,) and one.pid
    ]


@contextmanager
def held_over_http(fleet: Application) -> Iterator[list[str]]:
    """Have a stream over HTTP, which Ray Serve waits for before it tells a gateway of its end; yield its lines."""
    body = {"model": POCKET.name, "prompt": "#", "max_tokens": 1900, "stream": True, "ignore_eos": True}
    lines: list[str] = []

    def read() -> None:
        with httpx2.stream("POST", f"{fleet.http_url}/v1/completions", json=body, timeout=60) as answer:
            lines.extend(line for line in answer.iter_lines() if line)

    thread = threading.Thread(target=read)
    thread.start()
    try:
        yield lines
    finally:
        thread.join(90)
        assert not thread.is_alive(), "an answer over HTTP hangs"


def count_taken_up(folder: Path) -> int:
    """Return how many streams a fleet's gateways went on with, as their logs say."""
    texts = [path.read_text(errors="replace") for path in folder.glob("expertmesh-*/ray/session_latest/logs/*.err")]
    return sum(text.count('"event": "request_taken_up"') for text in texts)


def test_streams_outlive_the_fleet_they_began_in_and_a_gateway_that_is_killed(tmp_path: Path) -> None:
    old_home, new_home = tmp_path / "old", tmp_path / "new"
    old_home.mkdir()
    new_home.mkdir()
    options = ["--shards", "2", "--dtype", "float32", "--deterministic", "--grpc-port", str(free_port())]
    with (
        application(old_home) as old,
        in_a_thread(relayed(0)) as relay,
        TemporaryDirectory(prefix="em-") as temporary,  # Ray's sockets need a short path
    ):
        relay.server_address = old.grpc_address
        expected = asyncio.run(undisturbed(old.grpc_address))
        streams = Streams(relay.address)
        with streams.running():
            streams.wait_for_more()
            with serving(POCKET, new_home, *options, env={"TMPDIR": temporary}) as new:
                relay.server_address = new.address
                with held_over_http(old) as lines:
                    leave(old)
                streams.wait_for_more()
                num_moved = count_taken_up(Path(temporary))
                (gateway,) = listeners(new.address)
                psutil.Process(gateway).kill()
                streams.wait_for_more()
                streams.end()
                num_after_kill = count_taken_up(Path(temporary)) - num_moved
    for right, came in zip(expected, streams.came, strict=True):
        assert came == [right] * len(came)
    assert num_moved > 0, "no stream was longer than the old gateway waited"
    assert num_after_kill > 0
    assert lines[-1] == "data: [DONE]" or "this gateway is being ended" in lines[-1], lines[-1]
