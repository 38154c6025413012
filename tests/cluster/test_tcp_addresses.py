"""Where a deployment over several hosts meets."""

import socket
import tempfile
from pathlib import Path

import pytest

from llumnix.cluster.addresses import Addresses


@pytest.mark.parametrize(("host", "written"), [("127.0.0.1", "127.0.0.1"), ("::1", "[::1]")])
def test_on_tcp_there_are_always_keys(host: str, written: str) -> None:
    made = Addresses.make(host)
    try:
        for address in (made.controller, *made.inputs, *made.outputs):
            assert address.startswith(f"tcp://{written}:")
        assert made.keys is not None
    finally:
        made.remove()


def test_on_one_host_only_the_user_can_open_the_sockets() -> None:
    made = Addresses.make(None)
    try:
        assert made.controller.startswith("ipc://")
        assert made.keys is None
    finally:
        made.remove()


def test_an_address_that_is_not_this_hosts_leaves_no_folder_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises((OSError, socket.gaierror)):
        Addresses.make("192.0.2.1")
    assert list(tmp_path.iterdir()) == []
