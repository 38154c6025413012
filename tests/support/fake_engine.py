"""An engine without a model: blocks, batches, chunked prompts, preemption, steps in flight.

Its KV cache is real in one respect: a block's slots hold the tokens that were computed into them,
and the next token is made from what the slots say. A block that was not copied, or was given away
too early, changes the output.

Its prefix cache finds a block by all tokens up to the block's end, and `check_cache` compares what
the block holds with them.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from llumnix.core.messages import OFFICE, Blocks
from llumnix.core.migration.port import Movable, Phase, Progress, Refusal
from llumnix.core.types import EngineIndex, RequestId

NOTHING = -1
VOCABULARY = 997
STEP_S = 0.01


def next_token(tokens: list[int]) -> int:
    """The model: any token depends on all before it."""
    return hash(tuple(tokens)) % VOCABULARY  # Hashes of integers are the same in every run.


def undisturbed(prompt: list[int], count: int) -> list[int]:
    """What a request generates when nothing happens to it."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


@dataclass(slots=True, kw_only=True, eq=False)
class FakeRequest:
    id: RequestId
    prompt: list[int]
    max_tokens: int
    outputs: list[int] = field(default_factory=list)
    computed: int = 0
    in_flight: int = 0
    blocks: list[int] = field(default_factory=list)
    stopped: bool = False
    preemptions: int = 0
    client: int = OFFICE

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.outputs


Said = tuple[RequestId, list[int], bool]
"""Of one request: new tokens, and whether it is finished."""


class FakeEngine:
    """Implements `EnginePort`. `depth`: steps in flight beside the one being made (1: as with
    asynchronous scheduling). `on_pull(ticket, source, pairs)` begins a copy that the host ends
    with `copy`, `on_cancel(ticket)` asks for an early end."""

    def __init__(
        self,
        index: EngineIndex,
        *,
        blocks: int = 64,
        block_tokens: int = 4,
        depth: int = 0,
        chunk: int = 12,
        batch: int = 8,
        on_pull: Callable[[int, EngineIndex, list[tuple[int, int]]], None] = lambda *_: None,
        on_cancel: Callable[[int], None] = lambda _: None,
    ) -> None:
        self.index = index
        self.block_tokens = block_tokens
        self.memory = [[NOTHING] * block_tokens for _ in range(blocks)]
        self.references = [0] * blocks
        self.free = list(range(blocks))
        self.cached: dict[tuple[int, ...], int] = {}
        """The prefix cache: all tokens up to a block's end, and the block."""
        self.keys: dict[int, tuple[int, ...]] = {}
        """The same, by block."""
        self.changed: set[int] = set()
        """Blocks that were written, or entered in the cache, since the last `check_cache`."""
        self.requests: dict[RequestId, FakeRequest] = {}
        self.waiting: list[FakeRequest] = []
        self.running: list[FakeRequest] = []
        self.arriving: dict[RequestId, FakeRequest] = {}
        self.pinned: dict[RequestId, list[int]] = {}
        self.flights: list[list[tuple[FakeRequest, int, int]]] = []
        self.depth, self.chunk, self.batch = depth, chunk, batch
        self.on_pull, self.on_cancel = on_pull, on_cancel

    # -- what a frontend does

    def add(
        self, request: RequestId, prompt: list[int], max_tokens: int, client: int = OFFICE
    ) -> None:
        new = FakeRequest(id=request, prompt=prompt, max_tokens=max_tokens, client=client)
        self.requests[request] = new
        self.waiting.append(new)

    def abort(self, request: RequestId) -> None:
        if (known := self.requests.get(request)) is not None:
            self._finish(known)

    # -- steps

    def step(self) -> list[Said]:
        self.flights.append(self._schedule())
        return self._land() if len(self.flights) > self.depth else []

    def idle(self) -> bool:
        return not self.running and not self.waiting and not any(self.flights)

    def preempt_somebody(self) -> None:
        if self.running:
            self._preempt(self.running[-1])

    def _schedule(self) -> list[tuple[FakeRequest, int, int]]:
        flight = []
        for request in list(self.running):
            if request not in self.running:
                continue
            ahead = sum(1 for f in self.flights for r, _, c in f if r is request and c)
            known = len(request.tokens) + ahead
            if len(request.outputs) + ahead >= request.max_tokens:
                continue
            count = min(self.chunk, known - request.computed)
            if count <= 0 or not self._room_or_preempt(request, request.computed + count):
                continue
            flight.append(self._put(request, count, known))
        while self.waiting and len(self.running) < self.batch:
            # As vLLM does: who holds blocks goes before those who need all of theirs.
            request = next((r for r in self.waiting if r.blocks), self.waiting[0])
            if request.in_flight:
                break
            if not request.blocks:
                hit = self._hit(request.tokens)
                count = min(self.chunk, len(request.tokens) - len(hit) * self.block_tokens)
                if not self._begin(request, hit, len(hit) * self.block_tokens + count):
                    break
                request.computed = len(hit) * self.block_tokens
            count = min(self.chunk, len(request.tokens) - request.computed)
            if not self._grow(request, request.computed + count):
                break
            self.waiting.remove(request)
            self.running.append(request)
            flight.append(self._put(request, count, len(request.tokens)))
        return flight

    def _put(self, request: FakeRequest, count: int, known: int) -> tuple[FakeRequest, int, int]:
        start, request.computed = request.computed, request.computed + count
        request.in_flight += 1
        samples = int(request.computed == known)
        return (request, start, samples)

    def _land(self) -> list[Said]:
        said: list[Said] = []
        for request, start, samples in self.flights.pop(0):
            request.in_flight -= 1
            if request.id not in self.requests or self.requests[request.id] is not request:
                continue
            if start >= 0 and request.blocks:
                self._write(request, start, len(request.tokens))
                self._enter(request, min(request.computed, len(request.tokens)))
            if samples and request.blocks:
                seen = self._read(request, len(request.tokens))
                request.outputs.append(next_token(seen))
                done = len(request.outputs) >= request.max_tokens
                said.append((request.id, request.outputs[-1:], done))
                if done:
                    self._finish(request)
        return said

    def _write(self, request: FakeRequest, start: int, end: int) -> None:
        tokens = request.tokens
        for position in range(start, min(end, request.computed)):
            block, slot = divmod(position, self.block_tokens)
            self.memory[request.blocks[block]][slot] = tokens[position]
            self.changed.add(request.blocks[block])

    def _read(self, request: FakeRequest, end: int) -> list[int]:
        size = self.block_tokens
        return [self.memory[request.blocks[p // size]][p % size] for p in range(end)]

    def _room_or_preempt(self, request: FakeRequest, tokens: int) -> bool:
        while not self._grow(request, tokens):
            victim = self.running[-1]
            self._preempt(victim)
            if victim is request:
                return False
        return True

    def _preempt(self, request: FakeRequest) -> None:
        # What was in flight is thrown away and computed again.
        for flight in self.flights:
            flight[:] = [entry for entry in flight if entry[0] is not request]
        request.in_flight = 0
        self.running.remove(request)
        self._free(request)
        request.computed = 0
        request.preemptions += 1
        self.waiting.insert(0, request)

    def _finish(self, request: FakeRequest) -> None:
        del self.requests[request.id]
        for queue in (self.running, self.waiting):
            if request in queue:
                queue.remove(request)
        self._free(request)

    # -- blocks

    def _grow(self, request: FakeRequest, tokens: int) -> bool:
        need = -(-tokens // self.block_tokens) - len(request.blocks)
        if need > len(self.free):
            return False
        for _ in range(need):
            block = self.free.pop(0)
            if (key := self.keys.pop(block, None)) is not None:
                del self.cached[key]
            self.references[block] = 1
            self.memory[block] = [NOTHING] * self.block_tokens
            request.blocks.append(block)
        return True

    def _free(self, request: FakeRequest) -> None:
        self._give_back(request.blocks)
        request.blocks = []

    def _give_back(self, blocks: list[int]) -> None:
        for block in reversed(blocks):
            self.references[block] -= 1
            assert self.references[block] >= 0
            if self.references[block] == 0:
                self.free.append(block)

    # -- prefix cache

    def _hit(self, tokens: list[int]) -> list[int]:
        """The blocks that hold the beginning of these tokens, all but the last at the most."""
        found = []
        for end in range(self.block_tokens, len(tokens), self.block_tokens):
            if (block := self.cached.get(tuple(tokens[:end]))) is None:
                break
            found.append(block)
        return found

    def _begin(self, request: FakeRequest, hit: list[int], tokens: int) -> bool:
        """Gives a request these blocks of the cache, and new ones up to so many tokens."""
        need = -(-tokens // self.block_tokens) - len(hit)
        if need > len(self.free) - sum(1 for b in hit if not self.references[b]):
            return False
        for block in hit:
            if not self.references[block]:
                self.free.remove(block)
            self.references[block] += 1
        request.blocks = list(hit)
        return self._grow(request, tokens)

    def _enter(self, request: FakeRequest, tokens: int) -> None:
        """The first `tokens` tokens, as far as they fill blocks, can be found from now on."""
        known = request.tokens
        for number in range(tokens // self.block_tokens):
            block, key = request.blocks[number], tuple(known[: (number + 1) * self.block_tokens])
            if block not in self.keys and key not in self.cached:
                self.cached[key], self.keys[block] = block, key
                self.changed.add(block)

    def check_cache(self) -> None:
        """No block of the prefix cache may hold the bytes of other tokens."""
        for block in self.changed:
            if (key := self.keys.get(block)) is not None:
                assert self.memory[block] == list(key[-self.block_tokens :]), (
                    f"engine {self.index}: block {block} of the prefix cache holds other tokens"
                )
        self.changed.clear()

    # -- what a duo needs (tests/support/duo.py)

    def blocks_used(self) -> int:
        return len(self.memory) - len(self.free)

    def requests_held(self) -> int:
        return len(self.requests) + len(self.arriving) + len(self.pinned)

    def runs(self, request: RequestId) -> bool:
        known = self.requests.get(request)
        return known is not None and not known.stopped

    # -- EnginePort

    def client(self, request: RequestId) -> int:
        known = self.requests.get(request)
        return OFFICE if known is None else known.client

    @property
    def step_s(self) -> float:
        return STEP_S

    @property
    def prompts_in_flight(self) -> bool:
        return any(start + 1 < len(r.prompt) for flight in self.flights for r, start, _ in flight)

    def movable(self) -> list[Movable]:
        return [
            Movable(
                request=r.id,
                priority=0,
                tokens=-(-len(r.tokens) // self.block_tokens) * self.block_tokens,
                waiting=r in self.waiting,
                busy=bool(r.blocks) and r.computed + 1 < len(r.tokens),
            )
            for r in self.waiting + self.running
        ]

    def describe(self, request: RequestId) -> bytes | Refusal:
        known = self.requests[request]
        return repr((known.prompt, known.max_tokens, known.client)).encode()

    def agents(self) -> list[str]:
        return ["fake"]

    def progress(self, request: RequestId) -> Progress:
        known = self.requests.get(request)
        if known is None:
            return Progress(phase=Phase.GONE)
        phase = Phase.WAITING if known in self.waiting else Phase.RUNNING
        ahead = [s for f in self.flights for r, s, _ in f if r is known]
        return Progress(
            phase=Phase.STOPPED if known.stopped else phase,
            settled=min(ahead, default=known.computed),
            in_flight=known.in_flight > 0,
            tokens=len(known.tokens),
            outputs=len(known.outputs),
            preemptions=known.preemptions,
        )

    def outputs(self, request: RequestId, first: int) -> list[int]:
        return self.requests[request].outputs[first:]

    def _ids(self, request: FakeRequest, start: int, end: int) -> list[int]:
        return request.blocks[start // self.block_tokens : -(-end // self.block_tokens)]

    def pin(self, request: RequestId, start: int, end: int) -> Blocks:
        ids = self._ids(self.requests[request], start, end)
        for block in ids:
            self.references[block] += 1
        self.pinned.setdefault(request, []).extend(ids)
        return [ids]

    def unpin(self, request: RequestId) -> None:
        self._give_back(self.pinned.pop(request, []))

    def stop(self, request: RequestId) -> None:
        known = self.requests[request]
        known.stopped = True
        (self.waiting if known in self.waiting else self.running).remove(known)

    def handover_state(self, request: RequestId, start: int) -> tuple[int, Blocks, bytes]:
        known = self.requests[request]
        assert known.stopped
        assert not known.in_flight
        return known.computed, [self._ids(known, start, known.computed)], b""

    def resume(self, request: RequestId) -> None:
        known = self.requests.get(request)
        if known is None:
            return
        known.stopped = False
        if known.in_flight:
            self.running.append(known)
        else:
            self.waiting.insert(0, known)

    def release(self, request: RequestId) -> None:
        if (known := self.requests.get(request)) is not None:
            self._finish(known)

    def reserve(
        self, request: RequestId, body: bytes, outputs: list[int], tokens: int, agents: list[str]
    ) -> int | Refusal:
        if request in self.requests or request in self.arriving:
            return Refusal(why="still leaving")
        new = self._new(request, eval(body), outputs)  # noqa: S307 - our own repr, in a test
        hit = self._hit(new.tokens) if tokens else []
        if not self._begin(new, hit, tokens):
            return Refusal(why="no room")
        self.arriving[request] = new
        return len(hit) * self.block_tokens

    def admit(self, request: RequestId, made: object, outputs: list[int]) -> Refusal | None:
        if request in self.requests or request in self.arriving:
            return Refusal(why="still leaving")
        self.arriving[request] = new = self._new(request, made, outputs)
        new.preemptions = 1
        return None

    def _new(self, request: RequestId, made: Any, outputs: list[int]) -> FakeRequest:
        """`made`: prompt, tokens wanted and, unless that is the office, its frontend."""
        prompt, max_tokens, client = (*made, OFFICE)[:3]
        return FakeRequest(
            id=request,
            prompt=prompt,
            max_tokens=max_tokens,
            outputs=list(outputs),
            client=client,
        )

    def ready(self, request: RequestId) -> bool | Refusal:
        return True

    def reach(self, request: RequestId, tokens: int, outputs: list[int]) -> Refusal | None:
        known = self.arriving[request]
        known.outputs += outputs
        return None if self._grow(known, tokens) else Refusal(why="no room")

    def pull(
        self,
        request: RequestId,
        ticket: int,
        source: EngineIndex,
        agents: list[str],
        start: int,
        end: int,
        blocks: Blocks,
        final: bool,
    ) -> None:
        mine = self._ids(self.arriving[request], start, end)
        self.on_pull(ticket, source, list(zip(blocks[0], mine, strict=True)))

    def copy(self, source: "FakeEngine", pairs: list[tuple[int, int]]) -> None:
        for theirs, mine in pairs:
            self.memory[mine] = list(source.memory[theirs])
            self.changed.add(mine)

    def cancel(self, ticket: int) -> None:
        self.on_cancel(ticket)

    def cache(self, request: RequestId, tokens: int) -> None:
        self._enter(self.arriving[request], tokens)

    def commit(self, request: RequestId, computed: int, state: bytes) -> Refusal | None:
        known = self.arriving.pop(request)
        known.computed = computed
        self._enter(known, computed)
        if not computed:
            self._free(known)
        self.requests[request] = known
        self.waiting.insert(0, known)
        return None

    def drop(self, request: RequestId) -> None:
        self._free(self.arriving.pop(request))
