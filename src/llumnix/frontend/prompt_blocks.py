"""The names of a prompt's blocks in prefix caches, hashed once for all `n` sequences of a request.

vLLM internals relied on here (tests/house/test_vllm_contract.py fails when one changes):
- `prompt_token_ids`, `lora_request.lora_name` and `cache_salt` of an `EngineCoreRequest` identify
  its blocks in the prefix cache, unless it has `mm_features` or `prompt_embeds`. With
  `params.skip_reading_prefix_cache` it uses no cached block.
- `AsyncLLM.add_request` makes the `n` sequences shallow copies of one request.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass

from vllm.v1.engine import EngineCoreRequest

from llumnix.core.prefixes import chain, root


@dataclass(slots=True, kw_only=True)
class _Prompt:
    """The prompt that was hashed last."""

    tokens: list[int] | None = None  # the list object that all sequences of a request share
    blocks: tuple[int, ...] = ()


_prompt: ContextVar[_Prompt | None] = ContextVar("llumnix_prompt", default=None)


@contextlib.contextmanager
def one_request() -> Iterator[None]:
    """In this context `prompt_blocks` is called for the sequences of one request alone."""
    token = _prompt.set(_Prompt())
    try:
        yield
    finally:
        _prompt.reset(token)


def prompt_blocks(request: EngineCoreRequest) -> tuple[int, ...]:
    """The prompt's blocks, under the names that engine/reporting/prefix_reader.py gives them. Empty
    if the request would use no cached block."""
    tokens, lora = request.prompt_token_ids, request.lora_request
    embedded = request.mm_features or request.prompt_embeds is not None
    if not tokens or embedded or request.params.skip_reading_prefix_cache:
        return ()
    known = _prompt.get()
    if known is not None and known.tokens is tokens:
        return known.blocks
    blocks = chain(root(lora.lora_name if lora else None, request.cache_salt), tokens)
    if known is not None:
        known.tokens, known.blocks = tokens, blocks
    return blocks
