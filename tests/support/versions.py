"""What tests expect of each version of vLLM that llumnix goes with."""

from typing import TypeVar

from llumnix.vllm_seam import V0_33, VERSION

T = TypeVar("T")


def by_version(v0_32: T, v0_33: T) -> T:
    """Of the installed vLLM."""
    return v0_32 if VERSION < V0_33 else v0_33
