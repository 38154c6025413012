"""What engines logged, kept when one was lost: Ray's session folder goes when we do."""

import shutil
import time
from pathlib import Path

KEPT_MAX = 5
FILE_BYTES_MAX = 2**20
"""So much of each file's end is kept."""


def keep_logs(ray_folder: Path, cache: Path) -> Path:
    """Copies the ends of what Ray's processes and workers logged into a new folder of `cache`, and
    drops the oldest that are there. Returns the folder; `OSError` if it cannot be written."""
    all_kept = cache / "logs"
    kept = all_kept / time.strftime("%Y-%m-%dT%H-%M-%S")
    # Ray's session folder is for its owner only too.
    kept.mkdir(mode=0o700, parents=True, exist_ok=True)
    for log in sorted((ray_folder / "session_latest" / "logs").glob("*.*")):
        if log.suffix in (".out", ".err", ".log") and (size := log.stat().st_size):
            with log.open("rb") as source, (kept / log.name).open("wb") as end:
                source.seek(max(0, size - FILE_BYTES_MAX))
                shutil.copyfileobj(source, end)
    for old in sorted(all_kept.iterdir())[:-KEPT_MAX]:
        shutil.rmtree(old, ignore_errors=True)
    return kept
