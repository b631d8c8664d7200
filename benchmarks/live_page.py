"""The live page: a picture of it at work, and what watching it costs.

usage: python -m benchmarks.live_page picture FILE [--model DIR] [--theme light|dark]
       python -m benchmarks.live_page cost [--model DIR] [--viewers N] [--streams N] [--rounds N] [--keep]

picture serves the model from three shards, has streams run, gives hot experts replicas, adds a fourth shard,
kills one, waits until it is back and takes the picture with Debian's chromium. cost decodes without and with viewers in
turns, and counts tokens and the processor time of the gateway, the controller and HTTP's proxy.
"""

import argparse
import os
import selectors
import shutil
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc
import psutil
from playwright.sync_api import sync_playwright

from benchmarks.record import keep
from expertmesh.actors.cli.child_server import child_server
from expertmesh.cluster.errors import InputError, UnavailableError
from expertmesh.v1.admin_pb2 import GetStatusRequest, RebalanceRequest, ScaleRequest, StatusResponse
from expertmesh.v1.admin_pb2_grpc import AdminStub
from expertmesh.v1.inference_pb2 import GenerateRequest
from expertmesh.v1.inference_pb2_grpc import InferenceStub

POCKET = Path(__file__).parents[1] / "examples" / "pocket-moe"
CONFIG = "spare_slots = 0.4\n"
PROMPTS = ("def main():", "import os", "class Tree:", "for line in lines:", "x = [", "# Returns the")
WATCHED_S = 60.0  # before the first thing happens, so that there are minutes to be seen
ROUND_S = 15.0
# Titles of the processes that a viewer may cost, as Ray sets them.
PAID_BY = ("ServeReplica", "ProxyActor", "ray::ControllerActor")


def main() -> int:
    """Do what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("picture", "cost"))
    parser.add_argument("file", type=Path, nargs="?")
    parser.add_argument("--model", type=Path, default=POCKET)
    parser.add_argument("--theme", choices=("light", "dark"), default="light")
    parser.add_argument("--viewers", type=int, default=8)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--keep", action="store_true", help="write the result to benchmarks/results")
    arguments = parser.parse_args()
    if arguments.what == "picture":
        if arguments.file is None:
            raise InputError("picture: which FILE?")
        _picture(arguments.model, arguments.file, arguments.theme)
        return 0
    result = _cost(arguments.model, arguments.viewers, arguments.streams, arguments.rounds)
    for name, value in result.items():
        print(f"{name}: {value}")
    if arguments.keep:
        print(f"kept in {keep('live-page', result)}")
    return 0


@contextmanager
def _served(model: Path, *options: str) -> Iterator[tuple[str, str]]:
    """Serve while the block lasts; yield gRPC's address and HTTP's."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as directory:
        config = Path(directory) / "serve.toml"
        config.write_text(CONFIG)
        http = ["--http", "--http-port", str(port)]
        with child_server(model, [*http, "--config", str(config), *options]) as address:
            yield address, f"http://127.0.0.1:{port}"


class Traffic:
    """Streams that follow each other on some threads. num_tokens: that came so far."""

    def __init__(self, address: str, num_streams: int) -> None:
        self.num_tokens = 0
        self._address, self._stopping, self._lock = address, threading.Event(), threading.Lock()
        self._threads = [threading.Thread(target=self._run, args=(index,)) for index in range(num_streams)]

    def __enter__(self) -> "Traffic":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join()

    def _run(self, index: int) -> None:
        with grpc.insecure_channel(self._address) as channel:
            while not self._stopping.is_set():
                request = GenerateRequest(
                    text=PROMPTS[index % len(PROMPTS)], max_tokens=200, temperature=1.0, ignore_eos=True
                )
                for response in InferenceStub(channel).Generate(request, timeout=120):
                    with self._lock:
                        self.num_tokens += len(response.token_ids)
                    if self._stopping.is_set():
                        break


def _picture(model: Path, file: Path, theme: str) -> None:
    chromium = shutil.which("chromium")
    if chromium is None:
        raise UnavailableError("needs chromium (Debian's package chromium)")
    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
    with _served(model, "--shards", "3", "--workers", "2") as (address, url), sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=sandbox)
        # "light" or "dark"; the argument's type is a list of literals.
        page = browser.new_page(viewport={"width": 1280, "height": 800}, color_scheme=theme)  # type: ignore[arg-type]
        page.goto(url)
        with Traffic(address, 5), grpc.insecure_channel(address) as channel:
            admin = AdminStub(channel)
            page.wait_for_timeout(WATCHED_S * 1000)
            admin.Rebalance(RebalanceRequest(), timeout=60)
            page.wait_for_timeout(10_000)
            admin.Scale(ScaleRequest(shards=4), timeout=60)
            _wait(lambda: len(_status(admin).shards) == 4 and _is_calm(admin), page.wait_for_timeout)
            page.wait_for_timeout(10_000)
            psutil.Process(_status(admin).shards[1].pid).kill()
            page.wait_for_timeout(3_000)
            _wait(lambda: _is_calm(admin), page.wait_for_timeout)
            page.wait_for_timeout(10_000)
            page.locator("#prompt-text").fill("def main():")
            page.locator("#prompt-send").click()
            page.locator("#heat-map").press("ArrowRight")
            page.locator("#detail").wait_for()
            page.wait_for_timeout(3_000)
            page.screenshot(path=file)
        browser.close()
    print(f"{file}: {file.stat().st_size / 1000:.0f} kB")


def _status(admin: Any) -> StatusResponse:
    response: StatusResponse = admin.GetStatus(GetStatusRequest(), timeout=20)
    return response


def _is_calm(admin: Any) -> bool:
    return all(shard.state == "ready" and shard.num_slots for shard in _status(admin).shards)


def _wait(condition: Callable[[], bool], sleep_ms: Callable[[float], None], timeout_s: float = 120.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline_s:
            raise UnavailableError(f"waited {timeout_s:g} s in vain")
        sleep_ms(250)


def _cost(model: Path, num_viewers: int, num_streams: int, rounds: int) -> dict[str, Any]:
    rates: dict[str, list[float]] = {"without": [], "with": []}
    cores: dict[str, list[float]] = {"without": [], "with": []}
    with _served(model, "--shards", "2") as (address, url), Traffic(address, num_streams) as traffic:
        processes = _processes()
        time.sleep(ROUND_S)
        for index in range(2 * rounds):
            which = "with" if index % 2 else "without"
            with ExitStack() as stack:
                if which == "with":
                    stack.enter_context(_watched(url, num_viewers))
                time.sleep(2.0)
                tokens, paid_s, began_s = traffic.num_tokens, _paid_s(processes), time.monotonic()
                time.sleep(ROUND_S)
                elapsed_s = time.monotonic() - began_s
                rates[which].append((traffic.num_tokens - tokens) / elapsed_s)
                cores[which].append((_paid_s(processes) - paid_s) / elapsed_s)
    return {
        "viewers": num_viewers,
        "streams": num_streams,
        "tokens_per_s": {which: [round(rate, 1) for rate in values] for which, values in rates.items()},
        "cores_of_front_and_controller": {which: [round(c, 4) for c in values] for which, values in cores.items()},
        "median_rate_with_over_without": round(
            statistics.median(rates["with"]) / statistics.median(rates["without"]), 4
        ),
    }


@contextmanager
def _watched(url: str, num_viewers: int) -> Iterator[None]:
    """Have that many viewers read the events while the block lasts, over bare sockets, which cost next to nothing."""
    host, _, port = url.removeprefix("http://").partition(":")
    request = f"GET /live/events HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()
    reading, waking = socket.socketpair()

    def read() -> None:
        while True:
            for key, _ in selector.select():
                if key.fileobj is reading:
                    return
                if not key.fileobj.recv(1 << 20):  # type: ignore[union-attr]  # all are sockets
                    raise UnavailableError("a viewer was let go")

    with ExitStack() as stack, selectors.DefaultSelector() as selector:
        for end in (reading, waking):
            stack.enter_context(end)
        selector.register(reading, selectors.EVENT_READ)
        for _ in range(num_viewers):
            viewer = stack.enter_context(socket.create_connection((host, int(port))))
            viewer.sendall(request)
            selector.register(viewer, selectors.EVENT_READ)
        with ThreadPoolExecutor(1) as pool:
            reader = pool.submit(read)
            try:
                yield
            finally:
                waking.sendall(b"!")
        reader.result()


def _processes() -> list[psutil.Process]:
    children = psutil.Process().children(recursive=True)
    return [child for child in children if any(name in " ".join(child.cmdline()) for name in PAID_BY)]


def _paid_s(processes: list[psutil.Process]) -> float:
    return sum(sum(process.cpu_times()[:2]) for process in processes)


if __name__ == "__main__":
    sys.exit(main())
