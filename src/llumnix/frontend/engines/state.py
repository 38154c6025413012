"""The state that all engines share, and that a new one must be brought into: paused, asleep,
adapters loaded.

vLLM internals relied on here (tests/house/test_vllm_contract.py fails when one changes): the
engine core's utility calls `pause_scheduler`, `resume_scheduler`, `sleep`,
`release_kv_cache_memory`, `wake_up` (which says whether all is awake, and if so has resumed the
scheduler), `add_lora`, `remove_lora`, `pin_lora`. Since 0.33 a user's pause is `pause_generation`,
after which engines refuse new requests.
"""

from typing import Any

from vllm.lora.request import LoRARequest

from llumnix.core.types import EngineIndex

Call = tuple[str, tuple[Any, ...]]
PAUSES = ("pause_scheduler", "pause_generation")

CALLS_MAX = 32
"""How many calls that put engines to sleep, or wake parts of them, are kept."""


class EngineState:
    """Follows the calls that all engines got. `calls` brings a new engine into the same state."""

    def __init__(self) -> None:
        self._halting: list[Call] = []  # what made engines stand still
        self._adapters: dict[int, LoRARequest] = {}
        self._pinned: set[int] = set()
        self.version = 0  # counts changes of the state
        self.joined: set[EngineIndex] = set()  # engines that were brought into the state
        self.silent: set[EngineIndex] = set()  # engines whose process no longer reports

    @property
    def paused(self) -> bool:
        """Whether engines stand still on purpose."""
        return bool(self._halting)

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

    def calls(self) -> list[Call]:
        """The calls that a new engine needs, in order."""
        loads = [("add_lora", (request,)) for request in self._adapters.values()]
        pins = [("pin_lora", (adapter,)) for adapter in self._pinned]
        return [*loads, *pins, *self._halting]

    def note(self, method: str, args: tuple[Any, ...], results: list[Any]) -> None:
        """Takes in a call and what the engines that carried it out answered."""
        before = self.calls()
        call = (method, args)
        match method:
            case "pause_scheduler" | "pause_generation":
                # A second pause only changes what is done with the requests that run now.
                self._halting = [c for c in self._halting if c[0] != method]
                self._halt(call)
            case "resume_scheduler":
                self._halting = [c for c in self._halting if c[0] not in PAUSES]
                if self._halting:  # The engines sleep, and were told to go on all the same.
                    self._halt(call)
            case "sleep" | "release_kv_cache_memory":
                self._halt(call)
            case "wake_up" if results and all(results):
                self._halting.clear()
            case "wake_up" if self._halting:
                self._halt(call)
            case "add_lora":
                self._adapters[args[0].lora_int_id] = args[0]
            case "pin_lora":
                self._pinned.add(args[0])
            case "remove_lora":
                self._adapters.pop(args[0], None)
                self._pinned.discard(args[0])
        self.version += before != self.calls()

    def _halt(self, call: Call) -> None:
        """Appends the call, in place of the same one before."""
        others = [c for c in self._halting if c != call]
        if len(others) == CALLS_MAX:
            del others[1]  # Not the first, which put the engines to sleep.
        self._halting = [*others, call]
