"""Metrics of several processes, which any of them shows as one sum.

prometheus_client keeps them in files that all processes map. Which it does is settled where a
metric is made, by a variable of the environment. `process_*` of Python are not shown then.

prometheus_client internals relied on here (tests/observe/test_shared_metrics.py fails when one
changes): metrics are made with `values.ValueClass`, which `values.get_value_class()` makes by
`PROMETHEUS_MULTIPROC_DIR`.
"""

import os
from pathlib import Path

from prometheus_client import multiprocess, values

VARIABLE = "PROMETHEUS_MULTIPROC_DIR"


def share(folder: Path) -> None:
    """Metrics that are made from now on, here and in processes that this one starts, are added up
    through this folder, which is made."""
    folder.mkdir(mode=0o700)
    os.environ[VARIABLE] = str(folder)
    values.ValueClass = values.get_value_class()  # type: ignore[no-untyped-call]


def forget(pid: int) -> None:
    """A process that shared its metrics has ended: what it had at the moment is nothing now."""
    multiprocess.mark_process_dead(pid, os.environ[VARIABLE])  # type: ignore[no-untyped-call]
