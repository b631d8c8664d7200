"""Short forms of the load benchmarks: who is refused, that no token is wrong, and that all is given back."""

import argparse
import asyncio
from pathlib import Path

import psutil
import pytest

from benchmarks.load_server import LoadedServer, look
from benchmarks.overload import measure, server_options
from benchmarks.soak import soak
from tests.integration.conftest import POCKET, Server, serving


def loaded(server: Server) -> LoadedServer:
    return LoadedServer(server.address, server.http_url, server.process.pid)


@pytest.mark.timeout(300)
def test_ten_times_the_capacity_is_refused_and_what_is_served_is_right(tmp_path: Path) -> None:
    asked = argparse.Namespace(model=POCKET, seconds=6.0, times=10.0, max_sequences=8, prompt=24, new=32)
    with serving(POCKET, tmp_path, *server_options(tmp_path, asked.max_sequences)) as server:
        result = asyncio.run(measure(loaded(server), asked))
    phases = result["phases"]
    assert phases["capacity"]["refused"] == 0
    assert phases["overload"]["refused"] > 0
    assert phases["overload"]["served"] + phases["overload"]["refused"] == result["sent"]
    for phase in phases.values():
        assert phase["served"] > 0
        assert (phase["different"], phase["failures"]) == (0, {})
    assert phases["overload"]["told_to_wait_p50_s"] >= 1


@pytest.mark.timeout(300)
def test_clients_that_come_cancel_and_vanish_leave_nothing_behind(tmp_path: Path) -> None:
    """Pages and live sequences must return, or `soak` raises; descriptors are compared here."""
    config = tmp_path / "soak.toml"
    config.write_text("max_sequences = 8\nmax_queue = 24\n")
    with serving(POCKET, tmp_path, "--config", str(config), "--http-port", "0") as server:
        result, _ = asyncio.run(soak(loaded(server), 15.0, 12))
    seen, roles = result["seen"], result["roles"]
    for kind in ("reads to the end: all", "cancels: cancelled", "HTTP, reads to the end: all", "HTTP, resets: reset"):
        assert seen.get(kind), f"{kind} was not seen: {seen}"
    assert not [what for what in seen if "tokens" in what or "INTERNAL" in what or "UNAVAILABLE" in what], seen
    for role in ("gateway", "HTTP proxy", "worker", "shard"):
        # Ray opens connections between its own processes whenever it likes.
        assert roles[role]["fds_after"] <= roles[role]["fds_before"] + 5, roles


def test_a_slow_look_finds_this_process() -> None:
    usage = look(psutil.Process().pid)["command"]
    assert usage.rss_bytes > 0
    assert usage.num_fds > 0
