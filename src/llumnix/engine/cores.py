"""Which devices an instance computes on: on a CPU host, which of its cores. And how fast its
threads take the interpreter's lock from each other.

vLLM binds an engine's threads to all cores that the process may use, less one for the scheduler.
Several engines on one host would then all sit on the same cores, so each gets a share of its own.

vLLM internals relied on here: `current_platform`, `get_allowed_cpu_list`, and
`shm_broadcast.sched_yield`, which an engine and its workers call over and over while one waits for
the other (tests/engine/test_cores.py fails when they no longer do).
"""

import os
import sys
import time
from collections.abc import Sequence

SWITCH_INTERVAL_S = 0.0005
"""How long a thread waits for Python's interpreter lock while its engine has a migration under way,
and in workers that are processes of their own. Main threads compute or spin, and by default a
migration's thread that wakes would wait ten times as long. Always on, it made an engine's steps
longer, since each message to or from vLLM's own threads broke in on them."""

FAST_SWITCH_S = 0.1
"""For so long after a migration threads still take the interpreter's lock fast, so that the first
token at the destination does not leave later than the last one left its source."""


NAP_S = 0.0002
"""How long a process of an engine on a CPU host sleeps before it looks again whether the other has
answered. A step takes some 5 ms at least. vLLM yields the core instead and looks at once. On two
cores with two engines, two frontends and ten streams that left the frontends without a core for up
to 30 s: 407 tokens/s. With naps of 50, 200 and 500 us these were 707, 730 and 782, and one stream
alone 196, 183 and 166 (143 with yields)."""


class ThreadSwitching:
    """Lets an engine's threads have the interpreter's lock fast while a request moves."""

    def __init__(self) -> None:
        self.default_s = sys.getswitchinterval()
        self._until_s = 0.0
        self._fast = False

    def look(self, now: float, *, moving: bool) -> None:
        """Between any two steps. `moving`: whether a request moves just now."""
        if moving:
            self._until_s = now + FAST_SWITCH_S
        fast = now < self._until_s
        if fast is not self._fast:
            self._fast = fast
            sys.setswitchinterval(SWITCH_INTERVAL_S if fast else self.default_s)


def take_devices(slot: int, slots: int, world_size: int) -> list[str]:
    """The devices that this process was given. On a CPU host it takes its share of the cores
    first."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        visible = os.environ.get(current_platform.device_control_env_var, "")
        return [f"{current_platform.device_type}:{d}" for d in visible.split(",") if d]
    from vllm.utils.cpu_resource_utils import get_allowed_cpu_list

    nap_while_waiting()
    cores = [cpu.id for cpu in sorted(get_allowed_cpu_list(), key=lambda c: (c.numa_node, c.id))]
    if "VLLM_CPU_OMP_THREADS_BIND" not in os.environ:
        share = share_of_cores(cores, slot, slots, world_size)
        if share is not None:
            os.environ["VLLM_CPU_OMP_THREADS_BIND"] = share
    bound = os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "auto")
    return [f"cpu:{share}" for share in bound.split("|")]


def nap_while_waiting() -> None:
    """On a CPU host, lets this process sleep while it waits for its engine's other processes. They
    and the frontends need the cores on which it would poll."""
    from vllm.distributed.device_communicators import shm_broadcast
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        shm_broadcast.sched_yield = _nap


def _nap() -> None:
    time.sleep(NAP_S)


def share_of_cores(cores: Sequence[int], slot: int, slots: int, ranks: int) -> str | None:
    """Value for VLLM_CPU_OMP_THREADS_BIND: the cores of instance `slot` of `slots`, as vLLM wants
    them (`0,1|2,3`).

    `cores` are the host's usable ones, in an order that keeps neighbours together. `ranks`: the
    instance's worker processes (tensor x pipeline parallel), which divide its cores. None leaves
    the choice to vLLM, when one instance has the host to itself. With more instances than cores,
    several share a core.
    """
    if slots <= 1 and ranks == 1:
        return None
    per_instance = max(1, len(cores) // slots)
    first = slot * per_instance % len(cores)
    mine = [cores[(first + i) % len(cores)] for i in range(per_instance)]
    per_rank = max(1, len(mine) // ranks)
    shares = [
        [mine[(rank * per_rank + i) % len(mine)] for i in range(per_rank)] for rank in range(ranks)
    ]
    return "|".join(",".join(map(str, share)) for share in shares)
