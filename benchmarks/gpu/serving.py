"""llumnix against vLLM's own data-parallel balancing and a cache-aware router, on the same GPUs.

The shape of Llama-3.1-8B with dummy weights on each of two GPUs, the KV memory limited to twice the
paper's tokens. All systems are up at once; one has the load, the others stand still. Needs some
65 GiB a GPU, and vllm-router (benchmarks/router.py).

    python benchmarks/gpu/serving.py [--load TRACE:RATE:REQUESTS:SCALE] [flags of live.py]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import live
from common import ROOT

SETTINGS = {
    "--policies": "llumnix,vllm-dp,vllm-router",
    "--instances": "2",
    "--model": "llama-8b",
    "--kv-tokens": "27232",
    "--block-size": "16",
    "--max-num-seqs": "256",
    "--max-num-batched-tokens": "2048",
    "--drain-limit-s": "30",
    "--seeds": "3",
    "--out": str(ROOT / "benchmarks/results/gpu/serving.json"),
}
LOADS = ("M-M:18:480:1", "mooncake-conversation:8:240:0.25")
SHARE_OF_GPU = "0.25"
"""What one engine asks for; vLLM refuses to start if that is not free. Its KV memory is given."""


def main() -> None:
    given = sys.argv[1:]
    settings = [x for pair in SETTINGS.items() for x in pair]
    loads = [] if "--load" in given else [x for load in LOADS for x in ("--load", load)]
    more = [] if "--" in given else ["--", "--gpu-memory-utilization", SHARE_OF_GPU]
    live.main([*settings, "--together", *loads, *given, *more])


if __name__ == "__main__":
    main()
