"""Which of a CPU host's cores an instance computes on.

vLLM binds an engine's threads to all cores that the process may use, less one for the scheduler.
Several engines on one host would then all sit on the same cores, so each gets a share of its own.
"""

from collections.abc import Sequence

SWITCH_INTERVAL_S = 0.0005
"""For Python's interpreter lock while an engine has a migration under way, and in workers that are
processes of their own. Main threads compute or spin, and a migration's thread that wakes would wait
for the lock ten times as long by default. Always on, it made an engine's steps longer: each message
to or from vLLM's own threads broke in on them."""


def share_of_cores(cores: Sequence[int], slot: int, slots: int, ranks: int) -> str | None:
    """Value for VLLM_CPU_OMP_THREADS_BIND: the cores of instance `slot` of `slots`.

    `cores` are the host's usable ones in an order that keeps neighbours together. `ranks`: the
    instance's worker processes (tensor x pipeline parallel), which share its cores out in turn,
    written as vLLM wants it: `0,1|2,3`. None leaves the choice to vLLM (one instance has the host
    to itself). With more instances than cores they take turns on them.
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
