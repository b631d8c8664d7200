"""The live page of a real server in a headless Chromium: what is drawn, clicked, typed, broken and mended."""

import json
import re
import signal
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest
from playwright.sync_api import Browser, Locator, Page, Route, expect

from expertmesh.v1.admin_pb2 import ScaleRequest
from expertmesh.v1.admin_pb2_grpc import AdminStub
from expertmesh.v1.inference_pb2 import GenerateRequest
from expertmesh.v1.inference_pb2_grpc import InferenceStub
from tests.integration.browser import LAPTOP, PATIENCE_MS, PHONE, chromium, opened, traffic
from tests.integration.conftest import POCKET, Server, serving
from tests.integration.streams import status_when

PROMPT = "def main():"
ENDLESS_PROMPT = "Once upon a time"  # the most likely tokens repeat themselves; a sampled answer may end at once
KEY = "em-of-this-test"
MARKUP = '<img src=x onerror="document.title=1">'
expect.set_options(timeout=PATIENCE_MS)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def server(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The pocket model on two shards, every expert on both. Not started where there is no browser."""
    home = tmp_path_factory.mktemp("live")
    options = ("--shards", "2", "--replicas", "2", "--dtype", "float32", "--http-port", "0")
    with serving(POCKET, home, *options) as started, browser.new_context() as context:
        yield started
        # Somebody watches while it stops.
        onlooker = context.new_page()
        onlooker.goto(started.http_url)
        expect(health(onlooker)).to_have_text("Serving")
        started.process.send_signal(signal.SIGTERM)
        assert started.process.wait(60) == 0


@pytest.fixture
def page(browser: Browser, server: Server) -> Iterator[Page]:
    """The page, connected; nothing may have been complained of when the test ends."""
    with opened(browser, server.http_url) as (opened_page, complaints):
        opened_page.goto(server.http_url)
        expect(health(opened_page)).to_have_text("Serving")
        yield opened_page
        assert complaints.said == []


def health(page: Page) -> Locator:
    return page.locator("#health-text")


def events(page: Page) -> Locator:
    return page.locator("#events .text")


def colours_of_cells(page: Page) -> int:
    """Count the colours in the heat map, without its labels and balances."""
    return int(
        page.evaluate(
            """() => {
                const canvas = document.getElementById("heat-map");
                const [left, top, right] = [30, 16, 76].map((length) => length * devicePixelRatio);
                const pixels = canvas.getContext("2d").getImageData(left, top, canvas.width - left - right,
                    canvas.height - top).data;
                const found = new Set();
                for (let at = 0; at < pixels.length; at += 4) found.add(pixels.slice(at, at + 3).join());
                return found.size;
            }"""
        )
    )


def test_the_heat_map_shows_where_tokens_go(server: Server, page: Page) -> None:
    with traffic(server):
        expect(page.locator("#detail button")).to_have_count(6)
        assert colours_of_cells(page) > 16
        expect(page.locator("#tokens-value")).to_have_text(re.compile(r"^[1-9]"))
        expect(page.locator("#gap-value")).to_have_text(re.compile(r"^[\d.]+ m?s$"))
        expect(page.locator("#requests-note")).to_have_text(re.compile(r"^[1-3] running"))
        box = page.locator("#heat-map").bounding_box()
        assert box is not None
        cell_width, cell_height = (box["width"] - 30 - 76) / 16, (box["height"] - 16) / 4
        page.mouse.click(box["x"] + 30 + 3.5 * cell_width, box["y"] + 16 + 2.5 * cell_height)
        detail = page.locator("#detail")
        expect(detail).to_contain_text(re.compile(r"^Layer 2, expert 3[\d.]+ % of its layer, [\d.]+ . the even share"))
        expect(detail.locator(".chip")).to_have_text([re.compile(r"shard-0 \d+ %"), re.compile(r"shard-1 \d+ %")])
        page.locator("#heat-map").press("ArrowRight")
        page.mouse.move(0, 0)
        expect(page.locator("#spoken")).to_have_text(re.compile("^Layer 2, expert 4: .* on shard-0"))
        shares = page.locator("#shard-cards .bar-row:nth-child(2) .bar-value")
        expect(shares).to_have_text([re.compile(r"^\d+ %$")] * 2)
        total = sum(int(text.removesuffix(" %")) for text in shares.all_inner_texts())
        assert 99 <= total <= 101
    page.keyboard.press("Escape")
    expect(page.locator("#detail")).to_have_text("No tokens in the last seconds.")


def test_a_prompt_streams_and_stops(server: Server, page: Page) -> None:
    with server.channel() as channel:
        request = GenerateRequest(text=PROMPT, max_tokens=24)
        expected = str(InferenceStub(channel).GenerateOnce(request, timeout=60).outputs[0].text)
    page.locator("#prompt-text").fill(PROMPT)
    page.locator("#max-tokens").fill("24")
    page.locator("#temperature").fill("0")
    page.locator("#prompt-text").press("Control+Enter")
    expect(page.locator("#prompt-status")).to_have_text(re.compile(r"^\d+ tokens? · .*first after [\d.]+ m?s$"))
    assert page.locator("#answer").inner_text() == expected.rstrip("\n")
    page.locator("#prompt-text").fill(ENDLESS_PROMPT)
    page.locator("#max-tokens").fill("1900")
    page.locator("#prompt-send").click()
    expect(page.locator("#answer")).to_have_text(re.compile(r"\S"))
    page.locator("#prompt-stop").click()
    expect(page.locator("#prompt-status")).to_have_text(re.compile("^Stopped"))
    expect(page.locator("#prompt-send")).to_be_enabled()
    status_when(server, lambda status: all(worker.running == 0 for worker in status.workers))
    page.locator("#max-tokens").fill("100000")
    expect(page.locator("#prompt-status")).to_have_text(re.compile("^Stopped"))


def test_an_operation_is_in_the_timeline(server: Server, page: Page) -> None:
    with server.channel() as channel:
        begun = AdminStub(channel).Scale(ScaleRequest(shards=2), timeout=30)
    expect(events(page).filter(has_text=f"{begun.id}, scale to 2 shards: DONE")).to_have_count(1)
    # A page that is opened later is told as well.
    page.reload()
    expect(events(page).filter(has_text=f"{begun.id}, scale to 2 shards: DONE")).to_have_count(1)


def test_a_killed_shard_and_its_recovery_are_seen(server: Server, page: Page, tmp_path: Path) -> None:
    with traffic(server):
        expect(page.locator("#detail button")).to_have_count(6)
        psutil.Process(server.status().shards[1].pid).kill()
        expect(events(page).filter(has_text="worker-0 lost its link to shard-1")).to_have_count(1)
        expect(events(page).filter(has_text="shard-1 is dead")).to_have_count(1)
        expect(events(page).filter(has_text=re.compile(r"shard-1 is ready again after [\d.]+ s"))).to_have_count(1)
        expect(health(page)).to_have_text("Serving")
        status_when(server)
        expect(page.locator("#shard-cards .state")).to_have_text(["ready", "ready"])
        screenshot = tmp_path / "live.png"
        page.screenshot(path=screenshot)
        assert screenshot.stat().st_size > 20_000


def test_a_killed_controller_shows_as_away_and_comes_back(server: Server, page: Page) -> None:
    before = server.status()
    # One that is killed may be back before anybody has looked: it hangs until it is missed.
    psutil.Process(before.controller.pid).suspend()
    expect(page.locator("#notices")).to_contain_text("The controller has been away")
    psutil.Process(before.controller.pid).kill()
    expect(events(page).filter(has_text="the controller does not answer, tokens go on")).to_have_count(1)
    expect(page.locator("#notices")).to_be_empty()
    expect(health(page)).to_have_text("Serving")
    expect(events(page).filter(has_text=re.compile(r"the controller answers again after [\d.]+ s"))).to_have_count(1)
    after = status_when(server, lambda status: bool(status.ready))
    assert after.controller.pid != before.controller.pid


def refuse_without_key(route: Route) -> None:
    if route.request.headers.get("authorization") == f"Bearer {KEY}":
        route.continue_()
        return
    error = {"error": {"message": "this server wants an API key", "type": "invalid_request_error", "param": None}}
    route.fulfill(status=401, content_type="application/json", body=json.dumps(error))


def test_a_key_is_asked_for_and_kept_in_the_tab_alone(browser: Browser, server: Server) -> None:
    with opened(browser, server.http_url) as (page, _):
        page.route("**/live/events", refuse_without_key)
        page.goto(server.http_url)
        expect(health(page)).to_have_text("API key needed")
        expect(page.locator("#notices")).to_contain_text("this server wants an API key")
        expect(page.locator("#key-dialog")).to_be_visible()
        page.locator("#key").fill(KEY)
        page.locator("#key").press("Enter")
        expect(health(page)).to_have_text("Serving")
        assert page.evaluate("() => [localStorage.length, document.cookie, JSON.stringify(sessionStorage)]") == [
            0,
            "",
            json.dumps({"expertmesh-api-key": KEY}, separators=(",", ":")),
        ]
        page.locator("#prompt-text").fill(PROMPT)
        with page.expect_request("**/v1/completions") as asked:
            page.locator("#prompt-send").click()
        assert asked.value.headers["authorization"] == f"Bearer {KEY}"
        page.locator("#key-open").click()
        page.locator("#key-forget").click()
        expect(health(page)).to_have_text("API key needed")


def test_a_gateway_that_does_not_answer_is_tried_again(browser: Browser, server: Server) -> None:
    with opened(browser, server.http_url) as (page, _):
        page.route("**/live/events", lambda route: route.abort())
        page.goto(server.http_url)
        expect(health(page)).to_have_text("No connection")
        expect(page.locator("#notices")).to_contain_text("The gateway does not answer")
        page.unroute("**/live/events")
        expect(health(page)).to_have_text("Serving")
        expect(page.locator("#notices")).to_be_empty()


def test_a_page_that_is_closed_is_no_viewer_any_more(browser: Browser, server: Server) -> None:
    def viewers() -> int:
        return int(httpx2.get(f"{server.http_url}/live/state", timeout=30).json()["viewers"])

    with opened(browser, server.http_url) as (page, _):
        page.goto(server.http_url)
        expect(health(page)).to_have_text("Serving")
        assert viewers() >= 1
    deadline_s = time.monotonic() + 120
    while viewers():
        assert time.monotonic() < deadline_s, "pages of ended tests are still watching"
        time.sleep(0.2)


def test_markup_in_what_is_shown_is_text(browser: Browser, server: Server) -> None:
    state: dict[str, Any] = json.loads(json.dumps(_state(browser, server)))
    state["events"] = [{"id": "x", "time_s": time.time(), "kind": "fault", "text": MARKUP}]
    state["status"]["shards"][0] |= {"id": MARKUP, "state": MARKUP}
    state["status"]["warnings"] = [MARKUP]
    state["status"]["autoscaler"] = {"shards": 2, "workers": 1, "reasons": [MARKUP], "problem": ""}
    state["model"]["name"] = MARKUP
    body = f"event: state\ndata: {json.dumps(state)}\n\n"
    with opened(browser, server.http_url) as (page, _):
        page.route("**/live/events", lambda route: route.fulfill(content_type="text/event-stream", body=body))
        page.goto(server.http_url)
        expect(events(page)).to_have_text([MARKUP])
        expect(page.locator("#shard-cards b").first).to_have_text(MARKUP)
        expect(page.locator("#model")).to_contain_text(MARKUP)
        expect(page.locator("#autoscaler")).to_contain_text(MARKUP)
        expect(page.locator("#warnings")).to_have_text(MARKUP)
        assert page.locator("main img, .notices img").count() == 0
        assert page.title() != "1"


def _state(browser: Browser, server: Server) -> Any:
    with opened(browser, server.http_url) as (page, _):
        page.goto(server.http_url)
        return page.evaluate("async () => (await fetch('/live/state')).json()")


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("size", [LAPTOP, PHONE], ids=["laptop", "phone"])
def test_nothing_sticks_out(
    size: tuple[int, int], theme: str, browser: Browser, server: Server, tmp_path: Path
) -> None:
    with opened(browser, server.http_url, size, theme) as (page, complaints), traffic(server):
        page.goto(server.http_url)
        expect(page.locator("#detail button")).to_have_count(6)
        width, height = page.evaluate("() => [document.documentElement.scrollWidth, document.body.scrollHeight]")
        assert width <= size[0]
        if size == LAPTOP:
            assert height <= size[1], "all of it without scrolling"
        background = page.evaluate("() => getComputedStyle(document.body).backgroundColor")
        assert (sum(int(part) for part in re.findall(r"\d+", background)) > 3 * 128) == (theme == "light")
        page.screenshot(path=tmp_path / "page.png", full_page=True)
        assert complaints.said == []


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_scale_of_colours_is_even_to_the_eye(theme: str, browser: Browser, server: Server) -> None:
    with opened(browser, server.http_url) as (page, _):
        page.goto(server.http_url)
        ramp = page.evaluate("async (theme) => (await import('/page/colour.js')).ramp(theme)", theme)
    colours = [oklab(rgb) for rgb in ramp[::15]]  # of 256; nearer ones differ by their rounding
    lightness = [colour[0] for colour in colours]
    assert lightness == sorted(lightness, reverse=theme == "light")
    steps = [sum((a - b) ** 2 for a, b in zip(*pair, strict=True)) ** 0.5 for pair in pairwise(colours)]
    assert max(steps) < 1.15 * min(steps)


def oklab(rgb: list[int]) -> tuple[float, float, float]:
    """Return a colour's place in Oklab. Source: B. Ottosson, "A perceptual color space for image processing", 2020."""
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (part / 255 for part in rgb))
    l = (0.4122214708 * r + 0.5363325363 * g + 0.0514459929 * b) ** (1 / 3)  # noqa: E741 - the source's name
    m = (0.2119034982 * r + 0.6806995451 * g + 0.1073969566 * b) ** (1 / 3)
    s = (0.0883024619 * r + 0.2817188376 * g + 0.6299787005 * b) ** (1 / 3)
    return (
        0.2104542553 * l + 0.7936177850 * m - 0.0040720468 * s,
        1.9779984951 * l - 2.4285922050 * m + 0.4505937099 * s,
        0.0259040371 * l + 0.7827717662 * m - 0.8086757660 * s,
    )
