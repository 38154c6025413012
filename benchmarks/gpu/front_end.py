"""What llumnix's front end adds over bare `vllm serve` at many requests a second.

The shape of Llama-3.2-1B with dummy weights, whose steps take some 2 ms, so that the front end and
not the GPU is what there is to see; one instance of each on the same GPU, in turns. With 32 tokens
a request 200 requests a second are 6,400 tokens, and as many chunks, a second.

    python benchmarks/gpu/front_end.py [flags of overhead.py]
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import overhead
from common import ROOT, with_settings

SETTINGS = {
    "model": "llama-1b",
    "rounds": "3",
    "out": str(ROOT / "benchmarks/results/gpu/front_end.json"),
}
FLAGS = ["--max-model-len", "2048", "--kv-cache-memory-bytes", "4294967296"]
FLAGS += ["--gpu-memory-utilization", "0.2"]
LOADS = (
    overhead.one_stream(60),
    overhead.poisson(50, 300),
    overhead.poisson(200, 1200),
    overhead.poisson(300, 1800),
    overhead.closed(256, 2400),
)


def main() -> None:
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    overhead.main(with_settings(SETTINGS, FLAGS, sys.argv[1:]), LOADS)


if __name__ == "__main__":
    main()
