"""The two kinds of engines that the scenarios run on."""

from collections.abc import Callable
from typing import Any

from llumnix.core.messages import OFFICE, Revive
from llumnix.core.types import EngineIndex, RequestId
from support.duo import Duo, Said
from support.fake_engine import FakeEngine, undisturbed

BLOCK_TOKENS_FAKE = 4


class FakeTestEngine:
    """A fake engine as a duo wants it; `options` of a request is its number of tokens."""

    def __init__(self, number: int, duo: Duo, depth: int) -> None:
        self.number, self.duo, self.depth = number, duo, depth
        self.jobs: list[tuple[int, EngineIndex, list[tuple[int, int]]]] = []
        self._new()

    def _new(self) -> None:
        self.port = FakeEngine(
            EngineIndex(self.number),
            depth=self.depth,
            on_pull=lambda *job: self.jobs.append(job),
        )

    def add(
        self, request: RequestId, prompt: list[int], options: Any, client: int = OFFICE
    ) -> None:
        self.port.add(request, prompt, options, client)

    def again(self, order: Revive, prompt: list[int], options: Any) -> Any:
        return prompt, options

    def abort(self, request: RequestId) -> None:
        self.port.abort(request)

    def step(self) -> list[Said]:
        return [(request, tokens, done, None) for request, tokens, done in self.port.step()]

    def idle(self) -> bool:
        return self.port.idle()

    def preempt_somebody(self) -> None:
        self.port.preempt_somebody()

    def pulls(self) -> list[tuple[int, str | None, int, float]]:
        done = []
        for ticket, source, pairs in self.jobs:
            engine = self.duo.engines.get(source)
            if engine is not None:
                self.port.copy(engine.port, pairs)
            done.append((ticket, None if engine else "the source is gone", len(pairs), 0.0))
        self.jobs = []
        return done

    def blocks_used(self) -> int:
        return self.port.blocks_used()

    def requests_held(self) -> int:
        return self.port.requests_held()

    def runs(self, request: RequestId) -> bool:
        return self.port.runs(request)

    def requests_of(self, client: int) -> list[RequestId]:
        return [r.id for r in self.port.requests.values() if r.client == client]

    def die(self) -> None:
        self.jobs = []
        self._new()


class FakeKind:
    """Scenarios on fake engines. `long_prompt` is several chunks; `tokens` a usual answer."""

    long_prompt = 60
    tokens = 30
    dead_can_be_read = False

    def __init__(self, depth: int) -> None:
        self.depth = depth

    def duo(self) -> Duo:
        return Duo(lambda number, duo: FakeTestEngine(number, duo, self.depth))

    def options(self, tokens: int) -> Any:
        return tokens

    def expected(self, prompt: list[int], tokens: int) -> list[int]:
        return undisturbed(prompt, tokens)


class RealKind:
    """Scenarios on two of vLLM's engines, which are started once."""

    long_prompt = 300
    tokens = 40
    dead_can_be_read = True  # Its workers' agents live on in this process.

    def __init__(self, engines: list[Any], prompts: Callable[[int], list[int]]) -> None:
        self.engines = engines
        self.prompts = prompts
        self.stories: dict[str, list[Any]] = {}  # of cases that were left alone
        self._known: dict[tuple, list[int]] = {}

    def duo(self) -> Duo:
        for engine in self.engines:
            engine.die()
            engine.core.scheduler.reset_prefix_cache()
        return Duo(lambda number, duo: self.engines[number])

    def options(self, tokens: int) -> Any:
        from vllm import SamplingParams

        return SamplingParams(max_tokens=tokens, temperature=0.8, seed=11, ignore_eos=True)

    def expected(self, prompt: list[int], tokens: int) -> list[int]:
        key = (tuple(prompt), tokens)
        if key not in self._known:
            duo = self.duo()
            request = duo.add("undisturbed", prompt, self.options(tokens))
            duo.finish()
            self._known[key] = duo.got[request]
        return self._known[key]
