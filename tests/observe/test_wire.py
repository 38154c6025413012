"""Messages between processes."""

import pickle

import pytest

from llumnix.core.events import Dispatch, InstanceLost, LoadReported, NoInstance, RequestArrived
from llumnix.core.load import LoadReport
from llumnix.core.types import EngineIndex, InstanceId, RequestId
from llumnix.errors import ProtocolError
from llumnix.observe.wire import Loads, LoadsAsked, Message, Ping, Pong, decode, encode

REPORT = LoadReport(
    instance=InstanceId("i0"),
    engine_index=EngineIndex(65535),
    sequence=7,
    kv_tokens_used=32,
    kv_tokens_total=4096,
    running=2,
    waiting=1,
    admitted=(RequestId("a"), RequestId("ü")),
    accepting=False,
)


@pytest.mark.parametrize(
    "message",
    [
        RequestArrived(request=RequestId("r"), prompt_tokens=5, priority=-3),
        LoadReported(report=REPORT),
        InstanceLost(instance=InstanceId("i0"), engine_index=EngineIndex(1)),
        Dispatch(
            request=RequestId("r"),
            instance=InstanceId("i0"),
            engine_index=EngineIndex(0),
            why="because",
        ),
        NoInstance(request=RequestId("r"), why="none"),
        Ping(number=1),
        Pong(number=1),
        LoadsAsked(number=2),
        Loads(number=2, reports=[REPORT]),
    ],
    ids=lambda m: type(m).__name__,
)
def test_what_is_sent_arrives(message: Message) -> None:
    assert decode(encode(message)) == message


@pytest.mark.parametrize(
    "payload",
    [b"", b"\x00", b"hello", encode(Ping(number=1))[:-1], b"\x92\xa4Evil\x80", pickle.dumps([1])],
)
def test_anything_else_is_refused_and_never_unpickled(payload: bytes) -> None:
    with pytest.raises(ProtocolError, match="not a message of ours"):
        decode(payload)


def test_wrong_types_are_refused() -> None:
    bad = encode(Ping(number=1)).replace(b"\x01", b"\xc0")
    with pytest.raises(ProtocolError):
        decode(bad)
