"""The limit on what a worker pulls, over all links to all peers."""

import threading
import time


class RateLimiter:
    """A token bucket of one chunk: each chunk starts when those before it are paid for."""

    def __init__(self, bytes_per_s: float | None) -> None:
        self._bytes_per_s = bytes_per_s
        self._lock = threading.Lock()
        self._paid_s = 0.0

    def take(self, size: int, interrupted: threading.Event) -> None:
        """Waits for the turn of `size` bytes, or for the event. Any thread."""
        if self._bytes_per_s is None:
            return
        with self._lock:
            now_s = time.monotonic()
            start_s = max(now_s, self._paid_s)
            self._paid_s = start_s + size / self._bytes_per_s
        if start_s > now_s:
            interrupted.wait(start_s - now_s)
