"""What keeps long answers from preempting one another on a GPU: vLLM's watermark, or slices. All
systems are up at once on the same GPU, with one instance each, and take turns.

The load is that of benchmarks/long_answers.py, and the shape that of the model of the test from
which it comes, Qwen2.5-7B.

    python benchmarks/gpu/slices.py [flags of live.py]
"""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from serving import FLAGS, for_live

import live
from common import ROOT
from long_answers import KV_TOKENS, MAX_NUM_SEQS, NAME, RATE_PER_S, REQUESTS, write_trace

OURS = {
    "policies": "llumnix-own-queue,watermark-0.02,watermark-0.05,scls",
    "instances": "1",
    "model": "qwen-7b",
    "kv-tokens": str(KV_TOKENS),
    "max-num-seqs": str(MAX_NUM_SEQS),
    "drain-limit-s": "400",
    "seeds": "1",
    "out": str(ROOT / "benchmarks/results/gpu/slices.json"),
}
MORE_FLAGS = ["--no-enable-prefix-caching"]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / NAME
        write_trace(trace)
        load = f"{trace}:{RATE_PER_S}:{REQUESTS}:1"
        live.main(for_live(OURS, (load,), sys.argv[1:], [*FLAGS, *MORE_FLAGS]))


if __name__ == "__main__":
    main()
