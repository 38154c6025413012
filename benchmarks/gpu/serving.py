"""llumnix against vLLM's own data-parallel balancing and a cache-aware router, on the same GPUs.

The shape of Llama-3.1-8B with dummy weights on each of four GPUs, the KV memory limited to twice
the paper's tokens. All systems are up at once; one has the load, the others stand still. Needs some
65 GiB a GPU, and vllm-router (benchmarks/router.py). Four such GPUs generate up to 15,000 tokens a
second, which one process that speaks HTTP could not send one by one: after the first, all systems
send four at a time.

    python benchmarks/gpu/serving.py [--load TRACE:RATE:REQUESTS:SCALE] [flags of live.py]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import live
from common import ROOT, with_settings

SETTINGS = {
    "policies": "llumnix,vllm-dp,vllm-router",
    "instances": "4",
    "model": "llama-8b",
    "kv-tokens": "27232",
    "block-size": "16",
    "max-num-seqs": "256",
    "max-num-batched-tokens": "2048",
    "drain-limit-s": "30",
    "seeds": "3",
    "out": str(ROOT / "benchmarks/results/gpu/serving_4.json"),
}
LOADS = ("mooncake-conversation:16:400:0.25", "sharegpt:28:480:1", "azure-conv:28:560:1")
FLAGS = ["--gpu-memory-utilization", "0.25", "--stream-interval", "4"]
"""The former is what one engine asks for; vLLM refuses to start if that is not free. Its KV memory
is given."""


def for_live(
    ours: dict[str, str], loads: tuple[str, ...], given: list[str], flags: list[str] = FLAGS
) -> list[str]:
    """live.py's arguments: those given, else `ours`, else `SETTINGS`; `loads` if none is given, and
    `flags` of the servers' likewise."""
    served = [] if "--load" in given else [x for load in loads for x in ("--load", load)]
    return ["--together", *served, *with_settings(SETTINGS | ours, flags, given)]


def main() -> None:
    live.main(for_live({}, LOADS, sys.argv[1:]))


if __name__ == "__main__":
    main()
