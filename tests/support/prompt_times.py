"""What an engine has seen of its prompts."""

from llumnix.core.queue_rules import PromptTimer


def teach(timer: PromptTimer, token_s: float) -> None:
    """Has it see steps that tell of so many seconds a token."""
    for tokens in (10_000, 20_000, 30_000, 40_000):
        timer.record(tokens, 0.1 + token_s * tokens)
