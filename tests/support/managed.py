"""What starts and stops a service elsewhere, played by tests: systemd here, the kubelet in
kubelet.py. Each does to the real `llumnix serve` what its manual says, no more."""

import contextlib
import os
import socket
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx

KEY, ADMIN_KEY = "an-ordinary-key", "an-administrators-key"
"""Of servers in these tests."""


@dataclass
class NotifySocket:
    """systemd's end of `NOTIFY_SOCKET`: states by the process that sent them."""

    path: Path
    heard: list[tuple[int, str]] = field(default_factory=list)

    def of(self, pid: int) -> list[str]:
        """What `NotifyAccess=main` lets through of this main process."""
        return [state for sender, state in list(self.heard) if sender == pid]


@contextlib.contextmanager
def notify_socket(path: Path) -> Iterator[NotifySocket]:
    """Listens there, and notes what comes."""
    it = NotifySocket(path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        listening.bind(str(path))
        listening.settimeout(0.1)
        over = threading.Event()
        thread = threading.Thread(target=_listen, args=(listening, it, over), daemon=True)
        thread.start()
        try:
            yield it
        finally:
            over.set()
            thread.join()


def _listen(listening: socket.socket, it: NotifySocket, over: threading.Event) -> None:
    while not over.is_set():
        with contextlib.suppress(TimeoutError):
            text, ancillary, _, _ = listening.recvmsg(4096, socket.CMSG_SPACE(12))
            pid, _, _ = struct.unpack("3i", ancillary[0][2])
            it.heard += [(pid, line) for line in text.decode().splitlines()]


def unit_settings(path: Path) -> dict[str, list[str]]:
    """A unit file's assignments by name, lines that go on in the next one joined."""
    text = path.read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if "=" in line and not line.startswith("#")]
    settings: dict[str, list[str]] = {}
    for line in lines:
        name, _, value = line.partition("=")
        settings.setdefault(name, []).append(" ".join(value.split()))
    return settings


def seconds(text: str) -> float:
    """A time as systemd writes it, of one number and one unit."""
    for unit, each in {"min": 60, "s": 1}.items():
        if text.endswith(unit):
            return float(text.removesuffix(unit)) * each
    return float(text)


def environment(**more: str) -> dict[str, str]:
    """A service's: without the variables of the test's own terminal that change llumnix."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("VLLM_", "LLUMNIX_"))}
    return {**kept, "HF_HUB_OFFLINE": "1", **more}


def one_stream(port: int, max_tokens: int = 1500) -> str:
    """The last line of a stream; with so many tokens it takes some seconds."""
    body = {"model": "tiny", "prompt": "p", "max_tokens": max_tokens, "ignore_eos": True}
    body["stream"] = True
    with httpx.stream(
        "POST",
        f"http://127.0.0.1:{port}/v1/completions",
        json=body,
        headers={"Authorization": f"Bearer {KEY}"},
        timeout=120,
    ) as response:
        return [line for line in response.iter_lines() if line][-1]


def running(port: int) -> bool:
    """Whether a request has its first token."""
    found = httpx.get(
        f"http://127.0.0.1:{port}/llumnix/v1/requests",
        headers={"Authorization": f"Bearer {ADMIN_KEY}"},
    )
    return any(row["output_tokens"] for row in found.raise_for_status().json()["requests"])
