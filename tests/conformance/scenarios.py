"""What a migration must stand, and a request outlive: one list, for every kind of engine.

A fault strikes ahead of the first delivery of one kind of message, so that together they strike in
every state of both machines. Engines are killed after so many tokens.
"""

from collections.abc import Callable
from typing import Any

from llumnix.core.messages import OFFICE, Handover, Reserve, Reserved, Stage, Staged, Verdict
from support.duo import Duo

OTHER = 3
"""Client index of another frontend, which the neighbour belongs to."""
MOMENTS = (Reserve, Reserved, Stage, Staged, Handover, Verdict)


def hang_up(duo: Duo, request: Any) -> None:
    duo.hang_up(request)


def finish_there(duo: Duo, request: Any) -> None:
    """The source runs on to the request's end before anything else happens."""
    source = duo.streams.get(request).owner
    while duo.state[request] == "open" and duo.engines[source].runs(request):
        duo.step(source)


def preempt(duo: Duo, request: Any) -> None:
    for engine in duo.engines.values():
        if engine.runs(request):
            engine.preempt_somebody()


def destination_dies(duo: Duo, request: Any) -> None:
    grant = duo.streams.get(request).grant
    duo.kill(grant.destination if grant else duo.streams.get(request).owner)


def source_dies(duo: Duo, request: Any) -> None:
    duo.kill(0)


def frontend_dies_source_first(duo: Duo, request: Any) -> None:
    duo.lose_frontend(first=0)


def frontend_dies_destination_first(duo: Duo, request: Any) -> None:
    duo.lose_frontend(first=1)


def copies_fail(duo: Duo, request: Any) -> None:
    duo.fail_pulls = True


def silence(duo: Duo, request: Any) -> None:
    duo.now += 100


def lose(duo: Duo, request: Any) -> bool:
    return False


def double(duo: Duo, request: Any) -> None:
    # The message under way is put on the wire once more, behind all others.
    duo.wire.append(duo.doubling)  # type: ignore[attr-defined]


FAULTS: dict[str, Callable[[Duo, Any], Any]] = {
    "the client hangs up": hang_up,
    "the request finishes": finish_there,
    "the request is preempted": preempt,
    "the destination dies": destination_dies,
    "the source dies": source_dies,
    "the frontend dies, which the source hears first": frontend_dies_source_first,
    "the frontend dies, which the destination hears first": frontend_dies_destination_first,
    "copies fail": copies_fail,
    "the other side is silent": silence,
    "the message is lost": lose,
    "the message comes twice": double,
}


def strike(kind: Any, fault: str, moment: type) -> None:
    """Runs one scenario, and checks what must hold after it."""
    prompt = [7 * i % 200 + 3 for i in range(kind.long_prompt)]
    expected = kind.expected(prompt, kind.tokens)
    duo = kind.duo()
    request = duo.add("struck", prompt, kind.options(kind.tokens))
    neighbour = duo.add("neighbour", prompt[:20], kind.options(kind.tokens), on=1, client=OTHER)
    duo.turn_until(lambda: len(duo.got[request]) >= 2, "the first tokens")
    struck = []

    def before(message: Any) -> Any:
        if isinstance(message, moment) and not struck:
            struck.append(message)
            to = 1 if isinstance(message, Reserve | Stage | Handover) else 0
            duo.doubling = (to, message)  # type: ignore[attr-defined]
            return FAULTS[fault](duo, request)
        return None

    duo.before = before
    duo.migrate(request, 1)
    duo.finish()
    assert struck, f"no {moment.__name__} was ever sent"
    duo.check_nothing_left()
    _check(duo, request, expected, fault, moment, kind)
    if duo.state[neighbour] == "finished":
        assert duo.got[neighbour] == kind.expected(prompt[:20], kind.tokens)


def _check(
    duo: Duo, request: Any, expected: list[int], fault: str, moment: type, kind: Any
) -> None:
    got, state = duo.got[request], duo.state[request]
    assert got == expected[: len(got)], "a token is wrong, lost or repeated"
    if state == "finished":
        assert got == expected
    if fault == "the client hangs up":
        assert state == "hung up"
    elif fault.startswith("the frontend dies"):
        assert state == "died with its frontend"
        assert duo.state["neighbour"] == "finished"  # type: ignore[index]
    elif fault == "the source dies":
        # Before the handover its KV dies with it; after the verdict it has none any more. In
        # between it depends on whether the last blocks can still be read.
        saved = moment is Verdict or (moment is Handover and kind.dead_can_be_read)
        assert state == ("finished" if saved else "lost")
    elif fault == "the destination dies":
        assert state == ("lost" if moment is Verdict else "finished")
    else:
        assert state == "finished"


KILLED_AFTER = {
    "never scheduled": (0,),
    "no token": (0,),
    "one token": (1,),
    "some tokens": (12,),
    "again and again": (0, 1, 5, 6, 20),
}
"""How many tokens the client has when the engine that runs the request is killed."""


def owner_of(duo: Duo, request: Any, tokens: int) -> Any:
    """The engine that has it once its client has so many tokens."""
    duo.turn_until(
        lambda: len(duo.got[request]) >= tokens and duo.streams.get(request).owner is not None
    )
    return duo.streams.get(request).owner


def outlive(kind: Any, name: str, *, unheard: int = 0) -> None:
    """Runs one scenario, in which a request outlives its engines. `unheard`: steps of an engine
    before its death that nobody hears of."""
    prompt = [7 * i % 200 + 3 for i in range(kind.long_prompt)]
    expected = kind.expected(prompt, kind.tokens)
    neighbours = kind.expected(prompt[:20], kind.tokens)
    duo = kind.duo()
    duo.survival = True
    request = duo.add("killed", prompt, kind.options(kind.tokens))
    neighbour = duo.add("neighbour", prompt[:20], kind.options(kind.tokens), on=1)
    for tokens in KILLED_AFTER[name]:
        if name != "never scheduled":
            duo.turn()
        owner = owner_of(duo, request, tokens)
        for _ in range(unheard):
            duo.engines[owner].step()
        duo.kill(owner)
    duo.finish()
    assert duo.got[request] == expected
    assert duo.got[neighbour] == neighbours
    assert duo.revived >= len(KILLED_AFTER[name])
    duo.check_nothing_left()


def frontend_dies(kind: Any) -> None:
    """Of two frontends, one dies, whose requests run, wait and are half way to the other engine."""
    prompt = [7 * i % 200 + 3 for i in range(kind.long_prompt)]
    expected = kind.expected(prompt[:20], kind.tokens)
    duo = kind.duo()
    mine = [duo.add(f"mine {n}", prompt, kind.options(kind.tokens)) for n in range(12)]
    others = [
        duo.add(f"other {n}", prompt[:20], kind.options(kind.tokens), on=n % 2, client=OTHER)
        for n in range(4)
    ]
    duo.turn_until(lambda: len(duo.got[mine[0]]) >= 2, "the first tokens")
    duo.hold_pulls = True
    for request in mine[:3]:
        duo.migrate(request)
    for _ in range(3):
        duo.turn()
    duo.hold_pulls = False
    duo.lose_frontend(first=0)
    source, destination = (duo.engines[e] for e in list(duo.engines))
    assert not source.requests_of(OFFICE), "they are gone at once"
    duo.turn()
    assert not destination.requests_of(OFFICE)
    duo.finish()
    duo.check_nothing_left()
    assert [duo.got[request] for request in others] == [expected] * 4
