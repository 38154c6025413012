"""Decides whether an engine's end was of its own making, so that a request may have caused it.

Rules
- Of its own making are a crash signal, a kill for want of the host's memory, and an exception out
  of the engine's busy loop, whether in the engine's process or in a worker's.
- Not of its own making are an end that somebody asked for, a kill from outside, and the loss of the
  host. Of the last two nothing is seen but that the engine is gone. So an end of which nothing else
  is known is not of its own making either.
- If the engine failed because a worker of it had been killed from outside, that counts as the kill.
- For a fence its own rule decides (core/supervision/hang.py).
"""

from dataclasses import dataclass

from llumnix.core.codes import DeathCode


@dataclass(frozen=True, slots=True, kw_only=True)
class Fenced:
    """Why an engine that lives is to be ended at once."""

    why: str
    blamed: bool  # whether a request may have caused it
    code: DeathCode = DeathCode.STALL


@dataclass(frozen=True, slots=True, kw_only=True)
class Death:
    """How an engine ended."""

    why: str
    blamed: bool = False
    fenced: bool = False
    code: DeathCode = DeathCode.EXIT


@dataclass(frozen=True, slots=True, kw_only=True)
class Traces:
    """What an end left behind."""

    raised: bool = False  # an exception came out of its busy loop
    crashed: bool = False  # its log tells of a crash signal
    worker_exit: int | None = None
    """The exit status of the worker that ended first, if one had ended before; negative: the number
    of the signal that ended it."""
    out_of_memory: bool = False  # the host's memory had run out


KILLS = (-1, -2, -9, -15)
"""SIGHUP, SIGINT, SIGKILL and SIGTERM come from outside."""


def is_blamed(traces: Traces) -> bool:
    """Whether the engine's end was of its own making."""
    if traces.crashed or traces.out_of_memory:
        return True
    if traces.worker_exit is not None:
        return traces.worker_exit not in (0, *KILLS)
    return traces.raised


def code_of(traces: Traces) -> DeathCode:
    """How the engine ended. Of a kill from outside nothing is seen but that the engine is gone."""
    if traces.out_of_memory:
        return DeathCode.OOM
    if traces.crashed or not (traces.raised or traces.worker_exit):
        return DeathCode.SIGNAL
    killed = traces.worker_exit is not None and traces.worker_exit < 0
    return DeathCode.SIGNAL if killed else DeathCode.EXIT
