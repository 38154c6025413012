"""The two sockets over which a frontend and all engines talk, and who announces itself there.

vLLM internals relied on here (tests/house/test_vllm_contract.py fails when one changes):
- `AsyncMPClient` binds one ROUTER socket, over which it sends to any engine by ZMQ identity
  (`_send_input(..., engine)`, `_call_utility_async(..., engine)`), and one PULL socket, on which
  outputs arrive with their `engine_index`. Its encoder, decoder and queue are used as they are; its
  constructor, which waits for a fixed set of engines, is replaced.
- An engine announces itself on the ROUTER socket with its READY payload, at any time, once.
- `make_zmq_socket(..., listener)` takes over a socket that listens already. An engine answers a
  request or a call at the output address of the client whose `client_index` it carries.
"""

import asyncio
import socket
import weakref
from dataclasses import dataclass
from typing import Any

import zmq
import zmq.asyncio
from vllm.config import VllmConfig
from vllm.utils.network_utils import make_zmq_socket
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.engine.core_client import BackgroundResources
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from llumnix.core.types import EngineIndex, InstanceId
from llumnix.frontend.engines.directory import EngineDirectory
from llumnix.frontend.engines.outputs import Complaints, EngineOutputs
from llumnix.sockets import Listening, SocketKeys, check_secured

EARLY_MAX = 1024
"""So many engines that have announced themselves wait until they are made known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientPlace:
    """Where one client of the engines listens, and which of them it is."""

    input_address: str  # for what engines announce
    output_address: str  # for their outputs
    listeners: tuple[socket.socket, socket.socket] | None = None
    """Bound to the two, if others must not get these ports meanwhile."""
    index: int = 0
    count: int = 1  # how many processes the clients of one moment are


class EngineSockets(EngineOutputs):
    """The part of the fleet's client that owns the sockets. `slots`: how many instances have
    metrics."""

    engines: EngineDirectory

    def __init__(
        self,
        vllm_config: VllmConfig,
        place: ClientPlace,
        slots: int,
        keys: SocketKeys | None = None,
    ) -> None:
        # Replaces the constructors of MPClient and AsyncMPClient: it sets the same attributes, and
        # starts no engines. The contract test compares the two sets of attributes.
        self.vllm_config = vllm_config
        self._renderer = None
        self._effective_attention_block_sizes: set[int | None] = set()
        self._kv_event_sources = {}
        sync_context = zmq.Context(io_threads=2)
        self.ctx = zmq.asyncio.Context(sync_context)
        self._listening = Listening(sync_context, keys)
        for option, value in self._listening.options().items():
            self.ctx.setsockopt(option, value)
        self.resources = BackgroundResources(ctx=sync_context)
        self._finalizer = weakref.finalize(self, self.resources)
        self.engines_running = False
        self.stats_update_address = None
        self.coordinator_input_address = self.coordinator_output_address = None
        self.input_address, self.output_address = place.input_address, place.output_address
        ours = place.listeners or (None, None)
        for listener in place.listeners or ():
            listener.listen()
        self.input_socket = self.resources.input_socket = make_zmq_socket(
            self.ctx, place.input_address, zmq.ROUTER, bind=True, listener=ours[0]
        )
        self.resources.output_socket = make_zmq_socket(
            self.ctx, place.output_address, zmq.PULL, bind=True, listener=ours[1]
        )
        check_secured(self.input_socket, keys)
        check_secured(self.resources.output_socket, keys)
        self.encoder = MsgpackEncoder()
        self.decoder = MsgpackDecoder(EngineCoreOutputs)
        self.engine_ranks_managed = list(range(slots))
        self.core_engines: list[bytes] = []
        self.core_engine = b""
        self.utility_results: dict[int, asyncio.Future[Any]] = {}
        self.client_count = place.count
        self.client_index = place.index
        self.outputs_queue: asyncio.Queue[EngineCoreOutputs | Exception] = asyncio.Queue()
        self._engine_status: dict[int, dict] = {}

        self.engines = EngineDirectory()
        self.complaints = Complaints()
        self._early: dict[EngineIndex, bytes] = {}
        self._greeter: asyncio.Task[None] | None = None

    def listen(self) -> None:
        """Begins to listen for engines and their outputs; call it with the event loop running."""
        self.loop = asyncio.get_running_loop()
        self._ensure_output_queue_task()
        self._greeter = asyncio.create_task(self._greet(), name="llumnix-engine-greeter")

    def close_sockets(self) -> None:
        """Stops listening, and closes the sockets."""
        if self._greeter is not None:
            self._greeter.cancel()
        self._listening.close()
        self.shutdown()

    async def _greet(self) -> None:
        while True:
            frames = await self.input_socket.recv_multipart()
            try:
                self._let_in(frames[0], frames[-1])
            except Exception as error:  # noqa: BLE001 - the next engine must still be let in
                self.complaints.note("An engine announced itself badly", repr(error), error)

    def expect(self, instance: InstanceId, engine_index: EngineIndex, slot: int) -> None:
        """Makes an engine known that will announce itself, or has done so. It takes no requests
        yet."""
        self.engines.expect(instance, engine_index, slot)
        self.engines.accept(engine_index, False)
        payload = self._early.pop(engine_index, None)
        if payload is not None:
            self._let_in(engine_index.to_bytes(2, "little"), payload)

    def _let_in(self, identity: bytes, payload: bytes) -> None:
        index = EngineIndex(int.from_bytes(identity, "little"))
        engine = self.engines.get(index)
        if engine is None and self.client_index and len(self._early) < EARLY_MAX:
            self._early[index] = payload  # The office's word for it comes on another line.
            return
        if engine is None or engine.ready.done():
            what = "An engine that nobody started announced itself"
            self.complaints.note(what, identity.hex())
            return
        # vLLM adds up the blocks of data-parallel engines. Ours come and go, so the frontend shows
        # the blocks of one.
        cache_config = self.vllm_config.cache_config
        blocks, cache_config.num_gpu_blocks = cache_config.num_gpu_blocks, None
        try:
            self._apply_ready_response(payload)
        except BaseException:
            cache_config.num_gpu_blocks = blocks
            raise
        engine.ready.set_result(None)
        self.refresh()

    def refresh(self) -> None:
        """Sets `core_engines`, to which vLLM's calls to all engines go, to the engines that are
        up."""
        self.core_engines = [e.identity for e in self.engines.up()]
        self.core_engine = self.core_engines[0] if self.core_engines else b""
