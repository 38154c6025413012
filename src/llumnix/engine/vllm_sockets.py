"""Keys for the ZMQ sockets over which vLLM's engine core talks to the frontend.

vLLM has no setting for keys.

vLLM 0.32 internals relied on here (tests/house/test_vllm_contract.py fails when one changes):
`EngineCoreProc.process_input_sockets` and `process_output_sockets`, each on a thread of its own,
make a `zmq.Context`. For every socket they pass it to `make_zmq_socket`, which they look up in
their module. All of these sockets connect.
"""

from typing import Any

from vllm.v1.engine import core

from llumnix.sockets import SocketKeys, check_secured, connecting_options


def secure(keys: SocketKeys) -> None:
    """From now on the sockets of this process's engine core have these keys."""
    make = core.make_zmq_socket

    def make_secured(context: Any, *args: Any, **options: Any) -> Any:
        for option, value in connecting_options(keys).items():
            context.setsockopt(option, value)
        socket = make(context, *args, **options)
        check_secured(socket, keys)
        return socket

    core.make_zmq_socket = make_secured
