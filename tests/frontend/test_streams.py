"""The table of open streams."""

from llumnix.core.streams.table import Ledger
from llumnix.core.types import EngineIndex, InstanceId, RequestId
from llumnix.frontend.streams import Stream, Streams


def stream(name: str, engine: int) -> Stream:
    return Stream(
        request=RequestId(name),
        client_id=name,
        instance=InstanceId(f"i{engine}"),
        engine_index=EngineIndex(engine),
        prompt_tokens=1,
        priority=0,
        started_s=0.0,
        ledger=Ledger(owner=EngineIndex(engine)),
    )


def test_streams_are_found_by_request_and_counted_by_engine() -> None:
    streams = Streams()
    for name, engine in (("a", 0), ("b", 1), ("c", 1)):
        streams.open(stream(name, engine))
    assert len(streams) == 3
    assert streams.count(EngineIndex(1)) == 2
    assert [s.request for s in streams.on(EngineIndex(1))] == ["b", "c"]
    closed = streams.close("b")
    assert closed is not None
    assert closed.request == "b"
    assert streams.close("b") is None
    assert streams.count(EngineIndex(1)) == 1
    streams.close("c")
    assert streams.count(EngineIndex(1)) == 0
    assert streams.get("a") is not None
    assert streams.get("c") is None


def test_a_stream_that_moves_is_counted_where_it_is() -> None:
    streams = Streams()
    streams.instances = {EngineIndex(0): InstanceId("i0"), EngineIndex(1): InstanceId("i1")}
    streams.open(stream("a", 0))
    streams.move("a", EngineIndex(1))
    assert (streams.count(EngineIndex(0)), streams.count(EngineIndex(1))) == (0, 1)
    assert streams.owner("a") == 1
    moved = streams.get("a")
    assert moved is not None
    assert moved.instance == "i1"
