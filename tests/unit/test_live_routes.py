"""The live page's paths over a real HTTP server and a made-up fleet."""

import asyncio
import json
import random
import re
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import httpx2
import pytest
import uvicorn

from expertmesh.actors.gateway import live_feed
from expertmesh.actors.gateway.access import Access
from expertmesh.actors.gateway.engine import Engine
from expertmesh.actors.gateway.key_book import KeyBook
from expertmesh.actors.gateway.live_feed import MAX_BEHIND, LiveFeed
from expertmesh.actors.gateway.live_routes import HEADERS, live_routes
from expertmesh.actors.gateway.openai_app import OpenAIFront, build_app
from expertmesh.actors.gateway.openai_requests import RequestReader
from expertmesh.cluster.errors import CapacityError
from tests.recorded_metrics import Recorded
from tests.unit.api_keys import book, key, secret_of
from tests.unit.gateway_fakes import MODEL, FakeWorker
from tests.unit.live_fakes import FakeFleet

PERIOD_S = 0.01
PAGE = resources.files("expertmesh.actors.gateway") / "page"
TOKENS_LE = [[1, 2, 3, 4], [0, 10, 0, 0]]


@dataclass
class Running:
    fleet: FakeFleet
    feed: LiveFeed
    engine: Engine
    http: httpx2.AsyncClient


@asynccontextmanager
async def running(*workers: FakeWorker, timeout_s: float = 5.0, keys: KeyBook | None = None) -> AsyncIterator[Running]:
    rng, fleet = random.Random(4), FakeFleet()
    engine = Engine(tokenizer=None, rng=rng)
    engine.pool.set_workers(workers)
    reader = RequestReader(model=MODEL, tokenizer=None, template=None, rng=rng)
    feed = LiveFeed(MODEL, engine, fleet.ask, is_serving=lambda: True, period_s=PERIOD_S, timeout_s=timeout_s)
    access = Access(keys or KeyBook(), "127.0.0.1")
    app = build_app(OpenAIFront(engine=engine, reader=reader, is_ready=lambda: True, now_s=lambda: 1.0, access=access))
    app.include_router(live_routes(feed))
    server = uvicorn.Server(uvicorn.Config(app, http="h11", ws="none", lifespan="off", log_config=None))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        serving = asyncio.create_task(server.serve(sockets=[listening]))
        try:
            url = f"http://127.0.0.1:{listening.getsockname()[1]}"
            async with httpx2.AsyncClient(base_url=url, timeout=30) as http:
                yield Running(fleet, feed, engine, http)
        finally:
            await feed.close()
            server.should_exit = True
            await serving
            await engine.pool.close()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - the fakes tell nobody
            await asyncio.sleep(0.001)


async def events(up: Running) -> AsyncGenerator[tuple[str, dict[str, Any]]]:
    async with up.http.stream("GET", "/live/events") as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        name = ""
        async for line in answer.aiter_lines():
            if line.startswith("event: "):
                name = line.removeprefix("event: ")
            elif line.startswith("data: "):
                yield name, json.loads(line.removeprefix("data: "))


async def test_the_page_and_its_files_come_with_strict_headers() -> None:
    async with running() as up:
        index = await up.http.get("/")
        assert index.headers["content-type"] == "text/html; charset=utf-8"
        names = re.findall(r'(?:src|href)="/page/([^"]+)"', index.text)
        assert {"app.js", "style.css", "icon.svg"} <= set(names)
        for name in {entry.name for entry in PAGE.iterdir()} - {"index.html"} | set(names):
            answer = await up.http.get(f"/page/{name}")
            assert answer.status_code == 200, name
            assert HEADERS.items() <= dict(answer.headers).items(), name
            assert answer.text == (PAGE / name).read_text(), name
    assert HEADERS.items() <= dict(index.headers).items()
    policy = HEADERS["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert HEADERS["x-content-type-options"] == "nosniff"
    assert HEADERS["referrer-policy"] == "no-referrer"


def test_the_page_has_nothing_inline_and_asks_nobody_else() -> None:
    index = (PAGE / "index.html").read_text()
    assert not re.search(r"<script(?![^>]*\bsrc=)", index)
    assert not re.search(r"<style|\sstyle=|\son\w+=", index)
    for entry in PAGE.iterdir():
        text = entry.read_text().replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://|innerHTML|insertAdjacentHTML|document\.write|\beval\(", text), entry.name
        for imported in re.findall(r'from "\./([\w.]+)"', text):
            assert (PAGE / imported).is_file(), f"{entry.name} imports {imported}"


@pytest.mark.parametrize(
    "path",
    [
        "/page/%2e%2e%2flive_routes.py",
        "/page/..%2f..%2f..%2fpyproject.toml",
        "/page/%2fetc%2fpasswd",
        "/page/index.html",
        "/page/app.js%00.css",
        "/page/",
        "/page",
    ],
)
async def test_a_path_that_is_no_file_of_the_page_leads_nowhere(path: str) -> None:
    async with running() as up:
        answer = await up.http.get(path)
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "unknown_url"


async def test_the_state_is_looked_at_once_when_nobody_watches() -> None:
    async with running() as up:
        answer = await up.http.get("/live/state")
        state = answer.json()
        assert up.fleet.asked == [(0, 0, 0)]
    assert answer.headers["cache-control"] == "no-store"
    assert HEADERS.items() <= dict(answer.headers).items()
    assert state["model"]["moe_layers"] == [0, 1]
    assert state["placement"]["weights"][0][0] == [192, 64]
    assert [shard["id"] for shard in state["status"]["shards"]] == ["s0", "s1"]
    assert state["status"]["autoscaler"]["reasons"] == ["shards go from 2 to 3: busy"]
    assert (state["slots"], state["tokens"], state["away"]) == ({"s0": 5, "s1": 5}, None, "")
    assert state["viewers"] == 0


async def test_the_state_is_whole_though_somebody_has_just_begun_to_watch() -> None:
    async with running() as up, aclosing(up.feed.watch()) as stream:
        await anext(stream)
        assert up.fleet.asked == [], "the first look comes when the stream goes on"
        up.fleet.events = [(1, 5.0, "fault", "s1 died")]
        state = json.loads(await up.feed.state())
        assert [shard["id"] for shard in state["status"]["shards"]] == ["s0", "s1"]
        tick = json.loads((await anext(stream)).partition(b"data: ")[2])
        assert [event["text"] for event in tick["events"]] == ["s1 died"]


async def test_a_stream_begins_with_all_that_is_known_and_goes_on_with_what_is_new() -> None:
    async with running() as up, aclosing(events(up)) as stream:
        name, state = await anext(stream)
        assert (name, state["model"]["name"]) == ("state", MODEL.name)
        name, tick = await anext(stream)
        assert (name, tick["placement"]["epoch"]) == ("tick", 3)
        up.fleet.route(TOKENS_LE, generated=5)
        up.fleet.operations = [{"id": "op-1", "phase": "PREPARE", "adding": ("s2",), "ended_s": 0.0}]
        seen: list[dict[str, Any]] = []
        while not seen or seen[-1]["generated_per_s"] == 0:
            seen.append((await anext(stream))[1])
        assert seen[-1]["tokens"] == TOKENS_LE
        assert seen[-1]["operations"] == [{"id": "op-1", "phase": "PREPARE", "adding": ["s2"], "ended_s": 0.0}]
        assert "placement" not in seen[-1]


async def test_with_keys_the_page_is_open_and_what_it_shows_is_for_admins(tmp_path: Path) -> None:
    async with running(keys=book(tmp_path, key("alice"), key("root", "admin"))) as up:
        for path in ("/", "/page/app.js"):
            assert (await up.http.get(path)).status_code == 200
        callers = [{}, *({"authorization": f"Bearer {secret_of(name)}"} for name in ("alice", "root"))]
        for path in ("/live/state", "/live/events"):
            refused = [await up.http.get(path, headers=caller) for caller in callers[:2]]
            assert [answer.status_code for answer in refused] == [401, 403]
        assert up.fleet.asked == []
        assert (await up.http.get("/live/state", headers=callers[2])).json()["model"]["name"] == MODEL.name


async def test_viewers_share_one_poller_and_nobody_looking_ends_it() -> None:
    async with running() as up:
        async with aclosing(events(up)) as first, aclosing(events(up)) as second:
            await anext(first)
            await anext(second)
            one = [(await anext(first))[1]["time_s"] for _ in range(6)]
            other = [(await anext(second))[1]["time_s"] for _ in range(6)]
            assert set(one) & set(other), "both were sent the same looks"
            assert up.feed.num_viewers == 2
            # Each look is in both streams: there are no more looks than the later of the two has been sent.
            assert len(up.fleet.asked) <= len(set(one) | set(other)) + MAX_BEHIND
        await until(lambda: up.feed.num_viewers == 0)
        num_asked = len(up.fleet.asked)
        await asyncio.sleep(20 * PERIOD_S)
        assert len(up.fleet.asked) <= num_asked + 1, "one may have been under way"


async def test_the_controller_away_is_shown_and_then_it_is_back() -> None:
    async with running() as up, aclosing(events(up)) as stream:
        await anext(stream)
        up.fleet.go_away()
        while not (tick := (await anext(stream))[1])["away"]:
            pass
        assert tick["away"] == "the actor died"
        up.fleet.error = None
        while (tick := (await anext(stream))[1])["away"]:
            pass
        assert tick["status"]["epoch"] == 3


async def test_a_controller_that_hangs_is_away_too() -> None:
    async with running(timeout_s=0.02) as up:
        hung = asyncio.Event()

        async def ask(*_known: int) -> dict[str, Any]:
            await hung.wait()
            raise AssertionError("nobody waits for it any more")

        up.feed._ask = ask
        assert (await up.http.get("/live/state")).json()["away"] == "no answer for 0.02 s"


async def test_times_of_tokens_are_in_the_ticks() -> None:
    async with running(FakeWorker("a")) as up, aclosing(events(up)) as stream:
        await anext(stream)
        assert (await anext(stream))[1]["gap_p50_s"] is None
        body = {"model": MODEL.name, "prompt": [10, 20, 30], "max_tokens": 12}
        assert (await up.http.post("/v1/completions", json=body)).status_code == 200
        up.engine.report(Recorded().metrics)
        while (tick := (await anext(stream))[1])["gap_p50_s"] is None:
            pass
        assert 0 < tick["gap_p50_s"] <= tick["gap_p99_s"]
        assert tick["first_token_p50_s"] > 0


async def test_a_failover_is_told() -> None:
    dying, other = FakeWorker("a", die_after=3), FakeWorker("b")
    async with running(dying) as up, aclosing(events(up)) as stream:
        await anext(stream)
        body = {"model": MODEL.name, "prompt": [10, 20, 30], "max_tokens": 40}
        answer = asyncio.create_task(up.http.post("/v1/completions", json=body))
        await until(lambda: dying.dead)
        up.engine.pool.set_workers([other])
        assert (await answer).status_code == 200
        while not (told := (await anext(stream))[1]["events"]):
            pass
    assert (told[0]["kind"], told[0]["text"]) == ("fault", "a is lost, 1 request goes on elsewhere: poll: a died")


async def test_a_viewer_that_does_not_read_is_let_go_and_others_are_not() -> None:
    async with running() as up, aclosing(up.feed.watch()) as idle, aclosing(events(up)) as stream:
        await anext(idle)
        for _ in range(2 * MAX_BEHIND):
            await anext(stream)
        await until(lambda: up.feed.num_viewers == 1)
        assert [frame async for frame in idle] == [], "its page begins anew"
        await anext(stream)


async def test_too_many_viewers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_feed, "MAX_VIEWERS", 1)
    async with running() as up, aclosing(events(up)) as stream:
        await anext(stream)
        answer = await up.http.get("/live/events")
        assert (answer.status_code, answer.json()["error"]["code"]) == (429, "overloaded")
        assert "retry-after" in answer.headers
        with pytest.raises(CapacityError, match="1 pages watch this gateway already"):
            await anext(up.feed.watch())


async def test_closing_the_feed_ends_its_streams_and_refuses_others() -> None:
    async with running() as up, aclosing(events(up)) as stream:
        await anext(stream)
        await up.feed.close()
        async with asyncio.timeout(20):
            async for _ in stream:
                pass
        assert up.feed.num_viewers == 0
        answer = await up.http.get("/live/events")
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unavailable")
