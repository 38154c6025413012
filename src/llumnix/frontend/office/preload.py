"""Imported once, by the process from which all frontends of a deployment are forked.

Imports take ten seconds of a core, so that a frontend that replaces another would be late. And
what was imported before a fork is shared memory.

Ray is left out: a frontend needs none of it, and vLLM does without a package that is not there.
"""

import contextlib
import gc
import importlib
import sys

MODULES = (
    "llumnix.frontend.office.process",
    "vllm.entrypoints.generate.api_router",
    "vllm.entrypoints.launchers.api_server.app_state",
    "vllm.entrypoints.launchers.app",
    "vllm.entrypoints.openai.chat_completion.serving",
    "vllm.entrypoints.openai.completion.serving",
    "vllm.entrypoints.openai.responses.serving",
    "vllm.entrypoints.pooling.factories",
    "vllm.entrypoints.speech_to_text.factories",
    "vllm.v1.engine.async_llm",
)


def load() -> None:
    """Imports all that a frontend will need."""
    sys.modules["ray"] = None  # type: ignore[assignment]
    for name in MODULES:
        # Versions of vLLM differ in them; a frontend imports what it needs all the same.
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module(name)
    # No search for garbage looks at these again, or writes to the memory that they share.
    gc.collect()
    gc.freeze()


load()
