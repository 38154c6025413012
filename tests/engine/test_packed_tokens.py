"""Tokens of a request that moved in, on their way to worker processes."""

import pickle

import msgspec
import numpy as np
import pytest

from llumnix.engine.migration import packed_tokens
from llumnix.engine.migration.packed_tokens import Gathered, Packed, Prompt

IDS = [3, 1, 4, 1, 5, 99_999, 2**31 - 1]


def packed(ids: list[int]) -> bytes:
    return np.array(ids, dtype=np.int32).tobytes()


def sent(thing: object) -> object:
    return pickle.loads(pickle.dumps(thing, protocol=pickle.HIGHEST_PROTOCOL))  # noqa: S301


def test_a_prompt_and_what_grew_from_it_arrive_packed_too() -> None:
    prompt = Prompt(IDS)
    grown = prompt.copy()
    grown.append(7)
    grown.extend([8, 9])
    arrived = sent((prompt, grown))
    assert arrived == (IDS, [*IDS, 7, 8, 9])
    assert [ids.packed for ids in arrived] == [packed(IDS), packed([*IDS, 7, 8, 9])]  # type: ignore[attr-defined]
    assert prompt == IDS
    assert sent(Prompt([]).copy()) == []


@pytest.fixture
def stay_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process is a worker whose runner takes packed tokens."""
    monkeypatch.setattr(packed_tokens, "_stay_packed", True)


def grown_by(*more: int) -> list[int]:
    grown = Prompt(IDS).copy()
    grown.extend(more)
    return grown


@pytest.mark.usefixtures("stay_packed")
def test_where_the_runner_takes_packed_tokens_no_list_is_made_of_them() -> None:
    prompt, grown = sent((Prompt(IDS), grown_by(7, 8)))  # type: ignore[misc]
    assert type(prompt) is type(grown) is Packed
    assert [ids.packed for ids in (prompt, grown)] == [packed(IDS), packed([*IDS, 7, 8])]
    assert (len(prompt), len(grown)) == (len(IDS), len(IDS) + 2)
    assert sent(Prompt([])) == []
    assert not sent(Prompt([]).copy())


@pytest.mark.usefixtures("stay_packed")
def test_packed_tokens_can_be_read_like_a_list() -> None:
    grown = sent(grown_by(7))
    assert isinstance(grown, Packed)
    whole = [*IDS, 7]
    assert list(grown) == grown == whole
    assert grown != IDS
    assert grown != [0, *whole[1:]]
    assert grown != packed(whole)
    assert (grown[0], grown[-1], grown[2:5], grown[5:]) == (3, 7, whole[2:5], whole[5:])
    assert [type(n) for n in (grown[0], *grown[:2], next(iter(grown)))] == [int] * 4
    assert np.array(grown).tolist() == whole
    there = np.zeros(len(whole), dtype=np.int64)
    there[:] = grown
    assert there.tolist() == whole
    with pytest.raises(IndexError):
        grown[len(whole)]


@pytest.mark.usefixtures("stay_packed")
def test_packed_tokens_are_gathered_without_a_number_made(monkeypatch: pytest.MonkeyPatch) -> None:
    arrived = sent(grown_by(7))
    for name in ("__iter__", "__getitem__", "__array__"):
        monkeypatch.setattr(Packed, name, None)
    gathered = Gathered()
    gathered.extend(arrived)  # type: ignore[arg-type]
    assert gathered.tobytes() == packed([*IDS, 7])


def test_a_copy_grows_by_itself() -> None:
    grown = Prompt(IDS).copy()
    grown.append(7)
    other = grown.copy()
    other.append(8)
    assert sent(grown) == [*IDS, 7]
    assert sent(other) == [*IDS, 7, 8]


def test_the_prompt_crosses_once_and_packed() -> None:
    prompt = Prompt(range(100_000, 132_000))
    both = pickle.dumps((prompt, prompt.copy()), protocol=pickle.HIGHEST_PROTOCOL)
    assert len(both) < 4 * len(prompt) + 500


def test_a_message_may_hold_it() -> None:
    """It may move on again."""
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(Prompt(IDS))) == IDS


def test_gathered_tokens_are_those_that_a_list_would_have() -> None:
    """As vLLM's runner fills, reads and empties it."""
    grown = Prompt(IDS).copy()
    grown.append(7)
    gathered = Gathered()
    for _ in range(2):
        for ids in (grown, [5, 6], Prompt(IDS), range(3), Packed(packed([8]))):
            gathered.extend(ids)
        gathered.append(9)
        there = np.zeros(100, dtype=np.int32)
        there[: len(gathered)] = gathered
        assert there[: len(gathered)].tolist() == [*IDS, 7, 5, 6, *IDS, 0, 1, 2, 8, 9]
        gathered.clear()
        assert not gathered
