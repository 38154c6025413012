"""Decides whether an engine's end was of its own making, so that a request may have caused it.

Rules
- A crash signal and a kill for want of the host's memory are, and an exception out of the engine's
  busy loop is. For a worker process the same holds.
- But if the engine failed because a worker of it had been killed from outside, that is no more than
  the kill.
- An end that somebody asked for, a kill from outside and the loss of the host are not. All that is
  seen of the last two is that the engine is gone. So an end of which nothing else is known is not.
- Of a fence its rule says it (core/supervision/hang.py).
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
