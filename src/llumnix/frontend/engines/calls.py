"""Calls to one engine, to all, or to any, over a set of engines that changes.

Rules
- A call to all goes to every engine that has joined. A new engine joins once it is in the state
  that all share (engines/state.py). An engine that dies during a call is left out.
- Every call to all is bounded in time. An engine that does not answer is named in the error; what
  the others did stands.
- An adapter is loaded on all engines or on none.
- A call that a migration depends on is repeated if it fails, a bounded number of times.

vLLM internals relied on here (tests/house/test_vllm_contract.py fails when one changes):
`AsyncMPClient._call_utility_async(method, *args, engine)`, replaced here, calls one engine by its
ZMQ identity: it sends (client, call, method, arguments) and awaits the future in `utility_results`.
Its methods for all engines go through `call_utility_async`, `call_utility_all_async` and
`call_utility_consensus_async`, replaced here too. A call that failed in an engine raises a bare
`Exception`; a `GracefulHTTPError` becomes its own status.
"""

import asyncio
import logging
import uuid
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from vllm.exceptions import GracefulHTTPError
from vllm.lora.request import LoRARequest
from vllm.v1.engine import EngineCoreRequestType
from vllm.v1.engine.exceptions import EngineDeadError

from llumnix.core.events import DrainInstance
from llumnix.core.types import EngineIndex, MigrationId
from llumnix.frontend.engines.engine import Engine
from llumnix.frontend.engines.others import Others
from llumnix.frontend.engines.sockets import EngineSockets
from llumnix.frontend.engines.state import PAUSES, EngineState, SharedCall

logger = logging.getLogger("llumnix.frontend")

SHORT_TIMEOUT_S = 10.0
"""For calls that are short. An engine comes to them after its present step."""
LONG_TIMEOUT_S = 600.0
"""For calls that move weights or wait for requests to end."""
DRAIN_REQUESTS_MAX = 256
"""So many instances' requests for their own drain wait for the fleet, which takes each at once."""
LOOK_EVERY_S = 1.0
FATE_POLL_S = 0.02
FATE_ASKED_MAX = 3000
"""How often a destination is asked what it decided, which takes a minute. It waits for one pull at
most, from a source that is dead."""
CALL_TRIES_MAX = 5
CALL_PAUSE_S = 0.1
"""After the first failure of a call that must not be lost; each further pause is twice as long."""
SHARED = frozenset({
    *PAUSES, "pin_lora", "release_kv_cache_memory", "remove_lora", "reset_encoder_cache",
    "reset_mm_cache", "reset_prefix_cache", "resume_scheduler", "sleep", "wake_up",
})  # fmt: skip
"""Calls that the office makes for a frontend that is not alone. Two frontends that called at the
same time would reach the engines in different orders, and an engine that joins would miss one."""
LONG = frozenset({
    "add_lora", "collective_rpc", "compute_weight_checksums", "pause_generation", "pause_scheduler",
    "pin_lora", "profile", "release_kv_cache_memory", "remove_lora", "save_sharded_state", "sleep",
    "wake_up",
})  # fmt: skip


class EngineCalls(EngineSockets):
    """The part of the fleet's client that calls engines."""

    others: Others | None = None  # that are asked through the office; None if there are none

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        adapters = self.vllm_config.lora_config
        self.shared_state = EngineState(None if adapters is None else adapters.max_cpu_loras)
        self.drain_requests: asyncio.Queue[DrainInstance] = asyncio.Queue(DRAIN_REQUESTS_MAX)
        self._calls: dict[EngineIndex, set[asyncio.Future[Any]]] = {}

    def take_out(self, engine_index: EngineIndex) -> Engine | None:
        """Forgets an engine that is gone; calls to it fail. None if it was not there."""
        engine = self.engines.lose(engine_index)
        if engine is not None:
            self.refresh()
            self.shared_state.forget(engine_index)
            self.fail_calls(engine_index)
        return engine

    def drain_requested(self, engine_index: EngineIndex, why: str) -> None:
        """An instance asks for its own drain."""
        request = DrainInstance(instance=self.engines.name(engine_index), why=why)
        if self.drain_requests.full():
            self.complaints.note("Dropped an instance's request for a drain", request)
        else:
            self.drain_requests.put_nowait(request)

    async def bring_up(self, engine_index: EngineIndex) -> str | None:
        """Brings a new engine into the state of the others, and has it join them. Returns None, or
        why it could not be."""
        got: list[SharedCall] = []
        while (call := self.shared_state.next(got)) is not None:
            try:
                args = call.args
                if call.method == "sleep" and args[0] > 1:
                    # Weights that the others load anew may never reach it: it keeps its own.
                    args = (1, *args[1:])
                async with asyncio.timeout(_limit_s(call.method, args)):
                    answer = await self.call_engine(engine_index, call.method, *args)
                if not call.made:
                    call.came[engine_index] = answer
            except EngineDeadError:
                return "it died while it was brought into the state of the others"
            except Exception as error:  # noqa: BLE001 - vLLM's for a failed call
                name, what = self.engines.name(engine_index), f"{type(error).__name__}: {error}"
                if call.method not in ("add_lora", "pin_lora"):
                    return f"it could not be brought into the state of the others: {what}"
                # A request for the adapter loads it, or fails and says why.
                logger.warning("Instance %s did not load an adapter: %s", name, what)
        self.shared_state.joined.add(engine_index)
        return None

    async def call_engine(self, engine_index: EngineIndex, method: str, *args: Any) -> Any:
        """Calls one engine; `EngineDeadError` if it is gone, or goes before it has answered."""
        identity = engine_index.to_bytes(2, "little")
        return await self._call_utility_async(method, *args, engine=identity)

    async def _call_utility_async(self, method: str, *args: Any, engine: bytes) -> Any:
        engine_index = EngineIndex(int.from_bytes(engine, "little"))
        if (
            not engine or engine_index not in self.engines
        ):  # Lost since our caller listed the engines.
            raise EngineDeadError()
        call_id = uuid.uuid1().int >> 64
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.utility_results[call_id] = answer
        calls = self._calls.setdefault(engine_index, set())
        calls.add(answer)
        try:
            call = (self.client_index, call_id, method, args)
            await self._send_input(EngineCoreRequestType.UTILITY, call, engine)
            return await answer
        finally:
            self.utility_results.pop(call_id, None)
            calls.discard(answer)

    def fail_calls(self, engine_index: EngineIndex) -> None:
        """Ends the calls that wait for an engine that is lost."""
        for answer in self._calls.pop(engine_index, set()):
            if not answer.done():
                answer.set_exception(EngineDeadError())

    async def tell_lost(
        self, engine_index: EngineIndex, lost: EngineIndex, granted: list[MigrationId]
    ) -> bool:
        """Tells an engine that another one died, and for which migrations to that it has a fresh
        epoch. Returns False if it could not be told and lives."""
        news = lost, self.engines.address(lost), granted, self.client_index
        for attempt in range(CALL_TRIES_MAX):
            try:
                await self.call_engine(engine_index, "llumnix_engine_lost", *news)
            except EngineDeadError:
                return True  # It died too, and that is told on its own.
            except Exception as error:  # noqa: BLE001 - vLLM raises a bare Exception
                self.complaints.note("An engine was not told of a death", repr(error))
                await asyncio.sleep(CALL_PAUSE_S * 2**attempt)
            else:
                return True
        return False

    async def ask_fate(self, engine_index: EngineIndex, migration: MigrationId) -> str | None:
        """Asks a destination what it decided, until there is an answer: `taken` or `declined`;
        `undecided` if it gives none. None if it died, which is told on its own."""
        fate, failures, asked = "undecided", 0, 0
        while fate == "undecided" and failures < CALL_TRIES_MAX and asked < FATE_ASKED_MAX:
            asked += 1
            try:
                fate = await self.call_engine(engine_index, "llumnix_fate", migration)
            except EngineDeadError:
                return None
            except Exception as error:  # noqa: BLE001 - vLLM raises a bare Exception
                self.complaints.note("An engine did not say a fate", repr(error))
                await asyncio.sleep(CALL_PAUSE_S * 2**failures)
                failures += 1
            if fate == "undecided":
                await asyncio.sleep(FATE_POLL_S)
        return fate

    async def call_utility_async(self, method: str, *args: Any) -> Any:
        """Calls all engines; what they answer must agree, and that is returned."""
        return await self.call_utility_consensus_async(method, *args)

    async def call_utility_all_async(self, method: str, *args: Any) -> list[Any]:
        answers = await self.call_joined(method, args)
        return list(answers.values())

    async def call_utility_consensus_async(self, method: str, *args: Any) -> Any:
        answers = await self.call_joined(method, args)
        first, *others = answers.values()
        if any(answer != first for answer in others):
            said = ", ".join(f"{self.engines.name(e)}: {answer}" for e, answer in answers.items())
            raise GracefulHTTPError(
                f"The instances differ in {method} ({said}).", HTTPStatus.INTERNAL_SERVER_ERROR
            )
        return first

    async def call_joined(self, method: str, args: tuple[Any, ...]) -> dict[EngineIndex, Any]:
        """What each engine that has joined answers."""
        if self.others is not None and method in SHARED:
            return await self.others.call_all(method, args)
        return await self._call(self._those_joined(), method, args)

    def _those_joined(self) -> list[EngineIndex]:
        engines = [EngineIndex(int.from_bytes(e, "little")) for e in self.core_engines]
        joined = [e for e in engines if e in self.shared_state.joined]
        if not joined:
            raise EngineDeadError()
        return joined

    async def _call_one(self, method: str, *args: Any) -> Any:
        """What one engine answers, whichever; one that is silent only if all are. If it dies
        meanwhile, another is asked."""
        died: list[EngineIndex] = []
        while True:
            engines = [e for e in self._those_joined() if e not in died]
            heard = [e for e in engines if e not in self.shared_state.silent]
            asked = (heard or engines)[:1]
            try:
                (answer,) = (await self._call(asked, method, args)).values()
            except EngineDeadError:
                if not asked:
                    raise
                died += asked
            else:
                return answer

    async def _call(
        self, engines: list[EngineIndex], method: str, args: tuple[Any, ...]
    ) -> dict[EngineIndex, Any]:
        """What these engines answer, those left out that died meanwhile. An engine's failure, or
        silence, is raised once all others have answered."""
        made = self.shared_state.begin(method, args)
        calls = {e: asyncio.ensure_future(self.call_engine(e, method, *args)) for e in engines}
        try:
            await self._wait(calls, _limit_s(method, args))
            unanswered = [e for e, call in calls.items() if not call.done()]
        except BaseException:
            self.shared_state.end(made, self.shared_state.of_newcomers(made, failed=True))
            raise
        finally:
            for call in calls.values():
                call.cancel()
        answers: dict[EngineIndex, Any] = {}
        failures: dict[EngineIndex, BaseException] = {}
        for engine_index, call in calls.items():
            if not call.done():
                continue
            if (error := call.exception()) is None:
                answers[engine_index] = call.result()
            elif not isinstance(error, EngineDeadError):
                failures[engine_index] = error
        failed = bool(failures or unanswered)
        back = method == "add_lora" and failed
        results = list(answers.values()) or self.shared_state.of_newcomers(made, failed=failed)
        self.shared_state.end(made, None if back else results)
        if not (answers or failures or unanswered):
            raise EngineDeadError()
        if back:
            came = [e for e in self.shared_state.joined if e not in calls]
            await self._unload(args[0].lora_int_id, [*answers, *came])
        if unanswered:
            who = ", ".join(map(self.engines.name, unanswered))
            raise GracefulHTTPError(
                f"{method}: no answer from {who} (GET /llumnix/v1/instances shows whether it hangs)"
                + (f"; done on {', '.join(map(self.engines.name, answers))}." if answers else "."),
                HTTPStatus.GATEWAY_TIMEOUT,
            )
        if failures:
            raise next(iter(failures.values()))
        return answers

    async def _wait(self, calls: dict[EngineIndex, asyncio.Task[Any]], limit_s: float) -> None:
        """Until all have answered, but not longer than the limit, and for engines whose process is
        silent not longer than a short call may take."""
        waited_s = 0.0
        while waited_s < limit_s:
            patient = waited_s < SHORT_TIMEOUT_S
            pending = [
                call
                for e, call in calls.items()
                if not call.done() and (patient or e not in self.shared_state.silent)
            ]
            if not pending:
                return
            began_s = self.loop.time()
            await asyncio.wait(pending, timeout=min(LOOK_EVERY_S, limit_s - waited_s))
            waited_s += self.loop.time() - began_s

    async def _unload(self, adapter: int, engines: list[EngineIndex]) -> None:
        """Takes an adapter back that one engine could not load, unless it was loaded before."""
        if self.shared_state.has_adapter(adapter):
            return
        for engine_index in engines:
            try:
                async with asyncio.timeout(SHORT_TIMEOUT_S):
                    await self.call_engine(engine_index, "remove_lora", adapter)
            except Exception as error:  # noqa: BLE001 - vLLM's for a failed call
                name = self.engines.name(engine_index)
                logger.warning("Instance %s keeps adapter %d: %s", name, adapter, error)

    async def get_supported_tasks_async(self) -> Any:
        return await self._call_one("get_supported_tasks")

    async def save_sharded_state_async(
        self, path: str, pattern: str | None = None, max_size: int | None = None
    ) -> None:
        # All engines hold the same weights; two writing one folder would only get in their way.
        await self._call_one("save_sharded_state", path, pattern, max_size)

    async def list_loras_async(self) -> set[int]:
        return set.intersection(*map(set, await self.call_utility_all_async("list_loras")))

    async def add_lora_async(self, lora_request: LoRARequest) -> bool:
        if self.others is not None:
            await self.others.load_adapter(lora_request)
            return True
        return all(await self.call_utility_all_async("add_lora", lora_request))

    async def remove_lora_async(self, lora_id: int) -> bool:
        # An engine that never served the adapter has nothing to remove.
        return any(await self.call_utility_all_async("remove_lora", lora_id))

    async def pin_lora_async(self, lora_id: int) -> bool:
        return all(await self.call_utility_all_async("pin_lora", lora_id))

    async def collective_rpc_async(
        self,
        method: str | Callable[..., Any],
        timeout: float | None = None,
        args: tuple = (),
        kwargs: dict[str, Any] | None = None,
    ) -> list[Any]:
        """The answers of all workers of all engines, one after the other."""
        per_engine = await self.call_utility_all_async(
            "collective_rpc", method, timeout, args, kwargs
        )
        return [answer for answers in per_engine for answer in answers]


def _limit_s(method: str, args: tuple[Any, ...]) -> float:
    """How long an engine may take for a call."""
    if method == "collective_rpc" and isinstance(args[1], int | float):
        return min(SHORT_TIMEOUT_S + args[1], LONG_TIMEOUT_S)
    return LONG_TIMEOUT_S if method in LONG else SHORT_TIMEOUT_S
