"""Tells a service manager how the service is: systemd's protocol of `Type=notify`, sd_notify(3).

Without `NOTIFY_SOCKET` in the environment nothing is sent. The service manager listens to the main
process alone, so that no other has to call this.
"""

import asyncio
import contextlib
import os
import socket

SEND_TIMEOUT_S = 1.0


def notify(*assignments: str) -> None:
    """Sends lines such as `READY=1` in one datagram. A message that cannot be sent is lost, since
    the service is to go on without its manager."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):  # Linux's abstract names begin with NUL.
        address = "\0" + address[1:]
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.settimeout(SEND_TIMEOUT_S)
        sender.connect(address)
        sender.send("\n".join(assignments).encode())


def keep_alive(loop: asyncio.AbstractEventLoop) -> None:
    """Says from now on, twice in each `WATCHDOG_USEC`, that the event loop has its turns. The
    manager ends a service that has been silent for longer."""
    every_s = int(os.environ.get("WATCHDOG_USEC") or 0) / 2e6

    def alive() -> None:
        notify("WATCHDOG=1")
        loop.call_later(every_s, alive)

    if every_s > 0:
        alive()
