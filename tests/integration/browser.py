"""A headless Chromium that looks at a server's live page, and traffic for it to show."""

import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
from playwright.sync_api import Browser, Page, Request, sync_playwright

from expertmesh.v1.inference_pb2 import GenerateRequest
from expertmesh.v1.inference_pb2_grpc import InferenceStub
from tests.integration.conftest import Server

LAPTOP = (1280, 800)
PHONE = (400, 800)
# What is waited for comes in a second or so; this is for machines that are slow and busy.
PATIENCE_MS = 90_000
PROMPTS = ("def main():", "import os", "class Tree:", "for line in lines:", "x = [", "# Returns the")


@contextmanager
def chromium() -> Iterator[Browser]:
    """Run the system's Chromium while the block lasts; skip the test where there is none."""
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("needs chromium (Debian's package chromium)")
    # Chromium refuses to make its sandbox for root, which containers run as.
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=arguments)
        try:
            yield browser
        finally:
            browser.close()


@dataclass
class Complaints:
    """What a page's console and scripts complain of, and which requests went elsewhere than to its server."""

    said: list[str] = field(default_factory=list)

    def listen(self, page: Page, url: str) -> None:
        page.on("console", lambda line: self.said.append(line.text) if line.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: self.said.append(str(error)))

        def on_request(request: Request) -> None:
            if not request.url.startswith(url):
                self.said.append(f"asked {request.url}")

        page.on("request", on_request)


@contextmanager
def opened(
    browser: Browser, url: str, size: tuple[int, int] = LAPTOP, theme: str = "light"
) -> Iterator[tuple[Page, Complaints]]:
    """Open a page on a server's address, not yet gone to."""
    width, height = size
    # "light" or "dark"; the type of the argument is a list of literals.
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=theme)  # type: ignore[arg-type]
    context.set_default_timeout(PATIENCE_MS)
    page, complaints = context.new_page(), Complaints()
    complaints.listen(page, url)
    try:
        yield page, complaints
    finally:
        context.close()


@contextmanager
def traffic(server: Server, num_streams: int = 3, num_tokens: int = 150) -> Iterator[None]:
    """Have streams run while the block lasts, one after the other on each of some threads."""
    stopping, errors = threading.Event(), list[Exception]()

    def run(index: int) -> None:
        with server.channel() as channel:
            while not stopping.is_set():
                request = GenerateRequest(
                    text=PROMPTS[index % len(PROMPTS)], max_tokens=num_tokens, temperature=1.0, ignore_eos=True
                )
                try:
                    for _ in InferenceStub(channel).Generate(request, timeout=120):
                        if stopping.is_set():
                            break
                except Exception as error:  # noqa: BLE001 - raised below, on the test's thread
                    errors.append(error)
                    return

    threads = [threading.Thread(target=run, args=(index,)) for index in range(num_streams)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stopping.set()
        for thread in threads:
            thread.join(60)
    assert not errors, errors
