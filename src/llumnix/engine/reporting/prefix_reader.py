"""Reads which prefixes an engine's cache keeps, on the engine's own thread, between two steps.

vLLM's hashes of blocks mean nothing to another process. So the blocks of every request are named by
our chain (core/prefixes.py) as they are computed. With each name goes vLLM's key of the last block
under it: while that block is in vLLM's map, those before it are too.

vLLM's own events of its cache (`kv_events`) say the same, at some 30 µs for a block of 16 tokens.
To follow each request and note what was dropped costs a hundredth of that.

Rules
- Requests whose content is more than tokens (images, embeddings) are left out, and so are sessions
  of streamed inputs.
- If a block of vLLM's is larger than ours, all of our blocks in it are kept, though a prompt that
  shares only the first of them will not find it.
- The first fact, and one every `SNAPSHOT_EVERY_S`, says everything anew (`cleared`). So a
  controller that Ray has just started learns it, and what was lost on the way is made good. An
  engine that stands still is woken for it.
- A call names `NAMES_MAX` blocks, goes over `WALKED_MAX` and tells `HASHES_MAX` at most. The rest
  follows with the next calls. It looks at the requests that run, and at `SWEPT_MAX` of the others
  to find those that ended between two calls. Before an engine stands still all is told.
- Where more is computed than can be named, requests that have ended are forgotten beyond
  `ENDED_MAX`. Their prompts are found less often, no more.
- Of a model with several groups of layers, the first whose layers look at the whole prompt counts.

vLLM internals relied on here (tests/house/test_vllm_contract.py fails when one changes):
- `BlockPool.cached_block_hash_to_block` maps each block's key to the blocks that are in the cache,
  through `insert`, `pop` and `get_one_block`; `reset_prefix_cache` puts a new map in its place.
  Ours in its stead notes what is popped.
- `Request`: `block_hashes` of all its full blocks, each over all tokens before it, the LoRA
  adapter's name and the cache salt. Since 0.33, with a drafter that looks ahead, a hash also covers
  the next tokens, and is there once these are.
- `Request`: `all_token_ids`, `num_computed_tokens`, `num_preemptions`, `skip_reading_prefix_cache`.
- `KVCacheBlock.ref_cnt`: so many requests hold it.
- `kv_cache_manager.kv_cache_event_metadata` names each group's kind of layers,
  `coordinator.single_type_managers` has each group's pool and `block_size`, in tokens.
"""

import logging
import threading
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain as chained
from itertools import islice
from typing import Any

from vllm.v1.core.block_pool import BlockHashToBlockMap
from vllm.v1.core.kv_cache_utils import make_block_hash_with_group_id, resolve_block_hashes
from vllm.v1.request import Request

from llumnix.core.events import PrefixesChanged
from llumnix.core.prefixes import BLOCK_TOKENS, PREFIX_BLOCKS_MAX, chain, root
from llumnix.core.types import EngineIndex, InstanceId

logger = logging.getLogger("llumnix.engine")

SNAPSHOT_EVERY_S = 60.0
READ_EVERY_S = 0.05
"""What changed may wait for that long."""
NAMES_MAX = 128
"""So many blocks take less than a millisecond."""
WALKED_MAX = 1024
"""Blocks that a call goes over, named or known already."""
SWEPT_MAX = 64
ENDED_MAX = 256
HASHES_MAX = 8192
NAMED_TOKENS_MAX = PREFIX_BLOCKS_MAX * BLOCK_TOKENS
"""What lies beyond in a prompt is never asked for."""
CLOSE_TIMEOUT_S = 2.0
_WHOLE_PROMPT = ("full_attention", "mla_attention", "sink_full_attention")


class RecordingBlockMap(BlockHashToBlockMap):
    """vLLM's map of what is in its prefix cache. It records the keys of what was dropped."""

    def __init__(self, before: BlockHashToBlockMap) -> None:
        self._cache = before._cache
        self.dropped: list[bytes] = []

    def pop(self, key: Any, block_id: int) -> Any:
        """As the original does."""
        self.dropped.append(key)
        return super().pop(key, block_id)


@dataclass(slots=True, eq=False)
class TrackedRequest:
    """A request whose blocks are named as they are computed."""

    request: Request
    start: int  # the hash that its chain starts from
    after: int  # the hash of the last block that was named
    named: int = 0  # blocks
    preemptions: int = 0  # so far; after another one the blocks are named anew


class PrefixReader:
    """The reader of one engine core. `wake` makes the core call `read` soon. `running`: the
    requests that run. `more`: the last call did not get to the end of what is to be told."""

    def __init__(
        self,
        instance: InstanceId,
        engine_index: EngineIndex,
        manager: Any,
        group: int,
        wake: Callable[[], None],
        running: Callable[[], Sequence[Request]] = tuple,
    ) -> None:
        self._running = running
        self._instance = instance
        self._engine_index = engine_index
        self._pool = manager.block_pool
        self._group = group
        self._wake = wake
        self._size: int = manager.block_size
        # What is named at a time: a block of ours, or vLLM's if that is larger.
        self._unit = max(self._size, BLOCK_TOKENS)
        self._tracked: dict[str, TrackedRequest] = {}
        self._ended: deque[TrackedRequest] = deque(maxlen=ENDED_MAX)
        self._names_left = self._walk_left = self._turn = 0
        # Our names of what is kept, by vLLM's key of the last block under them.
        self._names: dict[bytes, tuple[int, ...]] = {}
        # How many keys keep each name: two if an adapter was loaded anew.
        self.kept: dict[int, int] = {}
        # What has still to be told, in order, so that the beginning of a long prompt comes first.
        self._stored: dict[int, None] = {}
        self._removed: dict[int, None] = {}
        self._cleared = True
        self._read_s = 0.0
        self.more = False
        self._snapshot_due = False
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="llumnix-prefixes", daemon=True)
        self._map = self._take_map()

    def start(self) -> None:
        """Begins to have everything told anew from time to time."""
        self._thread.start()

    def close(self) -> None:
        """Ends that."""
        self._closing.set()
        self._thread.join(CLOSE_TIMEOUT_S)

    def track(self, request: Request) -> None:
        """A request came, new or from another engine. The engine's thread only."""
        if request.mm_features or request.prompt_embeds is not None or request.resumable:
            return
        lora = request.lora_request
        start = root(lora.lora_name if lora else None, request.cache_salt)
        self._tracked[request.request_id] = TrackedRequest(request, start, start)

    def cached_tokens(self, request: Request) -> tuple[int, int]:
        """How many leading tokens of a request are in the cache, and how many of those are in
        blocks that requests hold. The last token is never looked for. By bisection, since a cache
        mostly drops a prompt from its end, and a request that holds a block holds those before it.
        The engine's thread only."""
        if request.skip_reading_prefix_cache:
            return 0, 0
        get, group = self._pool.cached_block_hash_to_block.get_one_block, self._group
        hashes = resolve_block_hashes(request.block_hashes, self._pool.hash_block_size, self._size)

        def holders(n: int) -> int:
            block = get(make_block_hash_with_group_id(hashes[n], group))
            return -1 if block is None else block.ref_cnt

        most = min(len(hashes), (request.num_tokens - 1) // self._size)
        cached = bisect_left(range(most), True, key=lambda n: holders(n) < 0)
        held = bisect_left(range(cached), True, key=lambda n: holders(n) <= 0)
        return cached * self._size, held * self._size

    def read(self, *, at_once: bool = False) -> PrefixesChanged | None:
        """What has changed since the last call, up to a bound. None if nothing has, or if the last
        call was just now and `at_once` is not wanted. The engine's thread only."""
        now = time.monotonic()
        if not at_once and now - self._read_s < READ_EVERY_S:
            return None
        self._read_s = now
        if self._pool.cached_block_hash_to_block is not self._map:
            self._start_over()
        if self._map.dropped:
            self._look_at_dropped()
        self._name(whole=at_once)
        if self._snapshot_due:
            self._snapshot_due = False
            self._cleared = True
            self._stored = dict.fromkeys(self.kept)
            self._removed.clear()
        return self._told()

    def _told(self) -> PrefixesChanged | None:
        if not (self._stored or self._removed or self._cleared):
            return None
        stored = tuple(islice(self._stored, HASHES_MAX))
        removed = tuple(islice(self._removed, HASHES_MAX))
        for h in stored:
            del self._stored[h]
        for h in removed:
            del self._removed[h]
        cleared, self._cleared = self._cleared, False
        self.more |= bool(self._stored or self._removed)
        return PrefixesChanged(
            instance=self._instance,
            engine_index=self._engine_index,
            stored=stored,
            removed=removed,
            cleared=cleared,
        )

    def _take_map(self) -> RecordingBlockMap:
        noted = RecordingBlockMap(self._pool.cached_block_hash_to_block)
        self._pool.cached_block_hash_to_block = noted
        return noted

    def _start_over(self) -> None:
        """The cache was emptied."""
        self._map = self._take_map()
        self._cleared |= bool(self.kept or self._removed)
        for known in (self._names, self.kept, self._stored, self._removed):
            known.clear()
        for tracked in chained(self._tracked.values(), self._ended):
            tracked.named, tracked.after = 0, tracked.start

    def _look_at_dropped(self) -> None:
        dropped, self._map.dropped = self._map.dropped, []
        for key in dropped:
            # It may be there several times, or again.
            if key in self._names and self._map.get_one_block(key) is None:
                for h in self._names.pop(key):
                    self.kept[h] -= 1
                    if not self.kept[h]:
                        del self.kept[h]
                        _note(h, self._removed, self._stored)

    def _name(self, *, whole: bool) -> None:
        """Names the blocks that were computed since the last call. `whole`: looks at all."""
        self._names_left, self._walk_left = NAMES_MAX, WALKED_MAX
        running = self._running()
        done = True
        # Beginning with another one each time, so that the last are named too.
        self._turn += 1
        for n in range(len(running)):
            request = running[(n + self._turn) % len(running)]
            tracked = self._tracked.get(request.request_id)
            if tracked is not None and tracked.request is request:
                done = self._advance(tracked) and done
        for name in list(islice(self._tracked, None if whole else SWEPT_MAX)):
            tracked = self._tracked.pop(name)
            if tracked.request.is_finished():
                self._ended.append(tracked)
                continue
            self._tracked[name] = tracked  # behind the others
            if whole:
                done = self._advance(tracked) and done
        while self._ended and self._advance(self._ended[0]):
            self._ended.popleft()
        self.more = bool(self._ended) or not done

    def _advance(self, tracked: TrackedRequest) -> bool:
        """Names blocks of one request. Returns whether all that it has computed are named."""
        request = tracked.request
        if tracked.preemptions != request.num_preemptions:
            tracked.preemptions = request.num_preemptions
            tracked.named, tracked.after = 0, tracked.start
        if request.num_computed_tokens < (tracked.named + 1) * self._unit:
            return True
        unit, finished = self._unit, request.is_finished()
        hashes = resolve_block_hashes(request.block_hashes, self._pool.hash_block_size, self._size)
        end = min(request.num_computed_tokens, len(hashes) * self._size, NAMED_TOKENS_MAX)
        while (tracked.named + 1) * unit <= end:
            if self._names_left <= 0 or self._walk_left <= 0:
                return False
            self._walk_left -= 1
            begin, ended = tracked.named * unit, (tracked.named + 1) * unit
            key = make_block_hash_with_group_id(hashes[ended // self._size - 1], self._group)
            here = self._map.get_one_block(key) is not None
            if not here and not finished:
                return True  # The next step enters it.
            ends = self._names.get(key) if here else None
            if ends is None:
                ends = chain(tracked.after, request.all_token_ids[begin:ended])
                self._names_left -= len(ends)
                if here:
                    self._keep(key, ends)
            tracked.named += 1
            tracked.after = ends[-1]
        return True

    def _keep(self, key: bytes, ends: tuple[int, ...]) -> None:
        self._names[key] = ends
        for h in ends:
            self.kept[h] = self.kept.get(h, 0) + 1
            if self.kept[h] == 1:
                _note(h, self._stored, self._removed)

    def _beat(self) -> None:
        while not self._closing.wait(SNAPSHOT_EVERY_S):
            self._snapshot_due = True
            self._wake()


def _note(h: int, done: dict[int, None], undone: dict[int, None]) -> None:
    """Something is to be told. If its contrary was, neither is any more."""
    if h in undone:
        del undone[h]
    else:
        done[h] = None


def prefix_reader(
    scheduler: Any,
    instance: InstanceId,
    engine_index: EngineIndex,
    wake: Callable[[], None],
) -> PrefixReader | None:
    """A reader for an engine core with this scheduler, or None if this engine cannot tell."""
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
    return PrefixReader(instance, engine_index, manager, groups[0], wake, lambda: scheduler.running)
