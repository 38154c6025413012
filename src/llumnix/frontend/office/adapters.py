"""The LoRA adapters of a frontend that is not alone.

vLLM keeps the list of adapters, and the counter that numbers them, in the process that loads one.
Here the office has both. What a frontend loads or unloads goes there, and comes back as the list
that all frontends have.

vLLM internals relied on here (tests/house/test_vllm_frontends_contract.py fails when one changes):
- The application's state has `openai_serving_models`, with `lora_requests` by name.
- `load_lora_adapter` hands the very request to the engine client that it then puts there.
- `unload_lora_adapter` takes the name out there, tells no engine, and returns a string if it did.
"""

from argparse import Namespace
from collections.abc import Awaitable, Callable
from typing import Any

from vllm.lora.request import LoRARequest

from llumnix.frontend.office.adapter import Adapter


class Adapters:
    """Keeps one process's list the same as the office's. `unload` tells the office of one that is
    to go."""

    def __init__(self, unload: Callable[[str], Awaitable[None]]) -> None:
        self._unload = unload
        self._adapters: list[Adapter] = []
        self._models: Any = None

    def attach(self, models: Any) -> None:
        """vLLM's object that has the list; it is there once the application is."""
        if models is None or self._models is models:
            return
        self._models = models
        models.unload_lora_adapter = self._unloading(models.unload_lora_adapter)
        self.set(self._adapters)

    def set(self, adapters: list[Adapter]) -> None:
        """These are loaded, and no others."""
        self._adapters = adapters
        if self._models is None:
            return
        known: dict[str, LoRARequest] = self._models.lora_requests
        for name in known.keys() - {a.name for a in adapters}:
            del known[name]
        for each in adapters:
            known[each.name] = as_request(each)

    def _unloading(self, unload: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def unloading(request: Any, *args: Any, **more: Any) -> Any:
            answer = await unload(request, *args, **more)
            if isinstance(answer, str):
                await self._unload(request.lora_name)
            return answer

        return unloading


def as_request(adapter: Adapter) -> LoRARequest:
    """As vLLM has it."""
    request = LoRARequest(
        lora_name=adapter.name,
        lora_int_id=adapter.number,
        lora_path=adapter.path,
        load_inplace=adapter.in_place,
        is_3d_lora_weight=adapter.is_3d,
    )
    request.base_model_name = adapter.base_model
    return request


def of_request(request: LoRARequest) -> Adapter:
    """The same for the way to the office, which gives it its number."""
    return Adapter(
        name=request.lora_name,
        number=0,
        path=request.lora_path,
        base_model=request.base_model_name,
        in_place=request.load_inplace,
        is_3d=request.is_3d_lora_weight,
    )


def of_command_line(args: Namespace) -> list[Adapter]:
    """Those of `--lora-modules`."""
    served = args.served_model_name or [args.model]
    return [
        Adapter(
            name=module.name,
            number=0,
            path=module.path,
            base_model=module.base_model_name if module.base_model_name in served else None,
            is_3d=module.is_3d_lora_weight,
        )
        for module in args.lora_modules or []
    ]
