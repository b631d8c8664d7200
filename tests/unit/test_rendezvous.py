"""The meeting of two ends: the server's keys, its bounds, what a bad client can do, and links formed through it."""

import random
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import timedelta

import msgpack
import pytest

from expertmesh.actors.links.base import Link, open_link
from expertmesh.actors.links.ends import SHARD_RANK, WORKER_RANK
from expertmesh.actors.links.rendezvous import RendezvousServer, RendezvousStore
from expertmesh.cluster.errors import LinkError
from expertmesh.cluster.packets import PacketHeader, PacketKind
from tests.fleet import CPU, HOST, break_link, link_address

JOIN = ["join", "pair"]


@pytest.fixture
def server() -> Iterator[RendezvousServer]:
    with closing(RendezvousServer(HOST)) as server:
        yield server


def join(server: RendezvousServer, name: str = "pair", timeout_s: float = 2.0) -> RendezvousStore:
    return RendezvousStore(HOST, server.port, name, timeout_s)


def frame(value: object) -> bytes:
    message: bytes = msgpack.packb(value)
    return len(message).to_bytes(4, "little") + message


def form_link(server: RendezvousServer, name: str) -> tuple[Link, Link]:
    def form(rank: int) -> Link:
        return open_link("gloo", link_address(name, rank, port=server.port), CPU)

    with ThreadPoolExecutor() as pool:
        shard_end = pool.submit(form, SHARD_RANK)
        return form(WORKER_RANK), shard_end.result()


def pass_one_message(sender: Link, receiver: Link, sequence: int) -> None:
    header = PacketHeader(kind=PacketKind.DISPATCH, generation=1, sequence=sequence, epoch=1)
    sender.send(header)
    assert receiver.recv(timeout_s=2.0)[0] == header


def wait_until(holds: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 2.0
    while not holds():
        assert time.monotonic() < deadline_s, "not within 2 s"
        time.sleep(0.005)


def seconds_to_fail(call: Callable[[], object], match: str) -> float:
    started_s = time.monotonic()
    with pytest.raises(LinkError, match=match):
        call()
    return time.monotonic() - started_s


def test_two_ends_see_each_others_keys(server: RendezvousServer) -> None:
    with closing(join(server)) as one, closing(join(server)) as other:
        assert not one.check(["a"])
        other.set("a", bytes(range(256)))
        other.set("b", "text")
        assert one.check(["a", "b"])
        assert not one.check(["a", "c"])
        assert (one.get("a"), one.get("b")) == (bytes(range(256)), b"text")
        assert [one.add("n", 5), other.add("n", -2), one.add("n", 0)] == [5, 3, 3]
        assert one.get("n") == b"3"
        one.wait(["a", "b", "n"])


def test_a_get_waits_for_the_other_end(server: RendezvousServer) -> None:
    with closing(join(server)) as one, ThreadPoolExecutor() as pool:
        value = pool.submit(one.get, "late")
        time.sleep(0.1)
        assert not value.done()
        with closing(join(server)) as other:
            other.set("late", b"here")
            assert value.result(timeout=1.0) == b"here"


def test_links_do_not_see_each_others_keys(server: RendezvousServer) -> None:
    with closing(join(server, "left")) as left, closing(join(server, "right")) as right:
        left.set("a", b"1")
        assert not right.check(["a"])


def test_keys_live_until_the_last_end_has_left(server: RendezvousServer) -> None:
    with closing(join(server)) as one:
        with closing(join(server)) as other:
            other.set("a", b"1")
        assert one.get("a") == b"1"
        assert server.num_keys == 1
    wait_until(lambda: server.num_keys == 0)
    with closing(join(server)) as again:
        assert not again.check(["a"])


def test_a_wait_ends_at_the_shorter_of_both_deadlines(server: RendezvousServer) -> None:
    with closing(join(server, timeout_s=0.3)) as store:
        assert 0.3 <= seconds_to_fail(lambda: store.get("a"), "nobody set a within 0.3 s") < 1.0
        hour, blink = timedelta(hours=1), timedelta(seconds=0.1)
        assert 0.3 <= seconds_to_fail(lambda: store.wait(["a", "b"], hour), "nobody set a, b within 0.3 s") < 1.0
        assert 0.1 <= seconds_to_fail(lambda: store.wait(["a"], blink), "nobody set a within 0.1 s") < 1.0
        store.set_timeout(blink)
        assert 0.1 <= seconds_to_fail(lambda: store.get("a"), "nobody set a within 0.1 s") < 1.0
        store.set("a", b"1")
        assert store.get("a") == b"1"


def test_a_closed_server_ends_all_waits(server: RendezvousServer) -> None:
    with closing(join(server, timeout_s=30.0)) as store:
        timer = threading.Timer(0.1, server.close)
        timer.start()
        assert seconds_to_fail(lambda: store.get("a"), "the rendezvous at .* did not answer 'get'") < 2.0
        timer.join()
        assert seconds_to_fail(lambda: store.set("a", b"1"), "did not answer 'set'") < 1.0
    assert seconds_to_fail(lambda: join(server), "the rendezvous at .* cannot be reached: .*refused") < 1.0
    server.close()


def test_a_server_that_does_not_answer_is_not_waited_for() -> None:
    with socket.create_server((HOST, 0)) as silent:
        port = silent.getsockname()[1]
        waited_s = seconds_to_fail(lambda: RendezvousStore(HOST, port, "pair", 0.3), "did not answer 'join': timed out")
    assert 0.3 <= waited_s < 1.0


def test_a_store_that_has_left_is_of_no_more_use(server: RendezvousServer) -> None:
    store = join(server)
    store.close()
    assert seconds_to_fail(lambda: store.check(["a"]), "did not answer 'get'") < 0.1


@pytest.mark.parametrize(
    "sent",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        bytes(64),
        b"\xff" * 64,
        frame(JOIN)[:-1] + b"\xc1",
        frame(["set", "a", b"1"]),
        frame(["join", 7]),
        frame({"join": "pair"}),
        frame(JOIN) + frame(["fly"]),
        frame(JOIN) + frame(["set", "a", 1]),
        frame(JOIN) + frame(["set", b"a", b"1"]),
        frame(JOIN) + frame(["add", "a", "1"]),
        frame(JOIN) + frame(["set", "a", b"x"]) + frame(["add", "a", 1]),
        frame(JOIN) + frame(["get", [["a"]], 1.0]),
        frame(JOIN) + frame(["get", ["a"], -1.0]),
        frame(JOIN) + frame(["get", ["a"], float("nan")]),
        frame(JOIN) + frame(["get", ["a"], 1e300]),
        frame(JOIN) + frame(["set", "a", bytes(1 << 20)]),
        frame(JOIN) + b"".join(frame(["set", str(n), b""]) for n in range(65)),
    ],
)
def test_a_bad_client_is_cut_off_and_disturbs_no_other(server: RendezvousServer, sent: bytes) -> None:
    with closing(join(server, "bystander")) as one, closing(join(server, "bystander")) as other:
        with ThreadPoolExecutor() as pool, socket.create_connection((HOST, server.port), timeout=2.0) as bad:
            value = pool.submit(one.get, "a")
            assert is_cut_off(bad, sent)
            assert not value.done()
            other.set("a", b"1")
            assert value.result(timeout=1.0) == b"1"
        wait_until(lambda: server.num_keys == 1)


def is_cut_off(connection: socket.socket, sent: bytes) -> bool:
    """Send, and read until the server ends the connection; TimeoutError says that it does not."""
    try:
        connection.sendall(sent)
        while connection.recv(1 << 16):
            pass
    except (ConnectionResetError, BrokenPipeError):  # the server left some of what was sent unread
        return True
    return True


def test_random_bytes_leave_nothing_behind(server: RendezvousServer) -> None:
    rng = random.Random(11)
    sound = frame(JOIN) + frame(["set", "a", b"1"]) + frame(["get", ["a"], 0.0])
    for _ in range(200):
        damaged = bytearray(sound)
        for _ in range(rng.randrange(1, 4)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        with socket.create_connection((HOST, server.port), timeout=2.0) as bad:
            bad.sendall(damaged)
    wait_until(lambda: server.num_keys == 0)
    with closing(join(server)) as one, closing(join(server)) as other:
        one.set("a", b"1")
        assert other.get("a") == b"1"


def test_a_message_above_the_bound_is_not_sent(server: RendezvousServer) -> None:
    with closing(join(server)) as store:
        seconds_to_fail(lambda: store.set("a", bytes(1 << 20)), r"did not answer 'set': a message of \d+ bytes, more")


def test_ends_meet_over_ipv6() -> None:
    try:
        server = RendezvousServer("::1")
    except OSError:
        pytest.skip("this machine has no IPv6 on loopback")
    with closing(server), closing(RendezvousStore("::1", server.port, "pair", 2.0)) as store:
        store.set("a", b"1")
        assert store.get("a") == b"1"


def test_links_one_after_the_other_are_quick_and_leave_no_keys(server: RendezvousServer) -> None:
    times_ms = []
    for number in range(40):
        started_s = time.perf_counter()
        worker, shard = form_link(server, f"link-{number}")
        times_ms.append((time.perf_counter() - started_s) * 1e3)
        pass_one_message(worker, shard, number)
        break_link(worker)
    # A question to a name server that does not answer takes seconds.
    assert statistics.median(times_ms) < 200
    assert max(times_ms) < 2000
    wait_until(lambda: server.num_keys == 0)


def test_links_that_form_at_the_same_time(server: RendezvousServer) -> None:
    with ThreadPoolExecutor(8) as pool:
        links = list(pool.map(lambda number: form_link(server, f"link-{number}"), range(8)))
    for number, (worker, shard) in enumerate(links):
        pass_one_message(worker, shard, number)
        pass_one_message(shard, worker, number)
    wait_until(lambda: server.num_keys == 0)
    for worker, _ in links:
        break_link(worker)


@pytest.mark.parametrize("rank", [WORKER_RANK, SHARD_RANK])
def test_an_end_that_waits_alone_leaves_no_keys(server: RendezvousServer, rank: int) -> None:
    address = link_address("alone", rank, port=server.port, timeout_s=1.0)
    match = r"link alone: the other end did not come: the rendezvous at .*: nobody set 0/. within 1 s"
    assert seconds_to_fail(lambda: open_link("gloo", address, CPU), match) >= 1.0
    wait_until(lambda: server.num_keys == 0)


def test_a_server_that_closes_ends_the_forming_of_a_link(server: RendezvousServer) -> None:
    timer = threading.Timer(0.2, server.close)
    timer.start()
    address = link_address("alone", WORKER_RANK, port=server.port, timeout_s=30.0)
    match = "link alone: the other end did not come: the rendezvous at .* did not answer 'get'"
    assert seconds_to_fail(lambda: open_link("gloo", address, CPU), match) < 2.0
    timer.join()
