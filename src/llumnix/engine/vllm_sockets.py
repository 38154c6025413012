"""Options for the ZMQ sockets over which vLLM's engine core talks to frontends.

Rules
- With keys, both ends prove that they know them. vLLM has no setting for keys.
- An engine has a pair of sockets for every frontend that may ever come, so most of them find nobody
  at first. They try again more and more seldom, every `RECONNECT_MAX_MS` in the end. By default ZMQ
  tries ten times a second, which for 40 sockets takes a hundredth of a core.

vLLM internals relied on here (tests/house/test_vllm_contract.py fails when one changes):
`EngineCoreProc.process_input_sockets` and `process_output_sockets`, each on a thread of its own,
make a `zmq.Context`. For every socket they pass it to `make_zmq_socket`, which they look up in
their module. All of these sockets connect.
"""

from typing import Any

import zmq
from vllm.v1.engine import core

from llumnix.sockets import SocketKeys, check_secured, connecting_options

RECONNECT_MAX_MS = 1000


def prepare_sockets(keys: SocketKeys | None, frontends: int) -> None:
    """From now on the sockets of this process's engine core have these keys, and suit so many
    frontends."""
    options: dict[int, Any] = dict(connecting_options(keys))
    if frontends > 1:
        options[zmq.RECONNECT_IVL_MAX] = RECONNECT_MAX_MS
    if not options:
        return
    make = core.make_zmq_socket

    def make_prepared(context: Any, *args: Any, **more: Any) -> Any:
        for option, value in options.items():
            context.setsockopt(option, value)
        socket = make(context, *args, **more)
        check_secured(socket, keys)
        return socket

    core.make_zmq_socket = make_prepared
