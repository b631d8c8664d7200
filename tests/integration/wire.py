"""A wire between two network namespaces of this machine that delays, loses and cuts as it is told.

It passes Ethernet frames between a tap device in each, so kernels without netem can do it too. Run as a program:

    python wire.py NAMESPACE DEVICE NAMESPACE DEVICE

with a line `DELAY_S LOSS` on standard input for each change; LOSS is the part of the frames that vanish, 1 cuts the
wire. It says `up` once both devices are there, answers each line with the number of frames lost so far, and ends at the
end of its input.
"""

import ctypes
import errno
import fcntl
import heapq
import os
import random
import selectors
import struct
import sys
import time

_TUNSETIFF = 0x400454CA
_IFF_TAP, _IFF_NO_PI = 0x0002, 0x1000
_CLONE_NEWNET = 0x40000000
_FRAME_BYTES = 65536


def open_tap(namespace: str, device: str) -> int:
    """Make a tap device in a namespace, which goes with the descriptor returned."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/run/netns/{namespace}") as handle:
        if libc.setns(handle.fileno(), _CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"cannot enter the namespace {namespace}")
    tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(tap, _TUNSETIFF, struct.pack("16sH22x", device.encode(), _IFF_TAP | _IFF_NO_PI))
    return tap


def say(what: object) -> None:
    """Write a line."""
    sys.stdout.write(f"{what}\n")
    sys.stdout.flush()


def main() -> None:
    """Pass frames until the input ends."""
    taps = [open_tap(*pair) for pair in (sys.argv[1:3], sys.argv[3:5])]
    opposite = dict(zip(taps, taps[::-1], strict=True))
    rng = random.Random(0)
    delay_s, loss = 0.0, 0.0
    under_way: list[tuple[float, int, int, bytes]] = []
    count = num_lost = 0
    with selectors.DefaultSelector() as selector:
        for source in (*taps, sys.stdin.fileno()):
            selector.register(source, selectors.EVENT_READ)
        say("up")
        while True:
            wait_s = max(0.0, under_way[0][0] - time.monotonic()) if under_way else None
            for key, _ in selector.select(wait_s):
                if key.fd not in opposite:
                    line = sys.stdin.readline()
                    if not line:
                        return
                    delay_s, loss = map(float, line.split())
                    say(num_lost)
                    continue
                frame = os.read(key.fd, _FRAME_BYTES)
                if rng.random() < loss:
                    num_lost += 1
                    continue
                count += 1
                heapq.heappush(under_way, (time.monotonic() + delay_s, count, opposite[key.fd], frame))
            while under_way and under_way[0][0] <= time.monotonic():
                _, _, tap, frame = heapq.heappop(under_way)
                try:
                    os.write(tap, frame)
                except OSError as error:
                    if error.errno != errno.EIO:  # the device is down, and what comes over a wire then is lost
                        raise


if __name__ == "__main__":
    main()
