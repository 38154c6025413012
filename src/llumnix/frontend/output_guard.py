"""Keeps a bad output of one request from ending vLLM's output handler, and with it every request.

vLLM internals relied on here (tests/house/test_vllm_contract.py fails when one changes):
- `AsyncLLM`'s output handler looks `output_processor.process_outputs` up at every call, and lets an
  exception from it fail all requests.
- `process_outputs` goes through the outputs once, in order, and passes each on to its request's
  consumer. It returns the requests that ended by a stop string, which their engines must abort.
"""

from collections.abc import Callable
from typing import Any

from vllm.v1.engine import EngineCoreOutput
from vllm.v1.engine.output_processor import OutputProcessor, OutputProcessorOutput

GiveUp = Callable[[str, Exception], None]


def guard(processor: OutputProcessor, give_up: GiveUp) -> None:
    """From now on, an exception over one output gives up that output's request. The others go
    on."""
    process = processor.process_outputs

    def process_outputs(
        outputs: list[EngineCoreOutput], *args: Any, **more: Any
    ) -> OutputProcessorOutput:
        stopped: list[str] = []
        while True:
            walk = iter(outputs)
            try:
                processed = process(walk, *args, **more)  # type: ignore[arg-type]
            except Exception as error:  # noqa: BLE001 - whatever an output may do to vLLM
                rest = list(walk)
                *before, culprit = outputs[: len(outputs) - len(rest)]
                give_up(culprit.request_id, error)
                stopped += [o.request_id for o in before if _stopped(processor, o)]
                outputs = rest
                continue
            processed.reqs_to_abort[:0] = stopped
            return processed

    processor.process_outputs = process_outputs  # type: ignore[method-assign]


def _stopped(processor: OutputProcessor, output: EngineCoreOutput) -> bool:
    """Whether the output's request has ended here, and still runs in its engine."""
    return output.finish_reason is None and output.request_id not in processor.request_states
