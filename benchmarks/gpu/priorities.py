"""What urgent requests gain beside others, and what the others lose: llumnix against llumnix-base,
which is the same with all requests alike, both up at once on the same two GPUs.

The shape of Llama-3.1-8B with dummy weights, twice the paper's KV memory; M-M in bursts (CV 4), one
request in ten is urgent.

    python benchmarks/gpu/priorities.py [flags of live.py]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from serving import for_live

import live
from common import ROOT

OURS = {
    "policies": "llumnix-base,llumnix",
    "instances": "2",
    "high": "0.1",
    "cv": "4",
    "out": str(ROOT / "benchmarks/results/gpu/priorities.json"),
}


def main() -> None:
    live.main(for_live(OURS, ("M-M:16:480:1",), sys.argv[1:]))


if __name__ == "__main__":
    main()
