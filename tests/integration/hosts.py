"""Two hosts on this machine: network namespaces joined by a wire that can delay, lose and cut."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

WIRE = Path(__file__).with_name("wire.py")
DEVICE = "em-wire"


class Hosts:
    """The hosts a and b, which reach each other over the wire alone; this process reaches a by another way."""

    def __init__(self, stack: ExitStack) -> None:
        number = os.getpid()
        self._names = [f"em-{number}-a", f"em-{number}-b"]
        self.addresses = ["10.77.0.1", "10.77.0.2"]
        for name in self._names:
            _ip("netns", "add", name)
            stack.callback(_ip, "netns", "del", name)
            _ip("-n", name, "link", "set", "lo", "up")
        self._wire = subprocess.Popen(
            [sys.executable, str(WIRE), self._names[0], DEVICE, self._names[1], DEVICE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        stack.callback(self._close_wire)
        assert self._wire.stdout is not None
        assert self._wire.stdout.readline() == "up\n", "no wire; what it said is above"
        for name, address in zip(self._names, self.addresses, strict=True):
            _ip("-n", name, "address", "add", f"{address}/24", "dev", DEVICE)
            _ip("-n", name, "link", "set", DEVICE, "up")
        self.outer_address = self._join_outside(number, stack)

    def within(self, host: int) -> list[str]:
        """Return the command that runs the one that follows it on host 0 or 1."""
        return ["ip", "netns", "exec", self._names[host]]

    def set_wire(self, *, delay_s: float = 0.0, loss: float = 0.0) -> int:
        """Have the wire delay each frame, and lose this part of them; 1 cuts it. Return how many were lost so far."""
        assert self._wire.stdin is not None
        assert self._wire.stdout is not None
        self._wire.stdin.write(f"{delay_s} {loss}\n")
        self._wire.stdin.flush()
        return int(self._wire.stdout.readline())

    def _join_outside(self, number: int, stack: ExitStack) -> str:
        """Join this process's namespace with host a; return the address of a there."""
        device, block = f"em{number}", f"10.78.{number // 64 % 256}"
        ours, theirs = f"{block}.{number % 64 * 4 + 1}", f"{block}.{number % 64 * 4 + 2}"
        _ip("link", "add", device, "type", "veth", "peer", "name", "em-outer", "netns", self._names[0])
        stack.callback(_ip, "link", "del", device)
        _ip("address", "add", f"{ours}/30", "dev", device)
        _ip("link", "set", device, "up")
        _ip("-n", self._names[0], "address", "add", f"{theirs}/30", "dev", "em-outer")
        _ip("-n", self._names[0], "link", "set", "em-outer", "up")
        return theirs

    def _close_wire(self) -> None:
        for stream in (self._wire.stdin, self._wire.stdout):
            assert stream is not None
            stream.close()
        self._wire.wait(10)


@contextmanager
def two_hosts() -> Iterator[Hosts]:
    """Yield two hosts; nothing of them stays."""
    with ExitStack() as stack:
        yield Hosts(stack)


def why_no_hosts() -> str:
    """Say why this machine cannot have hosts; "" when it can."""
    if shutil.which("ip") is None:
        return "there is no `ip` command (Debian: iproute2)"
    if not Path("/dev/net/tun").exists():
        return "there is no /dev/net/tun"
    name = f"em-{os.getpid()}-try"
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if tried.returncode:
        return f"network namespaces are not permitted: {tried.stderr.strip()}"
    _ip("netns", "del", name)
    return ""


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)
