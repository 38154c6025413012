"""The load of the watermark's own test (vLLM's pull request 44594), for GPUs and the simulator.

Prompts of 1,000 tokens and answers of 5,000, each up to a fifth more or less, 128 requests at a
time, and memory for 299,584 tokens: two thirds of what 128 of them hold on average. There, 128
clients asked again and again; here all requests come in the first seconds, and `--max-num-seqs`
bounds how many run.
"""

import json
import random
from pathlib import Path

NAME = "long-answers.jsonl"
REQUESTS, RATE_PER_S = 360, 64.0
KV_TOKENS, MAX_NUM_SEQS = 299584, 128
PROMPT, ANSWER = (800, 1200), (4000, 6000)
"""Tokens, at least and at most."""


def write_trace(path: Path) -> None:
    """Four times as many requests as a run takes, of which its seed picks."""
    dice = random.Random(0)
    rows = [
        {
            "arrival_s": number / RATE_PER_S,
            "input_tokens": dice.randint(*PROMPT),
            "output_tokens": dice.randint(*ANSWER),
        }
        for number in range(4 * REQUESTS)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
