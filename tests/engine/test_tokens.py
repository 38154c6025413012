"""Tokens of a request that moved in, on their way to worker processes."""

import pickle

import msgspec

from llumnix.engine.tokens import Prompt

IDS = [3, 1, 4, 1, 5, 99_999, 2**31 - 1]


def sent(thing: object) -> object:
    return pickle.loads(pickle.dumps(thing, protocol=pickle.HIGHEST_PROTOCOL))  # noqa: S301


def test_a_prompt_and_what_grew_from_it_arrive_as_plain_lists() -> None:
    prompt = Prompt(IDS)
    grown = prompt.copy()
    grown.append(7)
    grown.extend([8, 9])
    arrived = sent((prompt, grown))
    assert arrived == (IDS, [*IDS, 7, 8, 9])
    assert [type(ids) for ids in arrived] == [list, list]  # type: ignore[attr-defined]
    assert prompt == IDS
    assert sent(Prompt([]).copy()) == []


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
