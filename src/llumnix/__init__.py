"""llumnix: schedules running LLM requests over several vLLM instances."""

__version__ = "0.1.0"
