"""The port answers from the first second on, and says what the start waits for."""

import logging
import re
import socket
import time
from argparse import Namespace
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import pytest

from llumnix.core.supervision.lifecycle import InstanceStatus
from llumnix.core.types import EngineIndex, InstanceId
from llumnix.errors import UsageError
from llumnix.frontend.door.listener import ListenAddress, Listener, StartProgress

NO_TLS = dict.fromkeys(("ssl_keyfile", "ssl_certfile", "ssl_ca_certs", "ssl_ciphers"))


def address(**given: Any) -> ListenAddress:
    arguments = {"host": "127.0.0.1", "port": 0, "uds": None, "ssl_cert_reqs": 0, **NO_TLS, **given}
    return ListenAddress.of(Namespace(**arguments))


@pytest.fixture
def progress() -> StartProgress:
    return StartProgress(began_s=0.0)


@pytest.fixture
def listener(progress: StartProgress) -> Iterator[Listener]:
    one = Listener(address(), progress)
    one.open()
    yield one
    one.close()


def status(name: str, state: str, step: str) -> InstanceStatus:
    return InstanceStatus(
        id=InstanceId(name), state=state, hung=False, engine_index=EngineIndex(0), node=None,
        pid=None, devices=[], restarts=0, why=None, takes_requests=state == "serving", step=step,
        for_s=2.0,
    )  # fmt: skip


SHOWN = [
    {"id": "i0", "state": "serving", "step": "up", "for_s": 2.0},
    {"id": "i1", "state": "starting", "step": "loading", "for_s": 2.0},
]


@pytest.fixture
def half(progress: StartProgress) -> None:
    """One instance of two is up."""
    progress.phase = "starting instance 2/2 (i1)"
    one, two = status("i0", "serving", "up"), status("i1", "starting", "loading")
    progress.instances = lambda: [one, two]


@pytest.mark.usefixtures("half")
def test_every_path_says_how_far_the_start_is(listener: Listener) -> None:
    for method, path in (("GET", "/health"), ("POST", "/v1/chat/completions"), ("GET", "/x")):
        answer = httpx.request(method, listener.url + path)
        assert answer.status_code == 503
        assert int(answer.headers["retry-after"]) > 0
        assert answer.headers["x-llumnix-reason"] == "loading"
        body = answer.json()
        assert body["error"]["type"] == "service_unavailable"
        assert body["error"]["code"] == "loading"
        assert "starting instance 2/2 (i1)" in body["error"]["message"]
        assert body["phase"] == "starting instance 2/2 (i1)"
        assert body["instances"] == SHOWN
        assert body["elapsed_s"] > 0


@pytest.mark.usefixtures("half")
def test_a_start_is_not_ready_however_many_serve_already(
    listener: Listener, progress: StartProgress
) -> None:
    """Nobody lets requests in yet."""
    answer = httpx.get(listener.url + "/ready")
    assert answer.status_code == 503
    body = answer.json()
    assert body.pop("elapsed_s") > 0
    assert body == {
        "ready": False, "phase": "loading", "reason": "loading", "serving": 1, "min": 1,
        "doing": "starting instance 2/2 (i1)", "instances": SHOWN,
    }  # fmt: skip
    assert answer.headers["x-llumnix-reason"] == "loading"
    assert int(answer.headers["retry-after"]) > 0
    progress.ready_min = 2
    assert httpx.get(listener.url + "/ready").json()["min"] == 2
    assert httpx.get(listener.url + "/ready?min=1").json()["min"] == 1
    assert httpx.get(listener.url + "/ready?min=0").status_code == 400
    assert httpx.post(listener.url + "/ready").status_code == 405
    progress.code = "no_frontend"
    body = httpx.get(listener.url + "/ready").json()
    assert (body["reason"], body["phase"]) == ("no_frontend", "serving")


def test_the_elapsed_time_is_since_the_start() -> None:
    assert StartProgress(began_s=10.0).answer(33.24)["elapsed_s"] == 23.2


def test_the_liveness_path_says_that_it_lives(listener: Listener) -> None:
    answer = httpx.get(listener.url + "/live")
    assert (answer.status_code, answer.json()) == (200, {"live": True})


def test_any_free_port_is_a_real_one(listener: Listener) -> None:
    assert listener.port > 0
    assert listener.url == f"http://127.0.0.1:{listener.port}"


def test_an_ipv6_address_is_listened_on_too(progress: StartProgress) -> None:
    one = Listener(address(host="::1"), progress)
    one.open()
    try:
        assert one.url == f"http://[::1]:{one.port}"
        assert httpx.get(one.url + "/live").status_code == 200
    finally:
        one.close()


def test_the_port_of_another_is_refused_at_once(
    listener: Listener, progress: StartProgress
) -> None:
    second = Listener(address(port=listener.port), progress)
    with pytest.raises(UsageError, match=rf"cannot listen on .*:{listener.port} .*--port"):
        second.open()
    assert httpx.get(listener.url + "/live").status_code == 200


def test_two_that_bind_before_either_listens_do_not_both_get_it(progress: StartProgress) -> None:
    """Linux lets both bind."""
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", 0))
        first = Listener(address(port=other.getsockname()[1]), progress)
        first.open()
        try:
            with pytest.raises(OSError, match="in use"):
                other.listen()
        finally:
            first.close()


def test_no_connection_is_refused_while_the_server_takes_over(listener: Listener) -> None:
    listener.stop_answering()
    with socket.create_connection(("127.0.0.1", listener.port), 5) as early:

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(204)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        server = HTTPServer(("127.0.0.1", 0), Handler, bind_and_activate=False)
        server.socket.close()
        server.socket = listener.socket
        thread = Thread(target=server.handle_request)
        thread.start()
        early.sendall(b"GET / HTTP/1.0\r\n\r\n")
        assert early.recv(100).startswith(b"HTTP/1.0 204")
        thread.join()


def test_a_request_that_is_on_its_way_at_the_takeover_is_answered(listener: Listener) -> None:
    with socket.create_connection(("127.0.0.1", listener.port), timeout=10) as client:
        client.sendall(b"GET /live HTTP/1.1\r\n")
        time.sleep(0.2)  # Accepted by now.
        stopping = Thread(target=listener.stop_answering)
        stopping.start()
        time.sleep(0.5)
        client.sendall(b"Host: t\r\n\r\n")
        assert client.recv(1000).startswith(b"HTTP/1.1 200")
        stopping.join()


def test_who_connects_and_asks_nothing_does_not_hold_the_takeover(listener: Listener) -> None:
    with socket.create_connection(("127.0.0.1", listener.port), timeout=10):
        time.sleep(0.2)
        began_s = time.monotonic()
        listener.stop_answering()
        assert time.monotonic() - began_s < 5


def test_its_end_is_not_told_as_the_end_of_a_server(
    listener: Listener, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "uvicorn.error"):  # As vLLM's server sets it.
        assert httpx.get(listener.url + "/live").status_code == 200
        listener.stop_answering()
        logging.getLogger("uvicorn.error").info("of vLLM's server")
    assert [record.message for record in caplog.records] == ["of vLLM's server"]


def test_a_closed_listener_is_gone(progress: StartProgress) -> None:
    one = Listener(address(), progress)
    one.open()
    port = one.port
    one.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), 5)


def test_a_unix_socket_goes_with_it(progress: StartProgress, tmp_path: Path) -> None:
    path = tmp_path / "s"
    one = Listener(address(uds=str(path)), progress)
    one.open()
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(path))) as http:
        assert http.get("http://localhost/health").status_code == 503
    one.close()
    assert not path.exists()


def test_the_socket_of_a_killed_server_is_replaced_and_no_other_file(
    progress: StartProgress, tmp_path: Path
) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(str(path))
    one = Listener(address(uds=str(path)), progress)
    one.open()
    with pytest.raises(UsageError, match=r"cannot listen on .*--uds"):
        Listener(address(uds=str(path)), progress).open()
    one.close()
    path.write_text("precious")
    with pytest.raises(UsageError, match="cannot listen on"):
        Listener(address(uds=str(path)), progress).open()
    assert path.read_text() == "precious"


@pytest.mark.parametrize("port", [-1, 65536, 99999])
def test_a_port_out_of_range_is_refused(port: int) -> None:
    with pytest.raises(UsageError, match=f"--port {port}: must be 1 to 65535, or 0"):
        address(port=port)


@pytest.mark.parametrize("host", ["no.such.host.invalid", "a..b"])
def test_a_host_that_is_none_is_refused(progress: StartProgress, host: str) -> None:
    with pytest.raises(UsageError, match=re.escape(f"cannot listen on {host}:0")):
        Listener(address(host=host), progress).open()


def test_a_certificate_that_cannot_be_used_is_refused(
    progress: StartProgress, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="add --ssl-certfile"):
        address(ssl_keyfile="/nowhere.pem")
    no_certificate = tmp_path / "x.pem"
    no_certificate.write_text("hello")
    for path in ("/nowhere.pem", str(no_certificate)):
        one = Listener(address(ssl_keyfile=path, ssl_certfile=path), progress)
        with pytest.raises(UsageError, match=r"the certificate cannot be used \(.+\): check --ssl"):
            one.open()
