"""Reads which prefixes an engine's cache keeps, on the engine's own thread, between two steps.

vLLM's block pool notes what it stores and removes. Its hashes mean nothing to another process, so
every block is followed from the start of its prompt and named by our chain (core/prefixes.py).

Rules
- A block of ours is kept while all of vLLM's that make it up are. Of a larger block of vLLM's all
  of ours are, though a prompt that shares only the first of them will not find them.
- vLLM may keep a block several times; it is gone when the last of them is.
- What covers more than tokens (images, embeddings) is left out, and so is all that follows it.
- The first fact, and one every `SNAPSHOT_EVERY_S`, says everything anew (`cleared`): a controller
  that Ray has just started learns it, and what was lost on the way is made good. An engine that
  stands still is woken for it.
- A fact names `HASHES_MAX` hashes at the most, and a step sends one; the rest follow. Before an
  engine stands still all is sent.
- Of a model with several groups of layers the first whose layers look at the whole prompt counts.

vLLM 0.32 internals relied on here (tests/house/test_vllm_contract.py fails when one changes):
- `BlockPool`: `enable_kv_cache_events` is read whenever something happens, so it may be set after
  the constructor; `kv_event_queue` holds what happened, in order. The scheduler takes that through
  `BlockPool.take_events` after each step, for a publisher that does nothing here.
- `BlockStored`: once for each time that a full block enters the cache; `block_hashes`,
  `parent_block_hash`, `token_ids`, `block_size`, `lora_name`, `group_idx`; `extra_keys` of each
  block: the LoRA adapter's name, a tuple for an image, the cache salt (first block only), bytes for
  embeddings. `BlockRemoved`: once for each time that one leaves it. `AllBlocksCleared`.
- `KVCacheManager.enable_kv_cache_events`, which stays false: requests could ask it for events of
  blocks that are in the cache already (`kv_cache_report_mode`).
- `kv_cache_manager.kv_cache_event_metadata` names each group's kind of layers,
  `coordinator.single_type_managers` has each group's pool and `block_size`, in tokens.
"""

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from vllm.distributed.kv_events import AllBlocksCleared, BlockRemoved, BlockStored

from llumnix.core.events import PrefixesChanged
from llumnix.core.policies.presets import POLICIES
from llumnix.core.prefixes import BLOCK_TOKENS, chain, root
from llumnix.core.settings import SchedulerSettings
from llumnix.core.types import EngineIndex, InstanceId

logger = logging.getLogger("llumnix.engine")

SNAPSHOT_EVERY_S = 60.0
HASHES_MAX = 8192
CLOSE_TIMEOUT_S = 2.0
_WHOLE_PROMPT = ("full_attention", "mla_attention", "sink_full_attention")

TheirHash = int | bytes
"""vLLM's hash of a block, as its events have it."""


@dataclass(slots=True, eq=False)
class _Block:
    """A block of vLLM's. `after`: our hash of all that is before `rest`, the last tokens up to its
    end, which fill no block of ours yet; `parts`: the blocks that they are in. `ends`: the blocks
    of ours that it completes, and `needs` those of vLLM's that make them up; `whole`: all are here.
    `copies`: how often vLLM keeps it."""

    after: int
    rest: list[int] = field(default_factory=list)
    parts: tuple[TheirHash, ...] = ()
    ends: tuple[int, ...] = ()
    needs: tuple[TheirHash, ...] = ()
    whole: bool = False
    copies: int = 1


class PrefixBlocks:
    """What one group of layers keeps: vLLM's blocks of `size` tokens, and ours that they make."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._blocks: dict[TheirHash, _Block] = {}
        # Of a part of a block of ours: the blocks of vLLM's that complete one with it.
        self._completers: dict[TheirHash, set[TheirHash]] = {}
        # How many of vLLM's blocks complete each of ours: two if an adapter was loaded anew.
        self.kept: dict[int, int] = {}
        # Not yet told. In order, so that of a long prompt the beginning is told first.
        self._stored: dict[int, None] = {}
        self._removed: dict[int, None] = {}
        self._cleared = True

    def __len__(self) -> int:
        return len(self._blocks)

    def take(self, event: Any) -> None:
        """What vLLM says has happened."""
        if isinstance(event, BlockStored):
            self._store(event)
        elif isinstance(event, BlockRemoved):
            for name in event.block_hashes:
                self._remove(name)
        elif isinstance(event, AllBlocksCleared):
            self._cleared |= bool(self.kept or self._removed)
            for known in (self._blocks, self._completers, self.kept, self._stored, self._removed):
                known.clear()

    def start_anew(self) -> None:
        """Everything is to be told once more."""
        self._cleared = True
        self._stored = dict.fromkeys(self.kept)
        self._removed.clear()

    def changes(self) -> tuple[tuple[int, ...], tuple[int, ...], bool] | None:
        """What was stored, what was removed and whether all before is void, since the last call; of
        much, the first part. None if nothing changed."""
        if not (self._stored or self._removed or self._cleared):
            return None
        stored = tuple(islice(self._stored, HASHES_MAX))
        removed = tuple(islice(self._removed, HASHES_MAX))
        for h in stored:
            del self._stored[h]
        for h in removed:
            del self._removed[h]
        cleared, self._cleared = self._cleared, False
        return stored, removed, cleared

    def _store(self, event: BlockStored) -> None:
        size, names, tokens = self._size, event.block_hashes, event.token_ids
        if event.block_size != size or len(tokens) != len(names) * size:
            return  # A part of a block, or with gaps.
        keys = event.extra_keys
        others = _others(event) if keys and any(keys) else None
        if event.parent_block_hash is not None:
            parent = self._blocks.get(event.parent_block_hash)
        else:
            salted = others and others[0] and isinstance(others[0][0], str)
            salt = others[0].pop(0) if others and salted else None
            parent = _Block(root(event.lora_name, salt))
        blocks = self._blocks
        for n, name in enumerate(names):
            known = blocks.get(name)
            if known is not None:
                known.copies += 1
            elif parent is not None and not (others and others[n]):
                known = self._add(name, parent, tokens[n * size : (n + 1) * size])
            parent = known

    def _add(self, name: TheirHash, parent: _Block, tokens: list[int]) -> _Block:
        rest, parts = parent.rest + tokens, (*parent.parts, name)
        if len(rest) < BLOCK_TOKENS:
            block = _Block(parent.after, rest, parts)
        else:
            ends = chain(parent.after, rest)
            block = _Block(ends[-1], [], (), ends, parts)
            for part in parts[:-1]:
                self._completers.setdefault(part, set()).add(name)
        self._blocks[name] = block
        if block.ends:
            self._look(block)
        # If it is back, others may have been waiting for it.
        for completer in self._completers.get(name, ()):
            self._look(self._blocks[completer])
        return block

    def _remove(self, name: TheirHash) -> None:
        block = self._blocks.get(name)
        if block is None:
            return
        block.copies -= 1
        if block.copies:
            return
        del self._blocks[name]
        for completer in self._completers.get(name, ()):
            self._look(self._blocks[completer])
        self._look(block, here=False)
        for part in block.needs[:-1]:
            completers = self._completers[part]
            completers.discard(name)
            if not completers:
                del self._completers[part]

    def _look(self, block: _Block, *, here: bool = True) -> None:
        """Counts the blocks of ours that this one completes, or ceases to."""
        whole = here and bool(block.ends) and all(n in self._blocks for n in block.needs)
        if whole == block.whole:
            return
        block.whole = whole
        for h in block.ends:
            before = self.kept.get(h, 0)
            after = before + (1 if whole else -1)
            if after:
                self.kept[h] = after
            else:
                del self.kept[h]
            if bool(before) != bool(after):
                undone, done = self._removed, self._stored
                if before:
                    undone, done = done, undone
                if h in undone:
                    del undone[h]
                else:
                    done[h] = None


def _others(event: BlockStored) -> list[list[Any]]:
    """Of each block, what it covers beside tokens and the adapter."""
    return [list(keys or ())[1 if event.lora_name else 0 :] for keys in event.extra_keys or ()]


class PrefixReader:
    """Of one engine core. `wake` makes it call `read` soon."""

    def __init__(
        self,
        instance: InstanceId,
        engine_index: EngineIndex,
        manager: Any,
        group: int,
        wake: Callable[[], None],
    ) -> None:
        self._instance = instance
        self._engine_index = engine_index
        self._pool = manager.block_pool
        self._group = group
        self._wake = wake
        self.blocks = PrefixBlocks(manager.block_size)
        self._snapshot_due = False
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="llumnix-prefixes", daemon=True)

    def start(self) -> None:
        """Makes vLLM note its events, for us alone. Before the first request."""
        self._pool.enable_kv_cache_events = True
        self._pool.take_events = list  # To the scheduler nothing ever happened.
        self._thread.start()

    def close(self) -> None:
        """Ends the waking."""
        self._closing.set()
        self._thread.join(CLOSE_TIMEOUT_S)

    def read(self) -> PrefixesChanged | None:
        """What has changed since the last call; None if nothing has. The engine's thread only."""
        if self._pool.kv_event_queue:
            events, self._pool.kv_event_queue = self._pool.kv_event_queue, []
            for event in events:
                if getattr(event, "group_idx", self._group) == self._group:
                    self.blocks.take(event)
        if self._snapshot_due:
            self._snapshot_due = False
            self.blocks.start_anew()
        changes = self.blocks.changes()
        if changes is None:
            return None
        stored, removed, cleared = changes
        return PrefixesChanged(
            instance=self._instance,
            engine_index=self._engine_index,
            stored=stored,
            removed=removed,
            cleared=cleared,
        )

    def _beat(self) -> None:
        while not self._closing.wait(SNAPSHOT_EVERY_S):
            self._snapshot_due = True
            self._wake()


def prefix_reader(
    settings: SchedulerSettings,
    scheduler: Any,
    instance: InstanceId,
    engine_index: EngineIndex,
    wake: Callable[[], None],
) -> PrefixReader | None:
    """For an engine core with this scheduler; None if the policy does not ask for it, or this
    engine cannot tell."""
    if not POLICIES[settings.policy].looks_at_caches:
        return None
    why = None
    kv = scheduler.kv_cache_manager
    groups = [n for n, (kind, _) in enumerate(kv.kv_cache_event_metadata) if kind in _WHOLE_PROMPT]
    if not kv.enable_caching:
        why = "prefix caching is off"
    elif not groups:
        why = "no layer of the model looks at the whole prompt"
    else:
        manager = kv.coordinator.single_type_managers[groups[0]]
        if BLOCK_TOKENS % manager.block_size and manager.block_size % BLOCK_TOKENS:
            why = f"its --block-size of {manager.block_size} does not go with our {BLOCK_TOKENS}"
    if why is not None:
        # That it is off is mostly what its user wants.
        level = logging.WARNING if kv.enable_caching else logging.INFO
        logger.log(level, "What %s keeps in its prefix cache stays unknown: %s", instance, why)
        return None
    return PrefixReader(instance, engine_index, manager, groups[0], wake)
