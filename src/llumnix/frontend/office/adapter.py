"""A LoRA adapter, as processes tell each other of it."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """A LoRA adapter, as vLLM's `LoRARequest` has it."""

    name: str
    number: int  # the same for all processes, which tell adapters apart by it; 0: to be given
    path: str
    base_model: str | None = None
    in_place: bool = False
    is_3d: bool = False
