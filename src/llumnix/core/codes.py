"""Reasons as short words, for programs. Each stands beside a sentence (`why`) for people.

They are labels of metrics (observe/metrics.py) and fields of the event log. A word is a promise:
none changes its meaning.
"""

import enum


class DispatchCode(enum.StrEnum):
    """Why a request was placed where it was."""

    SOONEST = "soonest"  # it starts soonest there
    CACHED = "cached"  # much of its prompt is in the prefix cache there
    FREEST = "freest"
    LEAST_LOADED = "least_loaded"
    TURN = "turn"  # it was that instance's turn
    PINNED = "pinned"  # only that engine holds what it asks for
    BYPASS = "bypass"  # the frontend placed it without the controller
    REVIVED = "revived"  # its engine died; whoever chose this one
    NONE = "none"  # no instance could take it


class MoveCode(enum.StrEnum):
    """Why a request is moved."""

    BALANCE = "balance"
    HEADROOM = "headroom"  # it waits for memory, and only headroom is left elsewhere
    QUEUE = "queue"  # its instance has the longer queue
    DRAIN = "drain"
    USER = "user"


class AbortCode(enum.StrEnum):
    """Why a move was called off."""

    NO_ROOM = "no_room"  # in memory or among running requests, at the destination
    BUSY = "busy"  # one of the engines moves as many requests as it may, or takes none just now
    IMMOVABLE = "immovable"  # such requests are not moved
    PREEMPTED = "preempted"
    ENDED = "ended"  # the request did, before its move
    SILENT = "silent"  # one of the engines said nothing for too long
    GRAMMAR = "grammar"  # its grammar could not be had at the destination
    STATE = "state"  # its state could not be read or installed there
    PEER_LOST = "peer_lost"  # an engine or a frontend that was needed died
    OTHER = "other"


class DeathCode(enum.StrEnum):
    """Why an engine's run ended."""

    EXIT = "exit"  # it ended by itself, by an exception for one
    SIGNAL = "signal"  # a crash, or a kill from outside
    OOM = "oom"  # the host's memory had run out
    STALL = "stall"  # it made no step, and was ended
    STOPPED = "stopped"  # its process or a worker's was stopped, and it was ended
    NODE = "node"  # its host was lost
