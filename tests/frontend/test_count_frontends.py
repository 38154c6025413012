"""How many processes speak HTTP, and what several cannot do."""

import os

import pytest

pytest.importorskip("vllm")

from vllm.lora.resolver import LoRAResolverRegistry
from vllm.platforms import current_platform

from llumnix.errors import UsageError
from llumnix.frontend.checks import CORES_EACH, count_frontends


def count(wanted: int | None, instances: int = 4) -> int:
    return count_frontends(wanted, instances, say=lambda _: None)


def gpus(monkeypatch: pytest.MonkeyPatch, cores: int) -> None:
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))


def test_on_a_cpu_host_one_process_speaks_http_unless_more_are_asked_for() -> None:
    assert count(None) == 1
    assert count(3) == 3


@pytest.mark.parametrize(
    ("cores", "expected"), [(2, 1), (CORES_EACH, 1), (2 * CORES_EACH, 2), (64, 4)]
)
def test_on_gpus_there_is_one_an_instance_as_far_as_there_are_cores(
    monkeypatch: pytest.MonkeyPatch, cores: int, expected: int
) -> None:
    gpus(monkeypatch, cores)
    assert count(None) == expected


@pytest.mark.parametrize("wanted", [0, -1])
def test_none_at_all_is_refused(wanted: int) -> None:
    with pytest.raises(UsageError, match="must be 1 or more"):
        count(wanted)


def test_stored_responses_keep_it_to_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ENABLE_RESPONSES_API_STORE", "1")
    assert count(1) == 1
    with pytest.raises(UsageError, match=r"API_STORE .*; use --api-server-count 1"):
        count(2)
    gpus(monkeypatch, 64)
    said: list[str] = []
    assert count_frontends(None, 4, said.append) == 1
    assert "VLLM_ENABLE_RESPONSES_API_STORE" in said[0]


def test_so_do_adapters_that_a_plugin_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LoRAResolverRegistry, "resolvers", {"hub": object()})
    with pytest.raises(UsageError, match="resolver plugin"):
        count(2)
