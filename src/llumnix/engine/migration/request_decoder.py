"""Reads a request that another engine's llumlet wrote, which is data and never code.

vLLM internals relied on here (tests/house/test_vllm_contract.py fails when one changes):
`MsgpackDecoder` asks its `ext_hook` for all that is not plain msgpack. There alone it unpickles, if
`VLLM_ALLOW_INSECURE_SERIALIZATION` is set. `CUSTOM_TYPE_RAW_VIEW` are plain bytes.
"""

from typing import Any

import msgspec
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.serial_utils import CUSTOM_TYPE_RAW_VIEW, MsgpackDecoder

from llumnix.errors import ProtocolError

_OF_BAD_ARRAYS = (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What vLLM's hooks raise on arrays whose type, shape and bytes do not go together."""


class RequestDecoder(MsgpackDecoder):
    """vLLM's decoder of requests that unpickles nothing, whatever the environment says."""

    def __init__(self) -> None:
        super().__init__(EngineCoreRequest)

    def read(self, body: bytes) -> EngineCoreRequest:
        """The request; `ProtocolError` if it is none."""
        try:
            request: EngineCoreRequest = self.decode(body)
        except (msgspec.MsgspecError, ProtocolError, *_OF_BAD_ARRAYS) as error:
            raise ProtocolError(f"{type(error).__name__}: {error}") from error
        return request

    def ext_hook(self, code: int, data: memoryview) -> Any:
        if code == CUSTOM_TYPE_RAW_VIEW:
            return data
        raise ProtocolError("it has a pickled object in it, and those are not taken from others")
