"""The number of instances follows the load, and no stream notices."""

import time
from pathlib import Path

import pytest

from support.server import Server, eventually
from support.streaming import Background, Recorded, stream

from .test_scheduler import NARROW, PATH, body

pytestmark = [pytest.mark.live, pytest.mark.slow]

CONFIG = "scaling: {up_after_s: 0.5, down_after_s: 3, cooldown_s: 1}\n"
STREAMS = 6


def states(server: Server) -> list[str]:
    return [i["state"] for i in server.instances().values()]


def test_load_starts_a_second_instance_and_its_end_drains_one(
    tiny_model: Path, logs: Path, tmp_path: Path
) -> None:
    config = tmp_path / "scheduler.yaml"
    config.write_text(CONFIG)
    server = Server(
        str(tiny_model), "--served-model-name", "tiny", *NARROW, "--instances", "1",
        "--max-instances", "2", "--scheduler-config", str(config), log=logs / "scaling.log",
    )  # fmt: skip
    server.wait_until_serving()

    def one(thread: int, number: int) -> Recorded:
        return stream(server, PATH, body(150, 250, 100 * thread + number))

    try:
        time.sleep(5)
        assert states(server) == ["serving"], "an idle one is left alone"
        with Background(STREAMS, one).running() as background:
            eventually(lambda: states(server) == ["serving", "serving"], 150, "one more serves")
            eventually(
                lambda: {row["instance"] for row in server.requests()} == {"i0", "i1"},
                30,
                "both have requests",
            )
            time.sleep(3)
        eventually(lambda: states(server) == ["serving"], 60, "one is enough again")
        assert [s.error for s in background.done] == [None] * len(background.done)
        assert all(len(s.tokens()) == 250 for s in background.done)
        assert len(background.done) >= STREAMS
        assert server.complete().status_code == 200
        assert "is added: mean freeness" in server.log
        assert "is drained: mean freeness" in server.log
    finally:
        assert server.stop() == 0
        print(server.log[-3000:])
