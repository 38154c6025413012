"""What the frontend knows of a stream, and how users find one."""

import pytest

from llumnix.core.types import EngineIndex, InstanceId, RequestId
from llumnix.errors import ConflictError, UnknownRequestError
from llumnix.frontend.streams.info import FleetStreams, StreamInfo, find, shown


def info(client_id: str) -> StreamInfo:
    return StreamInfo(client_id=client_id, prompt_tokens=3, priority=-1, started_s=7.5)


def streams(**client_ids: str) -> FleetStreams:
    """Each of these requests runs."""
    found = FleetStreams()
    for request, client_id in client_ids.items():
        found.placed(found.open(RequestId(request), info(client_id)), EngineIndex(0))
    return found


def test_a_user_finds_a_stream_by_its_own_id_or_by_vllms() -> None:
    found = streams(a="mine", b="yours", mine="odd")
    assert find(found, "b").request == "b"
    assert find(found, "yours").request == "b"
    assert find(found, "mine").request == "mine"


def test_an_id_of_several_sequences_is_refused_with_their_names() -> None:
    with pytest.raises(ConflictError, match="2 sequences have the id mine: name one of a, b"):
        find(streams(a="mine", b="mine"), "mine")


def test_a_request_that_no_engine_has_is_not_there() -> None:
    found = streams(a="mine")
    found.open(RequestId("b"), info("placing"))
    for name in ("b", "placing", "nothing"):
        with pytest.raises(UnknownRequestError, match=f"no request {name} is running or waiting"):
            find(found, name)


def test_the_event_log_keeps_how_it_ended() -> None:
    stream = find(streams(a="mine"), "a")
    stream.tokens += range(9)
    assert shown(stream, InstanceId("i4"), "stop", 0.25) == {
        "request": "a", "client_id": "mine", "instance": "i4", "started": 7.5, "priority": -1,
        "prompt_tokens": 3, "output_tokens": 9, "finish_reason": "stop",
        "first_token_s": 0.25,
    }  # fmt: skip
