"""What keeps long answers from preempting one another on a GPU: vLLM's watermark, or slices. All
systems are up at once on the same GPU, with one instance each, and take turns.

The load is the watermark's own test (vLLM's pull request 44594): prompts of 1,000 tokens, answers
of 5,000, each up to a fifth more or less, 128 requests at a time, and memory for 299,584 tokens,
two thirds of what 128 of them hold on average. The shape is that of its model, Qwen2.5-7B. There,
128 clients asked again and again; here all requests come in the first seconds, and
`--max-num-seqs` bounds how many run.

    python benchmarks/gpu/slices.py [flags of live.py]
"""

import json
import random
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from serving import FLAGS, for_live

import live
from common import ROOT

OURS = {
    "policies": "llumnix-own-queue,watermark-0.02,watermark-0.05,scls",
    "instances": "1",
    "model": "qwen-7b",
    "kv-tokens": "299584",
    "max-num-seqs": "128",
    "drain-limit-s": "400",
    "seeds": "1",
    "out": str(ROOT / "benchmarks/results/gpu/slices.json"),
}
MORE_FLAGS = ["--no-enable-prefix-caching"]
REQUESTS, RATE_PER_S = 360, 64.0
PROMPT, ANSWER = (800, 1200), (4000, 6000)
"""Tokens, at least and at most."""


def write_trace(path: Path) -> None:
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


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "long-answers.jsonl"
        write_trace(trace)
        load = f"{trace}:{RATE_PER_S}:{REQUESTS}:1"
        live.main(for_live(OURS, (load,), sys.argv[1:], [*FLAGS, *MORE_FLAGS]))


if __name__ == "__main__":
    main()
