"""The network between hosts that are namespaces of this machine: one process carries all packets.

`python relay.py NAME=ADDRESS ...` makes a device `eth0` in each of the named network namespaces,
and passes what is written there to the one whose address it is for. By default at once. A line on
its input changes how one way is: `{"from": "a", "to": "b", "cut": true, "delay_s": 0.02,
"jitter_s": 0, "loss": 0.01, "bytes_per_s": 12500000}`; what a line leaves out is as at first. It
answers `ok`. It ends with its input.
"""

import contextlib
import ctypes
import fcntl
import heapq
import json
import os
import random
import select
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

TUNSETIFF = 0x400454CA
IFF_TUN, IFF_NO_PI = 0x0001, 0x1000
CLONE_NEWNET = 0x40000000
MTU = 9000
PREFIX = 24
QUEUE_S = 0.5
"""A way that is slower than what it is given keeps so much of it, and loses the rest."""


@dataclass
class Way:
    """From one host to another."""

    cut: bool = False
    delay_s: float = 0.0
    jitter_s: float = 0.0
    loss: float = 0.0
    bytes_per_s: float = 0.0  # no limit
    free_s: float = field(default=0.0, compare=False)  # when the last packet is through
    last_s: float = field(default=0.0, compare=False)  # when the last packet arrives

    def arrival_s(self, now_s: float, size: int, dice: random.Random) -> float | None:
        """When a packet is there; None if it is lost. None overtakes another."""
        if self.cut or dice.random() < self.loss:
            return None
        through_s = now_s
        if self.bytes_per_s:
            if self.free_s - now_s > QUEUE_S:
                return None
            through_s = self.free_s = max(now_s, self.free_s) + size / self.bytes_per_s
        there_s = through_s + self.delay_s + self.jitter_s * dice.random()
        self.last_s = max(self.last_s, there_s)
        return self.last_s


@contextlib.contextmanager
def inside(name: str) -> Iterator[None]:
    """The calling thread, and what it starts, is in this network namespace meanwhile."""
    own, other = (
        os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        for path in ("/proc/thread-self/ns/net", f"/run/netns/{name}")
    )
    try:
        _enter(other)
        try:
            yield
        finally:
            _enter(own)
    finally:
        os.close(own)
        os.close(other)


def _enter(namespace: int) -> None:
    if ctypes.CDLL(None, use_errno=True).setns(namespace, CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "setns")


def open_device(name: str, address: str) -> int:
    """The packets that the host sends, to be read, and to be written to it."""
    with inside(name):
        device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH22x", b"eth0", IFF_TUN | IFF_NO_PI))
        for command in (
            "ip link set lo up",
            f"ip addr add {address}/{PREFIX} dev eth0",
            f"ip link set eth0 mtu {MTU} up",
        ):
            subprocess.run(command.split(), check=True)
    return device


def main(words: list[str]) -> None:
    addresses = dict(word.split("=") for word in words)
    devices = {name: open_device(name, address) for name, address in addresses.items()}
    names = {fd: name for name, fd in devices.items()}
    at = {socket.inet_aton(address): name for name, address in addresses.items()}
    ways = {(a, b): Way() for a in addresses for b in addresses if a != b}
    dice, order = random.Random(1), 0
    late: list[tuple[float, int, int, bytes]] = []  # to be delivered: when, order, device, packet
    print("ok", flush=True)
    while True:
        wait_s = max(0.0, late[0][0] - time.monotonic()) if late else None
        ready, _, _ = select.select([0, *names], [], [], wait_s)
        now_s = time.monotonic()
        while late and late[0][0] <= now_s:
            _, _, device, packet = heapq.heappop(late)
            deliver(device, packet)
        for fd in ready:
            if fd == 0:
                line = sys.stdin.readline()
                if not line:
                    return
                change = json.loads(line)
                way = change.pop("from"), change.pop("to")
                ways[way] = Way(**change)
                print("ok", flush=True)
                continue
            packet = os.read(fd, MTU)
            to = at.get(packet[16:20])
            if packet[0] >> 4 != 4 or to is None:
                continue
            there_s = ways[names[fd], to].arrival_s(now_s, len(packet), dice)
            if there_s is not None and there_s <= now_s:
                deliver(devices[to], packet)
            elif there_s is not None:
                order += 1
                heapq.heappush(late, (there_s, order, devices[to], packet))


def deliver(device: int, packet: bytes) -> None:
    """A host that is gone, or takes in nothing more, loses it."""
    with contextlib.suppress(OSError):
        os.write(device, packet)


if __name__ == "__main__":
    main(sys.argv[1:])
