"""Runs vllm-router without its console script, which wants packages that serving does not need.

pip install --no-deps vllm-router==0.1.17
python benchmarks/router.py --worker-urls http://127.0.0.1:8001 ... --policy cache_aware
"""

import argparse

from vllm_router.router import Router
from vllm_router.router_args import RouterArgs


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    RouterArgs.add_cli_args(parser, use_router_prefix=False)
    Router.from_args(RouterArgs.from_cli_args(parser.parse_args(), use_router_prefix=False)).start()


if __name__ == "__main__":
    main()
