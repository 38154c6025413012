"""What a deployment is told once, at its start.

Each knob is declared here, with unit, default and check; the command line makes its flags from
these fields. vLLM's own flags are vLLM's to declare.
"""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from llumnix.core.policies.dispatch import DISPATCH_POLICIES
from llumnix.errors import UsageError


def knob(default: Any, help: str, **flag: Any) -> Any:
    """A field that becomes a command-line flag; `flag` goes to argparse."""
    return field(default=default, metadata={"help": help, "flag": flag})


@dataclass(frozen=True, slots=True, kw_only=True)
class DeploymentConfig:
    """How many instances, placed by what, reachable for whom."""

    instances: int = knob(2, "How many vLLM instances to start.", type=int, metavar="N")
    policy: str = knob(
        "least-loaded",
        "How a new request is placed.",
        choices=sorted(DISPATCH_POLICIES),
    )
    ray_address: str | None = knob(
        None,
        "Join this Ray cluster (HOST:PORT, or 'auto' for the one running here) instead of starting "
        "Ray on this machine.",
        metavar="ADDRESS",
    )
    event_log: str | None = knob(
        None,
        "Append every fact, decision and migration step to this file (JSON lines; "
        "`llumnix replay` reads it).",
        metavar="PATH",
    )
    migration_bandwidth: float | None = knob(
        None,
        "Limit on what one worker pulls for migrations, in MB/s.",
        type=float,
        metavar="MB_PER_S",
    )
    insecure: bool = knob(
        False,
        "Serve beyond loopback without an --api-key.",
        action="store_true",
    )

    def __post_init__(self) -> None:
        if self.instances < 1:
            raise UsageError(f"--instances {self.instances}: must be 1 or more")
        if self.migration_bandwidth is not None and not self.migration_bandwidth > 0:
            raise UsageError(
                f"--migration-bandwidth {self.migration_bandwidth}: must be above 0; leave it out "
                "for no limit"
            )
        if self.event_log is not None and not Path(self.event_log).absolute().parent.is_dir():
            raise UsageError(
                f"--event-log {self.event_log}: its folder does not exist; make it first"
            )


def knobs() -> list[tuple[str, Any, dict[str, Any]]]:
    """Every knob as (field name, default, arguments for argparse's `add_argument`)."""
    return [
        (f.name, f.default, {"help": f.metadata["help"], **f.metadata["flag"]})
        for f in fields(DeploymentConfig)
    ]
