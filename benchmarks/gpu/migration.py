"""What a migration costs on two GPUs joined by NVLink, and how long a drain takes.

The shape of Llama-7B with dummy weights, 0.5 MB of KV a token.

    python benchmarks/gpu/migration.py [flags of benchmarks/migration.py]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import migration
from common import ROOT, with_settings

SETTINGS = {
    "shape": "llama-7b",
    "lengths": "256,1024,4096,8192,16384,32000",
    "hops": "10",
    "background": "16",
    "window-s": "2",
    "drain-tokens": "4000",
    "out": str(ROOT / "benchmarks/results/gpu/migration.json"),
}
FLAGS = ["--gpu-memory-utilization", "0.85", "--max-model-len", "36000"]


def main() -> None:
    migration.main(with_settings(SETTINGS, FLAGS, sys.argv[1:]))


if __name__ == "__main__":
    main()
