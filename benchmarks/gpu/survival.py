"""How long the streams of a killed instance stand still on GPUs.

Two instances of an 8B shape with dummy weights, 16 streams of 4,096 tokens on each; an instance is
killed once a minute. On a host with one GPU both share it: CUDA_VISIBLE_DEVICES=0,0.

    python benchmarks/gpu/survival.py [flags of benchmarks/survival.py]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import survival
from common import ROOT, with_settings

SETTINGS = {
    "model": "llama-8b",
    "minutes": "5",
    "every": "60",
    "at-once": "32",
    "tokens": "4096",
    "kinds": "greedy,seeded",
    "out": str(ROOT / "benchmarks/results/gpu/survival.json"),
}
FLAGS = ["--max-model-len", "8192", "--max-num-seqs", "64"]
FLAGS += ["--kv-cache-memory-bytes", "34359738368", "--gpu-memory-utilization", "0.4"]


def main() -> None:
    survival.main(["--loose", *with_settings(SETTINGS, FLAGS, sys.argv[1:])])


if __name__ == "__main__":
    main()
