"""What Ray, and whoever looks at the process list, is told of the command line; where a run on one
host listens."""

import os
import subprocess
import sys

import pytest

from llumnix.cluster import ray_runtime


def test_no_flags_value_is_in_the_job_that_ray_records() -> None:
    argv = [
        "serve",
        "a/model",
        "--api-key",
        "sk-1",
        "sk-2",
        "--hf-token=hf-1",
        "--port",
        "8000",
        "-O3",
    ]
    code = (
        "import sys; from llumnix.cluster import ray_runtime;"
        "ray_runtime.hide_arguments(sys.argv[1:]);"
        "from ray._private.utils import get_entrypoint_name; print(get_entrypoint_name())"
    )
    run = [sys.executable, "-c", code, *argv]
    told = subprocess.run(run, capture_output=True, text=True, check=True).stdout.strip()
    told = told.replace(' ""', "").strip('"')  # What is left of the longer line is NULs.
    assert told == "llumnix serve a/model --api-key --hf-token --port -O3"


def test_a_run_on_one_host_is_at_no_address_of_the_network(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "environ", {**os.environ, "VLLM_HOST_IP": "192.0.2.2"})
    ray_runtime.settle(local=False)
    assert os.environ["VLLM_HOST_IP"] == "192.0.2.2"
    ray_runtime.settle(local=True)
    assert os.environ["VLLM_HOST_IP"] == "127.0.0.1"


@pytest.mark.parametrize("mode", ["disabled", "token"])
def test_a_cluster_that_lets_in_everybody_is_warned_of(mode: str) -> None:
    code = (
        "from llumnix.cluster import ray_runtime; print(ray_runtime.warning_without_token('h:1'))"
    )
    environment = {**os.environ, "RAY_AUTH_MODE": mode}
    run = [sys.executable, "-c", code]
    told = subprocess.run(run, env=environment, capture_output=True, text=True, check=True).stdout
    assert (told == "None\n") is (mode == "token")
    assert ("start it, and llumnix, with RAY_AUTH_MODE=token" in told) is (mode == "disabled")
