"""The state that all engines share, and that a new one must be brought into: paused, asleep,
adapters loaded.

vLLM internals relied on here (tests/house/test_vllm_contract.py fails when one changes): the
engine core's utility calls `pause_scheduler`, `resume_scheduler`, `sleep`,
`release_kv_cache_memory`, `wake_up` (which says whether all is awake, and if so has resumed the
scheduler), `add_lora`, `remove_lora`, `pin_lora`. Since 0.33 a user's pause is `pause_generation`,
after which engines refuse new requests. An engine keeps `max_cpu_loras` adapters: those that are
pinned, and the last ones. `unload_lora_adapter` of the application's `openai_serving_models` takes
a name out, tells no engine, and returns a string if it did. An engine that has slept at level 1 has
its weights again when it wakes, and none after level 2.
"""

from dataclasses import dataclass, field
from typing import Any

from llumnix.core.types import EngineIndex

PAUSES = ("pause_scheduler", "pause_generation")
SLEEPS = ("sleep", "release_kv_cache_memory")
STOPS = frozenset({*PAUSES, *SLEEPS})
HALTS = STOPS | {"resume_scheduler", "wake_up"}
"""Calls that have engines stand still, or go on."""

CALLS_MAX = 32
"""How many calls that put engines to sleep, or wake parts of them, are kept."""


@dataclass(slots=True, eq=False)
class SharedCall:
    """One call to all engines."""

    method: str
    args: tuple[Any, ...]
    made: bool = False  # whether engines have answered
    came: dict[EngineIndex, Any] = field(default_factory=dict)
    """What engines answered that came before it was made."""


class EngineState:
    """Follows the calls to all engines. `next` brings a new engine into the same state.

    Calls overlap: a pause may wait for requests for minutes, and is over once engines are told to
    go on, whenever it is answered. So calls that have engines stand still, or go on, are kept in
    the order in which they begin, and a new engine gets those too that are under way.

    `adapters_max`: how many adapters an engine keeps; None: no limit is known."""

    def __init__(self, adapters_max: int | None = None) -> None:
        self._adapters_max = adapters_max
        self._halting: list[SharedCall] = []  # what made engines stand still
        self._loading: list[SharedCall] = []  # adapters, not yet on all engines
        self._adapters: dict[int, SharedCall] = {}
        self._pinned: dict[int, SharedCall] = {}
        self.joined: set[EngineIndex] = set()  # engines that were brought into the state
        self.silent: set[EngineIndex] = set()  # engines whose process no longer reports

    @property
    def paused(self) -> bool:
        """Whether engines stand still on purpose."""
        return any(call.made and call.method in STOPS for call in self._halting)

    def note_silent(self, engine_index: EngineIndex, silent: bool) -> None:
        """An engine's process no longer reports, or does so again."""
        (self.silent.add if silent else self.silent.discard)(engine_index)

    def forget(self, engine_index: EngineIndex) -> None:
        """Drops an engine that is gone."""
        self.joined.discard(engine_index)
        self.silent.discard(engine_index)

    def has_adapter(self, adapter: int) -> bool:
        """Whether the adapter was loaded on all engines."""
        return adapter in self._adapters

    def unloaded(self, adapter: int) -> None:
        """No request can ask for the adapter any more, so that new engines go without."""
        self._adapters.pop(adapter, None)
        self._pinned.pop(adapter, None)

    def follow(self, models: Any) -> None:
        """Takes in each adapter that vLLM's list of models gives up from now on. `models`: the
        application's `openai_serving_models`, or None."""
        if models is None:
            return
        unload = models.unload_lora_adapter

        async def unloading(request: Any, *args: Any, **more: Any) -> Any:
            answer = await unload(request, *args, **more)  # It may wait until the adapter is there.
            loaded = [call.args[0] for call in self._adapters.values()]
            for adapter in loaded if isinstance(answer, str) else []:
                if adapter.lora_name == request.lora_name:
                    self.unloaded(adapter.lora_int_id)
            return answer

        models.unload_lora_adapter = unloading

    # -- a new engine

    def calls(self) -> list[SharedCall]:
        """The calls that a new engine needs, in order."""
        loads = [*self._adapters.values(), *self._loading]
        return [*loads, *self._pinned.values(), *self._halting]

    def next(self, got: list[SharedCall]) -> SharedCall | None:
        """The next call that a new engine needs; None once it is in the state of the others. `got`:
        those that it got before, kept here."""
        halts = [call for call in got if call.method in HALTS]
        if any(call not in self._halting for call in halts):  # Undone meanwhile.
            got[:] = [call for call in got if call not in halts]
            if any(call.method in SLEEPS for call in halts):
                return SharedCall("wake_up", (None,))
            return SharedCall("resume_scheduler", ())
        call = next((call for call in self.calls() if call not in got), None)
        if call is not None:
            got.append(call)
        return call

    # -- calls to all

    def begin(self, method: str, args: tuple[Any, ...]) -> SharedCall:
        """All engines that have joined are called now; `end` is to follow."""
        call = SharedCall(method, args)
        if method == "add_lora":
            self._loading.append(call)
        elif method in HALTS:
            self._halting.append(call)
        return call

    def end(self, call: SharedCall, results: list[Any] | None) -> None:
        """The call is over. `results`: what the engines that carried it out answered; None if none
        did, or it is taken back."""
        if call in self._loading:
            self._loading.remove(call)
        if results is None:
            self._halting = [each for each in self._halting if each is not call]
        else:
            self._take(call, results)
        while self._halting and self._halting[0].made and self._halting[0].method not in STOPS:
            del self._halting[0]  # What it undid did not happen after all.

    def of_newcomers(self, call: SharedCall, *, failed: bool) -> list[Any] | None:
        """What engines answered that came meanwhile, for `end`, if no other engine has made the
        call and it holds all the same. `failed`: whether some of the others live."""
        came = [answer for engine, answer in call.came.items() if engine in self.joined]
        holds = call in self._halting and (call.method in STOPS or not failed)
        return came if came and holds else None

    def _take(self, call: SharedCall, results: list[Any]) -> None:
        call.made = True
        match call.method:
            case "add_lora":
                self._adapters.pop(call.args[0].lora_int_id, None)
                self._adapters[call.args[0].lora_int_id] = call
                self._drop_oldest()
            case "pin_lora":
                self._pinned[call.args[0]] = call
            case "remove_lora":
                self.unloaded(call.args[0])
            case _ if call.method in HALTS:
                self._settle(call, results)

    def _drop_oldest(self) -> None:
        """Drops an adapter that engines have had to give up for the last one."""
        loose = [adapter for adapter in self._adapters if adapter not in self._pinned]
        if self._adapters_max is not None and loose and len(self._adapters) > self._adapters_max:
            del self._adapters[loose[0]]

    def _settle(self, call: SharedCall, results: list[Any]) -> None:
        """Drops what no longer holds, and this call if it changes nothing."""
        if call not in self._halting:  # Engines were told to go on meanwhile.
            if call.method not in SLEEPS:
                return
            self._halting.append(call)  # They fell asleep all the same.
        at = self._halting.index(call)
        before, later = self._halting[:at], self._halting[at + 1 :]
        keep = True
        match call.method:
            case "pause_scheduler" | "pause_generation":
                # A second pause only changes what is done with the requests that run now.
                before = [each for each in before if each.method != call.method]
            case "resume_scheduler":
                before = [each for each in before if each.method not in PAUSES]
                keep = bool(before)  # The engines sleep, and were told to go on all the same.
            case "wake_up":
                before = [] if results and all(results) else before
                keep = bool(before)
        same = call.method, call.args
        before = [each for each in before if (each.method, each.args) != same]
        if len(before) >= CALLS_MAX:
            del before[1]  # Not the first, which put the engines to sleep.
        self._halting = [*before, *([call] if keep else []), *later]
