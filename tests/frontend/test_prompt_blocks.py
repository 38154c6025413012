"""A prompt is hashed once, however many sequences are asked of it."""

import copy

import pytest

from llumnix.frontend import prompt_blocks
from support.frontend import request

PROMPT = list(range(200))


def test_the_sequences_of_a_request_share_one_hashing(monkeypatch: pytest.MonkeyPatch) -> None:
    hashed = []
    chain = prompt_blocks.chain

    def counting(start: int, tokens: list[int]) -> tuple[int, ...]:
        hashed.append(len(tokens))
        return chain(start, tokens)

    monkeypatch.setattr(prompt_blocks, "chain", counting)
    one = request("a", prompt_token_ids=PROMPT)
    with prompt_blocks.one_request():
        found = {prompt_blocks.prompt_blocks(copy.copy(one)) for _ in range(1000)}
        other = prompt_blocks.prompt_blocks(request("b", prompt_token_ids=PROMPT[:100]))
    assert hashed == [200, 100]
    (blocks,) = found
    assert blocks[: len(other)] == other
    assert len(blocks) > len(other) > 0
    prompt_blocks.prompt_blocks(one)
    assert len(hashed) == 3, "another request, though of the same prompt, may have another salt"


def test_a_request_that_looks_for_no_blocks_has_none() -> None:
    one = request("a", prompt_token_ids=PROMPT)
    one.sampling_params.skip_reading_prefix_cache = True
    assert prompt_blocks.prompt_blocks(one) == ()
    assert prompt_blocks.prompt_blocks(request("b", prompt_token_ids=None)) == ()
