"""What llumnix relies on in vLLM's tracing: frontend/streams/spans.py."""

import ast
import inspect
import textwrap

import pytest

pytest.importorskip("vllm")

from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from vllm.config import ObservabilityConfig
from vllm.tracing import extract_trace_context, init_tracer
from vllm.tracing.otel import init_otel_tracer
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.output_processor import OutputProcessor
from vllm.v1.metrics.stats import RequestStateStats

from llumnix.frontend.streams.spans import exporters


def calls(function: object) -> list[str]:
    """The calls in a function, as source."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))  # type: ignore[arg-type]
    return [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Call)]


def test_the_flag_makes_the_global_tracer_provider() -> None:
    assert ObservabilityConfig().otlp_traces_endpoint is None
    assert "init_tracer('vllm.llm_engine', tracing_endpoint)" in calls(AsyncLLM.__init__)
    assert "set_tracer_provider" in inspect.getsource(inspect.getmodule(extract_trace_context))  # type: ignore[arg-type]
    assert callable(init_tracer)


def test_the_processor_traces_each_sequence_that_has_ended() -> None:
    traced = "self.do_tracing(engine_core_output, req_state, iteration_stats)"
    assert traced in calls(OutputProcessor.process_outputs)
    assert list(inspect.signature(OutputProcessor.do_tracing).parameters) == [
        "self", "engine_core_output", "req_state", "iteration_stats",
    ]  # fmt: skip
    source = inspect.getsource(OutputProcessor.do_tracing)
    assert "extract_trace_context(engine_core_output.trace_headers)" in source
    assert "metrics.scheduled_ts - metrics.queued_ts" in source
    assert "metrics = req_state.stats" in source
    assert {"queued_ts", "scheduled_ts"} <= set(RequestStateStats.__dataclass_fields__)


def test_the_headers_come_back_with_outputs() -> None:
    assert "trace_headers" in EngineCoreRequest.__struct_fields__
    assert "trace_headers" in EngineCoreOutput.__struct_fields__
    source = inspect.getsource(Scheduler.update_from_output)
    assert "trace_headers=request.trace_headers" in source


def test_a_provider_is_shut_down_at_exit_and_its_exporters_can_be_found() -> None:
    assert "atexit.register(trace_provider.shutdown)" in calls(init_otel_tracer)
    assert "atexit.register(self.shutdown)" in calls(TracerProvider.__init__)
    provider, exporter = TracerProvider(shutdown_on_exit=False), InMemorySpanExporter()
    provider.add_span_processor(BatchSpanProcessor(exporter))
    assert exporters(provider) == [exporter]
    provider.shutdown()
