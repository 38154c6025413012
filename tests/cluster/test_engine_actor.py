"""What an engine's actor brings into its process before vLLM comes in."""

import os
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llumnix.cluster import ray_runtime
from llumnix.cluster.supervision.engine_actor import EngineActor, pack
from llumnix.core.settings import PrioritySettings
from llumnix.core.types import EngineIndex, InstanceId

instance = pytest.importorskip("llumnix.engine.instance")

from llumnix import vllm_seam  # noqa: E402
from llumnix.core.limits import MigrationLimits  # noqa: E402
from llumnix.core.priorities import Priorities  # noqa: E402
from llumnix.engine.kv.agent import TransferOptions  # noqa: E402
from llumnix.engine.launch import InstanceConfig, LlumletConfig  # noqa: E402
from llumnix.engine.migration.host import LlumletHost  # noqa: E402
from llumnix.errors import UsageError  # noqa: E402
from llumnix.sockets import SocketKeys  # noqa: E402

LLUMLET = LlumletConfig(
    peers="tcp://{host}:0", agents="tcp:{host}:0", key=b"agents", limits=MigrationLimits(),
    transfer=TransferOptions(), priorities=Priorities(PrioritySettings()), min_stay=10.0,
    looks_at_caches=False,
)  # fmt: skip
CONFIG = InstanceConfig(
    instance=InstanceId("i0"), engine_index=EngineIndex(0), slot=0, slots=1, controller="",
    llumlet=LLUMLET, event_log=None, keys=SocketKeys.make(),
)  # fmt: skip


@pytest.mark.parametrize("own", [None, "192.0.2.7"])
def test_the_engine_finds_the_drivers_environment_and_its_own_hosts_address(
    own: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "VLLM_HOST_IP"}
    monkeypatch.setattr(os, "environ", environment | ({"VLLM_HOST_IP": own} if own else {}))
    monkeypatch.setattr(ray_runtime, "node_address", lambda: "192.0.2.2")
    made: dict[str, Any] = {}

    def engine(config: Any, *others: Any) -> Any:
        made.update(config=config, others=others, environment=dict(os.environ))
        return SimpleNamespace()

    monkeypatch.setattr(instance, "EngineInstance", engine)
    EngineActor({"HF_TOKEN": "secret"}, pack(CONFIG, "config", True))
    assert replace(made["config"], llumlet=LLUMLET) == replace(CONFIG, host="192.0.2.2")
    assert made["others"] == ("config", True)
    assert made["environment"]["HF_TOKEN"] == "secret"
    # What was set on that host before Ray started is that host's to say.
    assert made["environment"]["VLLM_HOST_IP"] == (own or "192.0.2.2")


def test_a_log_that_cannot_be_kept_keeps_no_engine_from_starting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setattr(ray_runtime, "node_address", lambda: "192.0.2.2")
    monkeypatch.setattr(ray_runtime, "host_name", lambda: "here")
    facts = instance.InstanceFacts(node="", pid=0, devices=[], address="")
    monkeypatch.setattr(
        instance, "EngineInstance", lambda *_: SimpleNamespace(describe=lambda: facts)
    )
    (tmp_path / "file").touch()
    actor = EngineActor({}, pack(CONFIG, "config", True), (str(tmp_path / "file" / "logs"), "i0"))
    why = actor.describe().no_log
    assert why.startswith(f"--log-dir {tmp_path}/file/logs on ")
    assert why.endswith("Not a directory")


def test_a_host_with_another_vllm_is_told_so_before_anything_of_vllms_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setattr(ray_runtime, "node_address", lambda: "192.0.2.2")
    monkeypatch.setattr(instance, "EngineInstance", lambda *_: pytest.fail("it was made"))
    sent = pack(CONFIG, "config", True)
    here = vllm_seam.RELEASE
    monkeypatch.setattr(vllm_seam, "RELEASE", "0.33.7")
    said = f"this host has vLLM 0.33.7, and the deployment was started with {here}: install"
    with pytest.raises(UsageError, match=re.escape(said)):
        EngineActor({}, sent)


@pytest.mark.parametrize(("host", "written"), [("192.0.2.2", "192.0.2.2"), ("::1", "[::1]")])
def test_a_llumlet_listens_at_that_address(host: str, written: str) -> None:
    engine: Any = None
    made = LlumletHost(engine, EngineIndex(3), LLUMLET, host, lambda *_: None)
    assert made._peers._listen == f"tcp://{written}:0"
