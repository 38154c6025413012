"""An output that vLLM cannot process ends its own request."""

from typing import Any

from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine import EngineCoreOutput, FinishReason
from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector

from llumnix.frontend.output_guard import guard
from support.frontend import request


class Consumers:
    """vLLM's own processor with a consumer for each request, and who was given up."""

    def __init__(self, *names: str) -> None:
        self.processor = OutputProcessor(None, log_stats=False)
        self.queues: dict[str, RequestOutputCollector] = {}
        self.given_up: list[str] = []
        guard(self.processor, self._give_up)
        for name in names:
            one = request(name, external_req_id=name)
            one.sampling_params.detokenize = False
            queue = RequestOutputCollector(RequestOutputKind.CUMULATIVE, name)
            self.processor.add_request(one, None, queue=queue)
            self.queues[name] = queue

    def _give_up(self, name: str, error: Exception) -> None:
        self.given_up.append(name)
        self.processor.request_states.pop(name, None)

    def heard(self, name: str) -> list[int]:
        output: Any = self.queues[name].output
        return [] if output is None else list(output.outputs[0].token_ids)


def break_at(consumers: Consumers, name: str) -> None:
    state = consumers.processor.request_states[name]

    def odd(*_: Any) -> Any:
        raise OverflowError("no such token")

    state.detokenizer.update = odd  # type: ignore[union-attr,method-assign]


def test_an_output_that_raises_gives_up_its_request_alone() -> None:
    consumers = Consumers("a", "bad", "b", "worse", "c")
    break_at(consumers, "bad")
    break_at(consumers, "worse")
    names = ["a", "bad", "b", "worse", "c", "bad"]
    outputs = [EngineCoreOutput(name, [number]) for number, name in enumerate(names)]
    consumers.processor.process_outputs(outputs, 0.0, None)
    assert consumers.given_up == ["bad", "worse"]
    assert [consumers.heard(n) for n in ("a", "b", "c")] == [[0], [2], [4]]


def test_what_stopped_before_the_bad_output_is_still_aborted_at_its_engine() -> None:
    consumers = Consumers("stops", "ends", "runs", "bad")
    break_at(consumers, "bad")
    state = consumers.processor.request_states["stops"]
    state.detokenizer.update = lambda *_: "stop"  # type: ignore[union-attr,method-assign]
    outputs = [
        EngineCoreOutput("stops", [1]),
        EngineCoreOutput("ends", [1], finish_reason=FinishReason.LENGTH),
        EngineCoreOutput("runs", [1]),
        EngineCoreOutput("bad", [1]),
    ]
    processed = consumers.processor.process_outputs(outputs, 0.0, None)
    assert processed.reqs_to_abort == ["stops"]
    assert consumers.given_up == ["bad"]
