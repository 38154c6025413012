"""Keeps the engines' logs when one was lost, since Ray's session folder is removed at the end."""

import shutil
import time
from pathlib import Path

KEPT_MAX = 5
FILE_BYTES_MAX = 2**20
"""How much is kept of the end of each file."""


def keep_logs(ray_folder: Path, cache: Path) -> Path:
    """Copies the ends of the logs of Ray's processes and workers into a new folder of `cache`, and
    removes the oldest such folders. Returns the new one; `OSError` if it cannot be written."""
    all_kept = cache / "logs"
    kept = all_kept / time.strftime("%Y-%m-%dT%H-%M-%S")
    # Only the owner may read it, as with Ray's session folder.
    kept.mkdir(mode=0o700, parents=True, exist_ok=True)
    for log in sorted((ray_folder / "session_latest" / "logs").glob("*.*")):
        if log.suffix in (".out", ".err", ".log") and (size := log.stat().st_size):
            with log.open("rb") as source, (kept / log.name).open("wb") as end:
                source.seek(max(0, size - FILE_BYTES_MAX))
                shutil.copyfileobj(source, end)
    for old in sorted(all_kept.iterdir())[:-KEPT_MAX]:
        shutil.rmtree(old, ignore_errors=True)
    return kept
