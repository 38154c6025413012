"""vLLM's events of its prefix cache, made by hand, as the blocks of ours that they mean."""

from typing import Any

import pytest

vllm = pytest.importorskip("vllm")

from vllm.distributed.kv_events import (  # noqa: E402
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
)

from llumnix.core.prefixes import chain, root  # noqa: E402
from llumnix.engine import prefix_events  # noqa: E402
from llumnix.engine.prefix_events import PrefixBlocks  # noqa: E402

TOKENS = list(range(1000, 1384))


def stored(
    names: list[int], first: int = 0, parent: int | None = None, size: int = 64, **fields: Any
) -> BlockStored:
    """Of `TOKENS`, from block `first` on."""
    return BlockStored(
        block_hashes=names,
        parent_block_hash=parent,
        token_ids=TOKENS[first * size : (first + len(names)) * size],
        block_size=size,
        lora_id=None,
        medium="GPU",
        lora_name=fields.pop("lora_name", None),
        group_idx=0,
        **fields,
    )


def gone(*names: int) -> BlockRemoved:
    return BlockRemoved(block_hashes=list(names), medium="GPU", group_idx=0)


def changes(blocks: PrefixBlocks, *events: Any) -> tuple[list[int], list[int], bool]:
    """Which of our blocks of `TOKENS`, by number, were stored and removed; whether all went."""
    for event in events:
        blocks.take(event)
    ours = chain(root(None, None), TOKENS)
    new, old, cleared = blocks.changes() or ((), (), False)
    return [ours.index(h) for h in new], [ours.index(h) for h in old], cleared


def fresh(size: int) -> PrefixBlocks:
    blocks = PrefixBlocks(size)
    assert blocks.changes() == ((), (), True)
    assert blocks.changes() is None
    return blocks


def test_four_blocks_of_16_make_one_of_ours() -> None:
    blocks = fresh(16)
    assert changes(blocks, stored([1, 2, 3], size=16)) == ([], [], False)
    assert changes(blocks, stored([4, 5], 3, parent=3, size=16)) == ([0], [], False)
    assert changes(blocks, stored([6, 7, 8], 5, parent=5, size=16)) == ([1], [], False)
    assert changes(blocks, gone(8)) == ([], [1], False)
    assert changes(blocks, gone(2)) == ([], [0], False)
    assert changes(blocks, stored([8], 7, parent=7, size=16)) == ([1], [], False)
    # One that was missing is back: a request that needed no more of it stored it.
    assert changes(blocks, stored([2], 1, parent=1, size=16)) == ([0], [], False)
    assert changes(blocks, gone(2), stored([2], 1, parent=1, size=16)) == ([], [], False)
    assert changes(blocks, gone(4, 3, 1, 2, 8, 7, 6, 5)) == ([], [0, 1], False)
    assert (len(blocks), blocks.kept, blocks._completers) == (0, {}, {})


def test_branches_within_a_block_of_ours_share_its_parts() -> None:
    blocks = fresh(16)
    branch = stored([9], 3, parent=3, size=16)
    branch.token_ids = [7] * 16
    ours = [chain(root(None, None), [*TOKENS[:48], *end])[0] for end in (TOKENS[48:64], [7] * 16)]
    blocks.take(stored([1, 2, 3, 4], size=16))
    blocks.take(branch)
    assert blocks.changes() == (tuple(ours), (), False)
    blocks.take(gone(4))
    assert blocks.changes() == ((), (ours[0],), False)
    blocks.take(gone(1))
    assert blocks.changes() == ((), (ours[1],), False)
    blocks.take(stored([1], size=16))
    assert blocks.changes() == ((ours[1],), (), False)


def test_a_block_of_64_is_one_of_ours() -> None:
    blocks = fresh(64)
    assert changes(blocks, stored([1, 2])) == ([0, 1], [], False)
    assert changes(blocks, stored([3], 2, parent=2), gone(1)) == ([2], [0], False)


def test_a_block_of_128_is_two_of_ours() -> None:
    blocks = fresh(128)
    assert changes(blocks, stored([1, 2], size=128)) == ([0, 1, 2, 3], [], False)
    assert changes(blocks, stored([3], 2, parent=2, size=128)) == ([4, 5], [], False)
    assert changes(blocks, gone(2)) == ([], [2, 3], False)


def test_a_block_that_is_kept_twice_is_gone_when_both_are() -> None:
    blocks = fresh(64)
    assert changes(blocks, stored([1]), stored([1])) == ([0], [], False)
    assert changes(blocks, gone(1)) == ([], [], False)
    assert changes(blocks, gone(1)) == ([], [0], False)
    assert changes(blocks, gone(1)) == ([], [], False)


def test_an_adapter_that_was_loaded_anew_under_its_name_keeps_the_block_alive() -> None:
    """vLLM's hashes differ then, ours do not."""
    blocks = fresh(64)
    assert changes(blocks, stored([1]), stored([2]), gone(1)) == ([0], [], False)
    assert changes(blocks, gone(2)) == ([], [0], False)


def test_after_a_clear_only_what_came_later_is_kept() -> None:
    blocks = fresh(64)
    changes(blocks, stored([1, 2]))
    assert changes(blocks, AllBlocksCleared(), stored([1])) == ([0], [], True)
    assert changes(blocks, gone(1), AllBlocksCleared()) == ([], [], True)
    assert changes(blocks, AllBlocksCleared()) == ([], [], False)


def test_names_follow_from_the_adapter_and_the_salt() -> None:
    blocks = fresh(64)
    lora, both = [("adapter",)] * 2, [("adapter", "salt"), ("adapter",)]
    blocks.take(stored([1, 2], lora_name="adapter", extra_keys=lora))
    blocks.take(stored([3, 4], lora_name="adapter", extra_keys=both))
    blocks.take(stored([5, 6], extra_keys=[("salt",), None]))
    new, _, _ = blocks.changes() or ((), (), False)
    roots = [root("adapter", None), root("adapter", "salt"), root(None, "salt")]
    assert new == tuple(h for r in roots for h in chain(r, TOKENS[:128]))


def test_what_cannot_be_followed_is_left_out() -> None:
    blocks = fresh(64)
    gaps = stored([1, 2, 3])
    gaps.block_hashes = [1, 3]  # As groups with sliding windows report.
    assert changes(blocks, gaps) == ([], [], False)
    assert changes(blocks, stored([4], 3, parent=99)) == ([], [], False)
    assert changes(blocks, stored([5, 6], size=32)) == ([], [], False)
    assert changes(blocks, gone(1, 2, 3, 4, 5)) == ([], [], False)
    assert len(blocks) == 0


def test_much_is_told_in_parts_from_the_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_events, "HASHES_MAX", 2)
    blocks = fresh(64)
    assert changes(blocks, stored([1, 2, 3, 4, 5])) == ([0, 1], [], False)
    assert changes(blocks, gone(5), gone(2)) == ([2, 3], [1], False)
    assert changes(blocks) == ([], [], False)
    blocks.start_anew()
    assert changes(blocks) == ([0, 2], [], True)
    assert changes(blocks, gone(1)) == ([3], [0], False)
    assert blocks.changes() is None


def test_images_and_embeddings_and_what_follows_them_are_left_out() -> None:
    image = ("image", 3)
    for second in ((image,), (b"digest",), (image, b"digest")):
        blocks = PrefixBlocks(64)
        blocks.take(stored([1, 2, 3], extra_keys=[None, second, None]))
        assert list(blocks.kept) == list(chain(root(None, None), TOKENS[:64]))
    blocks = PrefixBlocks(64)
    blocks.take(stored([1, 2, 3], extra_keys=[("salt", image), None, None]))
    assert blocks.kept == {}
