"""What the office and its frontends say to each other.

The office is the main process of a deployment with several frontends: it has the fleet. Messages
of one line stay in order, and none is lost while both ends live.

What the fleet wants of engines goes out as a whole (`FleetWants`), not as changes of it. So a
frontend that has just been started needs no history. The death of an engine alone is told as an
event, since it says what to do with the engine's streams.

A question is a message inside an `Ask`, and has one answer: a value of JSON's kinds.
"""

from dataclasses import dataclass, field
from typing import Any, get_args

from llumnix.core.keys import NamedKey
from llumnix.core.streams.quarantine import Quarantined
from llumnix.core.supervision.frontends import Held
from llumnix.core.types import EngineIndex, InstanceId, RequestId
from llumnix.frontend.office.adapter import Adapter
from llumnix.wire import Codec

# -- office to frontend


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineWanted:
    """One engine, as the fleet wants it known."""

    engine_index: EngineIndex
    instance: InstanceId
    slot: int
    address: str  # where its llumlet listens; empty until that is known
    accepting: bool  # whether new requests may go there
    joined: bool  # whether it is in the state that all engines share
    silent: bool  # whether its process no longer reports


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetWants:
    """All engines. A frontend makes its own list the same, and answers with a `Holding` of this
    version."""

    version: int
    engines: list[EngineWanted]
    slots: int  # how many instances have metrics
    open: bool  # whether frontends let requests in


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnIs:
    """Whether this frontend may have suspects computed again."""

    mine: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSaid:
    """An engine's message to the office that is for a frontend's metrics: vLLM sends statistics of
    a step without outputs to client 0."""

    frames: list[bytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class StopAsked:
    """No new requests; those that run may end within `--shutdown-timeout`. Sent again: at once."""


# -- frontend to office


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """The first message of a frontend's process."""

    client: int
    pid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """It answers requests from now on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Holding:
    """What it has: when that changes, though not too often, and from time to time."""

    held: Held


@dataclass(frozen=True, slots=True, kw_only=True)
class RefusedOne:
    """It has refused a request that is quarantined."""

    name: str  # of the quarantined one


# -- both


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """A question, numbered by its sender."""

    number: int
    question: bytes  # one of `Question`, encoded


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why there is no answer."""

    kind: str  # the error's class
    text: str
    status: int | None = None  # of HTTP, if the error has one


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The answer to an `Ask` of this number."""

    number: int
    value: Any = None
    failure: Failure | None = None


Message = (
    FleetWants
    | TurnIs
    | EngineSaid
    | StopAsked
    | Hello
    | Serving
    | Holding
    | RefusedOne
    | Ask
    | Answer
)


# -- what the office asks a frontend


@dataclass(frozen=True, slots=True, kw_only=True)
class WhoIsAccused:
    """Which of your requests may have killed this engine? Answered by their ids. `among`: one of
    these, if any are known."""

    engine_index: EngineIndex
    among: list[RequestId] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineDied:
    """This engine is gone. Answered by how many streams ended. See `FleetClient.lose`."""

    engine_index: EngineIndex
    blamed: bool
    suspects: list[RequestId] | None  # of all frontends


@dataclass(frozen=True, slots=True, kw_only=True)
class YourRequests:
    """Which are running or waiting? As `Rows.rows`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class YourLook:
    """What is there, and what has happened since? As a `Look`."""

    since: dict[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class YourRequest:
    """This request, with its life so far."""

    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DoYouHave:
    """Which requests does a user mean by this? Answered by their ids, and whether it is an id."""

    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MoveYours:
    """Move this request. Answered by the migration, when it has ended."""

    request_id: str
    destination: str | None
    copy: str


@dataclass(frozen=True, slots=True, kw_only=True)
class YourMigrations:
    """Your last migrations: pairs of when it began, on the monotonic clock, and as JSON. `name`:
    that one alone."""

    name: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class HowManyRun:
    """How many requests would a stop wait for?"""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptersAre:
    """These adapters are loaded, and no others."""

    adapters: list[Adapter]


@dataclass(frozen=True, slots=True, kw_only=True)
class QuarantineIs:
    """These requests are refused, and no others."""

    quarantined: list[Quarantined]


@dataclass(frozen=True, slots=True, kw_only=True)
class KeysAre:
    """The file of --keys has these keys, and no others."""

    keys: list[NamedKey]


# -- what a frontend asks the office


@dataclass(frozen=True, slots=True, kw_only=True)
class Instances:
    """All instances; as a list of `InstanceRow`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HowIsTheFleet:
    """What does a probe's answer follow from? As a `FleetSeen`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AddInstance:
    """Start one more; as an `InstanceStatus`, like the next two."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DrainOne:
    """Empty an instance and stop it; start it again then, if `again` is set."""

    instance: InstanceId
    why: str
    timeout_s: float | None
    force: bool
    again: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class UndrainOne:
    """Let it serve on."""

    instance: InstanceId


@dataclass(frozen=True, slots=True, kw_only=True)
class AllFrontends:
    """All frontends; as a list of `FrontendStatus`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scrape:
    """The metrics of all processes; as text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AllRequests:
    """Those of all frontends; as `Rows`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AllLooks:
    """What is there and has happened, of all frontends and the fleet; as a `Look`."""

    since: dict[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class AnyRequest:
    """A request with its life so far, whichever frontend has it."""

    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MoveAny:
    """Move a request, whichever frontend has it; see `MoveYours`."""

    request_id: str
    destination: str | None
    copy: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AllMigrations:
    """Those of all frontends; as `Rows`. `name`: that one alone."""

    name: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Reload:
    """Read the file of --keys again, and tell all. Answered by what that changes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AllQuarantined:
    """All quarantined requests, as users see them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """Refuse this one no longer, or none of them. Answered by how many that were."""

    name: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Condemned:
    """Instances died of this request. Answered once every frontend refuses its like."""

    quarantined: Quarantined


@dataclass(frozen=True, slots=True, kw_only=True)
class CallAll:
    """Call all engines, which changes what they share. Answered by pairs of engine and answer."""

    method: str
    args: list[Any] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadAdapter:
    """Load it on all engines, and tell all frontends. Answered by its number."""

    adapter: Adapter


@dataclass(frozen=True, slots=True, kw_only=True)
class UnloadAdapter:
    """No frontend is to know it any more."""

    name: str


Question = (
    WhoIsAccused
    | EngineDied
    | YourRequests
    | YourLook
    | YourRequest
    | DoYouHave
    | MoveYours
    | YourMigrations
    | HowManyRun
    | AdaptersAre
    | QuarantineIs
    | KeysAre
    | Instances
    | HowIsTheFleet
    | AddInstance
    | DrainOne
    | UndrainOne
    | AllFrontends
    | Scrape
    | AllRequests
    | AllLooks
    | AnyRequest
    | MoveAny
    | AllMigrations
    | Reload
    | AllQuarantined
    | Release
    | Condemned
    | CallAll
    | LoadAdapter
    | UnloadAdapter
)

messages: Codec[Message] = Codec(get_args(Message))
questions: Codec[Question] = Codec(get_args(Question))
