"""KV blocks from worker to worker, bit by bit."""

import multiprocessing
import os
import queue
import random
import signal
import socket
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from llumnix.engine.kv import bandwidth, links, readers, transports
from llumnix.engine.kv.agent import (
    AgentClient,
    Pulled,
    TransferOptions,
    WorkerAgent,
)
from llumnix.engine.kv.bandwidth import RateLimiter
from llumnix.engine.kv.blocks import HostMemory, Piece, Plane, fuse, lay_out, runs, view
from llumnix.engine.kv.blocks_cuda import pair_up, word
from llumnix.errors import UsageError
from support.server import eventually, unused_memory

KEY = b"a key of the tests"
BLOCKS = 24
WAIT_S = 10.0
SPAWN = multiprocessing.get_context("spawn")

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def random_(shape: tuple[int, ...], dtype: torch.dtype, seed: int, device: str) -> torch.Tensor:
    """A tensor of random bytes: not-a-numbers must arrive too."""
    generator = torch.Generator().manual_seed(seed)
    whole = torch.randint(0, 256, (*shape[:-1], shape[-1] * dtype.itemsize), generator=generator)
    return whole.to(torch.uint8).view(dtype).to(device)


def kv_tensors(seed: int, device: str = "cpu", blocks: int = BLOCKS) -> list[torch.Tensor]:
    """The KV cache of one worker: several dtypes, rows a block, and memory layouts."""
    layers = random_((4, blocks, 2, 3, 8), torch.bfloat16, seed, device)
    heads_first = random_((3, blocks, 2, 16), torch.float8_e4m3fn, seed + 1, device)
    return [
        *layers.unbind(0),  # vLLM's usual: one allocation, layers outermost
        random_((blocks * 2, 5, 7), torch.float32, seed + 2, device),  # two rows a block
        random_((blocks, 16, 33), torch.uint8, seed + 3, device),
        *random_((blocks * 2, 3, 16), torch.float16, seed + 4, device).unbind(1),  # interleaved
        heads_first.transpose(0, 1),  # a block's bytes in three pieces
    ]


def as_bytes(tensor: torch.Tensor, blocks: int = BLOCKS) -> torch.Tensor:
    """(blocks, bytes of a block) of one tensor, as a copy on the host."""
    copy = tensor.cpu().contiguous()
    return copy.view(torch.uint8).reshape(blocks, -1).clone()


def snapshot(tensors: list[torch.Tensor], blocks: int = BLOCKS) -> torch.Tensor:
    """All bytes of all blocks, a row each."""
    return torch.cat([as_bytes(t, blocks) for t in tensors], dim=1)


def after_pull(
    before: torch.Tensor, peer: torch.Tensor, source: list[int], destination: list[int]
) -> torch.Tensor:
    """What a snapshot must be after the pull: nothing else may change."""
    expected = before.clone()
    expected[destination] = peer[source]
    return expected


@dataclass
class Rig:
    """Agents and a client, closed at the end of the test."""

    folder: Path
    agents: list[WorkerAgent] = field(default_factory=list)
    clients: list[AgentClient] = field(default_factory=list)
    pulled: "queue.Queue[Pulled]" = field(default_factory=queue.Queue)

    def agent(
        self,
        tensors: list[torch.Tensor],
        options: TransferOptions | None = None,
        listen: str | None = None,
        key: bytes = KEY,
        blocks: int = BLOCKS,
    ) -> str:
        """Starts an agent and returns its address."""
        agent = WorkerAgent(
            tensors=tensors,
            blocks=blocks,
            listen=listen or f"unix:{self.folder}/{len(self.agents)}",
            key=key,
            options=options or TransferOptions(),
        )
        self.agents.append(agent)
        return agent.start()

    def client(self, *agents: str) -> AgentClient:
        """Starts a client; its answers go to `pulled`."""
        client = AgentClient(agents=list(agents), key=KEY, on_pulled=self.pulled.put)
        self.clients.append(client)
        client.start()
        return client

    def answer(self) -> Pulled:
        """The next pull that ended."""
        return self.pulled.get(timeout=WAIT_S)

    def close(self) -> None:
        for end in (*self.clients, *self.agents):
            end.close()


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(folder=tmp_path)
    yield rig
    rig.close()


def serve(listen: str, seed: int, device: str, told: Connection) -> None:
    """A source worker in a process of its own, until it is told to end or killed."""
    tensors = kv_tensors(seed, device)
    agent = WorkerAgent(
        tensors=tensors, blocks=BLOCKS, listen=listen, key=KEY, options=TransferOptions()
    )
    told.send_bytes(agent.start().encode())
    while told.recv_bytes() == b"contexts?":
        gpus = range(torch.cuda.device_count())
        told.send_bytes(bytes(torch._C._cuda_hasPrimaryContext(i) for i in gpus))
    agent.close()


@dataclass
class Worker:
    """A source worker's process."""

    process: multiprocessing.process.BaseProcess
    told: Connection
    address: str

    def kill(self) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.join()


@pytest.fixture
def spawn() -> Iterator[Callable[..., Worker]]:
    """Starts source workers; they end with the test."""
    workers: list[Worker] = []

    def start(listen: str, seed: int, device: str = "cpu") -> Worker:
        ours, theirs = SPAWN.Pipe()
        process = SPAWN.Process(target=serve, args=(listen, seed, device, theirs), daemon=True)
        process.start()
        assert ours.poll(60), "the worker did not start"
        workers.append(Worker(process, ours, ours.recv_bytes().decode()))
        return workers[-1]

    yield start
    for worker in workers:
        if worker.process.is_alive():
            worker.told.send_bytes(b"end")
            worker.process.join(WAIT_S)


# ---------------------------------------------------------------- whole pulls


def memfd_maps() -> int:
    """Mappings of this process that KV crosses."""
    return Path("/proc/self/maps").read_text().count("/memfd:llumnix-kv")


LISTEN = {"memfd": "unix:{}/source", "stream": "unix:{}/source", "tcp": "tcp:127.0.0.1:0"}


@pytest.mark.parametrize("staging", [1, 3000, 8 * 2**20], ids=["one block", "few blocks", "all"])
@pytest.mark.parametrize("transport", ["memfd", "stream", "tcp"])
def test_blocks_arrive_bit_by_bit_and_nothing_else_changes(
    rig: Rig, transport: str, staging: int
) -> None:
    same_host = "tcp" if transport == "stream" else "auto"
    options = TransferOptions(staging_bytes=staging, same_host=same_host, checksums=True)
    theirs, ours = kv_tensors(1), kv_tensors(100)
    peer = rig.agent(theirs, options, LISTEN[transport].format(rig.folder))
    client = rig.client(rig.agent(ours, options))
    source = [5, 4, 3, 9, 10, 11, 0, 23, 17]
    destination = [0, 1, 2, 20, 7, 8, 23, 11, 15]
    expected = after_pull(snapshot(ours), snapshot(theirs), source, destination)
    mapped_before = memfd_maps()

    client.pull(1, [peer], source, destination)

    pulled = rig.answer()
    block_bytes = snapshot(ours).shape[1]
    assert (pulled.ticket, pulled.bytes, pulled.error) == (1, 9 * block_bytes, None)
    assert (memfd_maps() > mapped_before) == (transport == "memfd")
    assert 0 < pulled.seconds < WAIT_S
    assert torch.equal(snapshot(ours), expected)


def test_random_pulls_one_after_the_other_end_as_they_would_at_once(rig: Rig) -> None:
    chance = random.Random(7)
    options = TransferOptions(staging_bytes=4000)
    theirs, ours = kv_tensors(1), kv_tensors(100)
    peer = rig.agent(theirs, options)
    client = rig.client(rig.agent(ours, options))
    expected = snapshot(ours)
    for ticket in range(30):
        size = chance.randrange(BLOCKS + 1)
        source = chance.choices(range(BLOCKS), k=size)
        destination = chance.sample(range(BLOCKS), k=size)
        expected = after_pull(expected, snapshot(theirs), source, destination)
        client.pull(ticket, [peer], source, destination)
    pulled = [rig.answer() for _ in range(30)]
    assert {p.ticket for p in pulled if p.error is None} == set(range(30))
    assert torch.equal(snapshot(ours), expected)


def test_a_worker_with_more_blocks_pulls_from_one_with_fewer(rig: Rig) -> None:
    theirs, ours = kv_tensors(1, blocks=6), kv_tensors(100)
    peer = rig.agent(theirs, blocks=6)
    client = rig.client(rig.agent(ours))
    expected = after_pull(snapshot(ours), snapshot(theirs, 6), [5], [23])
    client.pull(1, [peer], [5], [23])
    assert rig.answer().error is None
    assert torch.equal(snapshot(ours), expected)
    client.pull(2, [peer], [6], [0])
    assert "the peer has no blocks 6..6" in str(rig.answer().error)
    client.pull(3, [peer], [0], [24])
    assert "IndexError" in str(rig.answer().error)
    assert torch.equal(snapshot(ours), expected)


def test_a_pull_of_nothing_ends_at_once_without_an_agent(rig: Rig) -> None:
    client = rig.client("unix:/nowhere")
    client.pull(4, ["unix:/nowhere"], [], [])
    assert rig.answer() == Pulled(ticket=4, bytes=0, seconds=0.0, error=None)


def test_two_ranks_are_joined_into_one_answer(rig: Rig) -> None:
    theirs = [kv_tensors(1), kv_tensors(11)]
    ours = [kv_tensors(100), kv_tensors(200)]
    peers = [rig.agent(t) for t in theirs]
    client = rig.client(*[rig.agent(t) for t in ours])
    expected = [
        after_pull(snapshot(o), snapshot(t), [3, 1], [6, 7])
        for o, t in zip(ours, theirs, strict=True)
    ]

    client.pull(1, peers, [3, 1], [6, 7])

    pulled = rig.answer()
    assert (pulled.error, pulled.bytes) == (None, 4 * expected[0].shape[1])
    assert all(torch.equal(snapshot(o), e) for o, e in zip(ours, expected, strict=True))

    client.pull(2, [peers[0], f"unix:{rig.folder}/nobody"], [3], [6])
    pulled = rig.answer()
    assert pulled.bytes == expected[0].shape[1]
    assert str(pulled.error).startswith("rank 1: ")
    assert "FileNotFoundError" in str(pulled.error)
    assert rig.pulled.empty()


def test_a_pull_of_several_ranks_takes_as_long_as_the_slowest(rig: Rig) -> None:
    ours = [kv_tensors(100 * (n + 1)) for n in range(3)]
    pulled_bytes = 12 * snapshot(ours[0]).shape[1]
    options = TransferOptions(staging_bytes=4000, bandwidth_bytes_per_s=pulled_bytes / 0.3)
    client = rig.client(*[rig.agent(o, options) for o in ours])
    began_s = time.monotonic()
    client.pull(1, [rig.agent(kv_tensors(1), options)] * 3, list(range(12)), list(range(12)))
    pulled = rig.answer()
    assert (pulled.error, pulled.bytes) == (None, 3 * pulled_bytes)
    assert 0.2 < pulled.seconds <= time.monotonic() - began_s


def test_pulls_from_two_peers_run_side_by_side(rig: Rig) -> None:
    options = TransferOptions(staging_bytes=4000)
    theirs = [kv_tensors(1), kv_tensors(11)]
    ours = kv_tensors(100)
    peers = [rig.agent(theirs[0], options), rig.agent(theirs[1], options, "tcp:127.0.0.1:0")]
    client = rig.client(rig.agent(ours, options))
    expected = snapshot(ours)
    for ticket in range(4):
        source = [ticket + 8, *range(5)]
        destination = list(range(6 * ticket, 6 * ticket + 6))
        expected = after_pull(expected, snapshot(theirs[ticket % 2]), source, destination)
        client.pull(ticket, [peers[ticket % 2]], source, destination)
    tickets = [rig.answer() for _ in range(4)]
    assert [p.error for p in tickets] == [None] * 4
    order = [p.ticket for p in tickets]
    assert order.index(0) < order.index(2)
    assert order.index(1) < order.index(3)
    assert torch.equal(snapshot(ours), expected)


def test_the_bandwidth_limit_holds_over_all_peers(rig: Rig) -> None:
    ours = kv_tensors(100)
    block_bytes = snapshot(ours).shape[1]
    rate = 60 * block_bytes
    options = TransferOptions(staging_bytes=block_bytes, bandwidth_bytes_per_s=rate)
    peers = [rig.agent(kv_tensors(1)), rig.agent(kv_tensors(2))]
    client = rig.client(rig.agent(ours, options))
    started_s = time.monotonic()
    for ticket, peer in enumerate(peers):
        client.pull(ticket, [peer], list(range(12)), list(range(12)))
    assert [rig.answer().error for _ in peers] == [None, None]
    # The sources stage all 12 blocks at once: of two chunks, the first is free.
    elapsed_s = time.monotonic() - started_s
    assert 12 / 60 <= elapsed_s < 24 / 60 + 1


def test_a_chunk_starts_when_all_before_it_are_paid_for_and_no_rest_is_saved_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Though they ask at the same moment, as several peers' pulls do."""
    clock, waited = [1000.0], list[float]()
    monkeypatch.setattr(bandwidth, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    limiter, never = RateLimiter(100.0), SimpleNamespace(wait=waited.append)
    for now_s in (1000.0, 1010.0):
        clock[0] = now_s
        for size in (50, 10, 50, 10):
            limiter.take(size, never)  # type: ignore[arg-type]
    assert waited == [pytest.approx(s) for s in (0.5, 0.6, 1.1) * 2]
    RateLimiter(None).take(10**12, never)  # type: ignore[arg-type]
    assert len(waited) == 6


@pytest.mark.parametrize(
    ("same_host", "limit", "unread_max"), [("tcp", 1e15, 0), ("tcp", None, 1), ("auto", 1e15, 1)]
)
def test_no_chunk_of_a_stream_waits_unread_while_the_next_one_waits_for_bandwidth(
    rig: Rig,
    monkeypatch: pytest.MonkeyPatch,
    same_host: str,
    limit: float | None,
    unread_max: int,
) -> None:
    """Its source would give the move up after `CHUNK_TIMEOUT_S`. Without a limit, and where memory
    is shared, the source fills the next chunk while one is read."""
    asked, read, unread = list[int](), list[int](), list[int]()
    ask, take = readers.StagedReader._ask, readers.StagedReader._take

    def asks(reader: readers.StagedReader, *args: Any) -> None:
        asked.append(1)
        ask(reader, *args)

    def takes(reader: readers.StagedReader, *args: Any) -> None:
        take(reader, *args)
        read.append(1)

    monkeypatch.setattr(readers.StagedReader, "_ask", asks)
    monkeypatch.setattr(readers.StagedReader, "_take", takes)
    monkeypatch.setattr(RateLimiter, "take", lambda *_: unread.append(len(asked) - len(read)))
    theirs, ours = kv_tensors(1), kv_tensors(100)
    options = TransferOptions(
        staging_bytes=1, same_host=same_host, bandwidth_bytes_per_s=limit
    )  # a block a chunk
    blocks = list(range(5))
    expected = after_pull(snapshot(ours), snapshot(theirs), blocks, blocks)
    client = rig.client(rig.agent(ours, options))
    client.pull(1, [rig.agent(theirs, options)], blocks, blocks)
    assert rig.answer().error is None
    assert torch.equal(snapshot(ours), expected)
    assert len(unread) == 5
    assert max(unread) == unread_max


# ---------------------------------------------------------------- failures


@pytest.mark.parametrize("listen", ["unix:{}/source", "tcp:127.0.0.1:0"])
def test_a_corrupt_chunk_fails_the_pull_if_checksums_are_on(
    rig: Rig, listen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def corrupt(data: np.ndarray) -> int:
        found = zlib.crc32(data)
        if threading.current_thread().name == "llumnix-kv-serve":
            data[len(data) // 2] ^= 1
        return found

    options = TransferOptions(checksums=True)
    peer = rig.agent(kv_tensors(1), options, listen.format(rig.folder))
    client = rig.client(rig.agent(kv_tensors(100), options))
    with monkeypatch.context() as patch:
        patch.setattr(transports, "checksum", corrupt)
        client.pull(1, [peer], [0, 1], [2, 3])
        pulled = rig.answer()
    assert "checksum" in str(pulled.error)
    assert pulled.bytes == 0
    client.pull(2, [peer], [0, 1], [2, 3])
    assert rig.answer().error is None


@pytest.mark.parametrize("listen", ["unix:{}/source", "tcp:127.0.0.1:0"])
def test_who_has_another_key_is_refused(rig: Rig, listen: str) -> None:
    peer = rig.agent(kv_tensors(1), listen=listen.format(rig.folder), key=b"another key")
    ours = kv_tensors(100)
    before = snapshot(ours)
    client = rig.client(rig.agent(ours))
    client.pull(1, [peer], [0], [1])
    assert "AuthenticationError" in str(rig.answer().error)
    assert torch.equal(snapshot(ours), before)
    rig.client(peer).pull(2, [peer], [0], [1])
    assert "AuthenticationError" in str(rig.answer().error)


def test_a_peer_with_another_layout_is_refused(rig: Rig) -> None:
    peer = rig.agent([torch.zeros(BLOCKS, 3)])
    client = rig.client(rig.agent(kv_tensors(100)))
    client.pull(1, [peer], [0], [1])
    assert "layout" in str(rig.answer().error)


def test_a_peer_that_says_nothing_is_given_up(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = rig.agent(kv_tensors(100))
    client = rig.client(ours)
    client.pull(1, [ours], [0], [1])  # The client's own link is there.
    assert rig.answer().error is None
    monkeypatch.setattr(links, "CHUNK_TIMEOUT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        client.pull(2, [f"tcp:127.0.0.1:{silent.getsockname()[1]}"], [0], [1])
        assert "TimeoutError" in str(rig.answer().error)


def test_a_killed_source_fails_the_pull_and_its_successor_serves(
    rig: Rig, spawn: Callable[..., Worker]
) -> None:
    listen = f"unix:{rig.folder}/source"
    unused = unused_memory()
    ours = kv_tensors(100)
    first = spawn(listen, 1)
    # Slow enough that the kill comes in the middle.
    options = TransferOptions(bandwidth_bytes_per_s=2e3)
    client = rig.client(rig.agent(ours), rig.agent(kv_tensors(200), options))
    expected = after_pull(snapshot(ours), snapshot(kv_tensors(1)), [7, 8, 2], [0, 2, 4])

    client.pull(1, [first.address] * 2, [7, 8, 2], [0, 2, 4])
    assert rig.answer().error is None
    assert torch.equal(snapshot(ours), expected)

    client.pull(2, [first.address] * 2, [7], [0])  # Rank 1 must wait for its bandwidth first.
    first.kill()
    killed_s = time.monotonic()
    pulled = rig.answer()
    assert "rank 1" in str(pulled.error)
    assert time.monotonic() - killed_s < 6
    client.pull(3, [first.address] * 2, [7], [0])
    assert "ConnectionRefusedError" in str(rig.answer().error)

    second = spawn(listen, 50)
    assert second.address == first.address
    expected = after_pull(expected, snapshot(kv_tensors(50)), [6, 7], [9, 8])
    client.pull(4, [second.address] * 2, [6, 7], [9, 8])
    assert rig.answer().error is None
    assert torch.equal(snapshot(ours), expected)
    # Others' semaphores are there for a moment, too.
    eventually(lambda: unused_memory() <= unused, 10, "SIGKILL left nothing behind")


def test_a_peer_restarted_between_pulls_is_not_noticed(rig: Rig) -> None:
    ours = kv_tensors(100)
    client = rig.client(rig.agent(ours))
    for seed in (1, 2):
        peer = rig.agent(kv_tensors(seed), listen=f"unix:{rig.folder}/source")
        client.pull(seed, [peer], [3], [4])
        assert rig.answer().error is None
        assert torch.equal(snapshot(ours)[4], snapshot(kv_tensors(seed))[3])
        rig.agents.pop().close()


def test_a_forgotten_peers_pulls_fail_and_the_next_connects_anew(rig: Rig) -> None:
    slow = TransferOptions(staging_bytes=1, bandwidth_bytes_per_s=1e3)
    peer = rig.agent(kv_tensors(1), slow)
    client = rig.client(rig.agent(kv_tensors(100), slow))
    for ticket in (1, 2):
        client.pull(ticket, [peer], [0, 1], [2, 3])
    client.forget([peer, "unix:/never/heard/of"])
    for ticket in (1, 2):
        pulled = rig.answer()
        assert pulled.ticket == ticket
        assert "Error" in str(pulled.error) or "broke off" in str(pulled.error)
    client.pull(3, [peer], [], [])
    assert rig.answer().error is None


def test_every_pull_is_answered_when_the_agent_or_the_client_ends(rig: Rig) -> None:
    slow = TransferOptions(staging_bytes=1, bandwidth_bytes_per_s=1e3)
    peer = rig.agent(kv_tensors(1), slow)
    ours = [rig.agent(kv_tensors(100), slow), rig.agent(kv_tensors(200), slow)]
    first, second = rig.client(ours[0]), rig.client(ours[1])
    for ticket in (1, 2):
        first.pull(ticket, [peer], [0, 1], [2, 3])
        second.pull(ticket + 2, [peer], [0, 1], [2, 3])
    rig.agents[1].close()
    second.close()
    pulled = [rig.answer() for _ in range(4)]
    assert {p.ticket for p in pulled} == {1, 2, 3, 4}
    assert all(p.error for p in pulled)
    for blocks in ([0], []):
        with pytest.raises(RuntimeError, match="closed"):
            second.pull(5, [peer], blocks, blocks)


def test_close_ends_all_threads_and_removes_the_socket(rig: Rig) -> None:
    before = set(threading.enumerate())
    peer = rig.agent(kv_tensors(1))
    client = rig.client(rig.agent(kv_tensors(100)))
    client.pull(1, [peer], [0], [1])
    assert rig.answer().error is None
    ours = set(threading.enumerate()) - before
    assert len(ours) >= 6
    assert all(t.daemon and t.name.startswith("llumnix-kv-") for t in ours)
    rig.close()
    assert not [t.name for t in ours if t.is_alive()]
    assert os.listdir(rig.folder) == []


def test_bad_arguments_are_the_callers_to_mend(rig: Rig) -> None:
    with pytest.raises(UsageError, match="cannot hold 7 blocks"):
        lay_out([torch.zeros(24, 2)], 7)
    with pytest.raises(UsageError, match="unix:/path"):
        rig.agent(kv_tensors(1), listen="ipc:///x")
    with pytest.raises(UsageError, match="the one host"):
        rig.agent(kv_tensors(1), listen="tcp:0.0.0.0:0")
    with pytest.raises(UsageError, match="same_host"):
        TransferOptions(same_host="shm")
    client = rig.client("unix:/nowhere")
    with pytest.raises(ValueError, match="2 peers for 1 rank"):
        client.pull(1, ["a", "b"], [0], [0])
    with pytest.raises(ValueError, match="2 blocks into 1"):
        client.pull(1, ["a"], [0, 1], [0])


# ---------------------------------------------------------------- layouts


def test_layers_of_one_allocation_are_one_plane() -> None:
    layers = torch.zeros(4, BLOCKS, 2, 8, dtype=torch.float16)
    block = 2 * 8 * 2
    whole = Plane(
        first=Piece(storage=0, offset=0, stride=block, size=block),
        count=4,
        distance=BLOCKS * block,
    )
    assert fuse(lay_out(layers.unbind(0), BLOCKS).pieces) == [whole]
    # Blocks outermost: the layers of a block lie side by side.
    by_block = torch.zeros(BLOCKS, 4, 16, dtype=torch.float16)
    assert fuse(lay_out(by_block.unbind(1), BLOCKS).pieces) == [
        Plane(
            first=Piece(storage=0, offset=0, stride=4 * block, size=block), count=4, distance=block
        )
    ]


@pytest.mark.parametrize("first", ["shorter", "longer", "both"])
def test_of_tensors_that_lie_over_each_other_the_longest_rows_are_copied_once(first: str) -> None:
    """vLLM's groups of layers: a block belongs to one of them, and has its bytes."""
    memory = torch.zeros(BLOCKS, 12, dtype=torch.uint8)
    tensors = {
        "shorter": [memory[:, :8], memory],
        "longer": [memory, memory[:, :8]],
        "both": [memory, memory[:, :8], memory],
    }[first]
    assert lay_out(tensors, BLOCKS).pieces == (Piece(storage=0, offset=0, stride=12, size=12),)


def test_what_is_not_alike_or_not_equally_far_stays_apart() -> None:
    def piece(storage: int, offset: int, size: int = 8) -> Piece:
        return Piece(storage=storage, offset=offset, stride=64, size=size)

    pieces = [
        *(piece(0, 0), piece(0, 1000), piece(0, 2000)),
        *(piece(0, 2500), piece(0, 3000)),
        piece(0, 3500, size=4),
        piece(1, 4000),
        piece(1, 3000),
    ]
    planes = fuse(pieces)
    assert [p.count for p in planes] == [3, 2, 1, 1, 1]
    assert [p.distance for p in planes] == [1000, 500, 0, 0, 0]
    again = [
        Piece(
            storage=p.first.storage,
            offset=p.first.offset + i * p.distance,
            stride=p.first.stride,
            size=p.first.size,
        )
        for p in planes
        for i in range(p.count)
    ]
    assert again == pieces


def test_sides_that_fuse_differently_are_paired_piece_by_piece() -> None:
    together = lay_out(torch.zeros(3, BLOCKS, 8).unbind(0), BLOCKS)
    apart = lay_out([torch.zeros(BLOCKS, 8) for _ in range(3)], BLOCKS)
    assert [f.count for f, _, _ in pair_up(together.pieces, together.pieces)] == [3]
    pairs = pair_up(together.pieces, apart.pieces)
    assert [(f.count, n.count) for f, n, _ in pairs] == [(1, 1)] * 3
    assert [f.first for f, _, _ in pairs] == list(together.pieces)


@pytest.mark.parametrize(
    ("shape", "dtype", "expected"),
    [
        ((4, BLOCKS, 8), torch.float32, torch.int64),
        ((4, BLOCKS, 3), torch.float32, torch.int32),
        ((4, BLOCKS, 3), torch.bfloat16, torch.int16),
        ((4, BLOCKS, 3), torch.uint8, torch.uint8),
    ],
)
def test_words_are_as_wide_as_the_layout_allows(
    shape: tuple[int, ...], dtype: torch.dtype, expected: torch.dtype
) -> None:
    layout = lay_out(torch.zeros(shape, dtype=dtype).unbind(0), BLOCKS)
    assert word(fuse(layout.pieces)) == expected


def test_planes_cover_each_byte_of_a_block_once() -> None:
    """What the GPU path does, on the CPU: select from one's planes, copy into the other's."""
    theirs, ours = kv_tensors(1), kv_tensors(100)
    far, near = lay_out(theirs, BLOCKS), lay_out(ours, BLOCKS)
    source, destination = torch.tensor([9, 2, 3]), torch.tensor([0, 23, 5])
    expected = after_pull(snapshot(ours), snapshot(theirs), source.tolist(), destination.tolist())
    for f, n, dtype in pair_up(far.pieces, near.pieces):
        selected = view(far.storages[f.first.storage], f, BLOCKS, dtype).index_select(1, source)
        view(near.storages[n.first.storage], n, BLOCKS, dtype).index_copy_(1, destination, selected)
    assert torch.equal(snapshot(ours), expected)


def test_gathered_bytes_are_in_the_same_order_however_the_memory_lies() -> None:
    whole = random_((3, BLOCKS, 8), torch.float32, 1, "cpu")
    apart = [layer.clone() for layer in whole]
    packed = np.zeros((2, 2 * 3 * 32), np.uint8)
    for row, tensors in zip(packed, (list(whole), apart), strict=True):
        HostMemory(lay_out(tensors, BLOCKS)).gather([4, 1], row)
    assert (packed[0] == packed[1]).all()


def test_runs_are_the_consecutive_ids() -> None:
    assert list(runs([])) == []
    assert list(runs([3])) == [(0, 3, 1)]
    assert list(runs([3, 4, 5, 1, 0, 7, 8])) == [(0, 3, 3), (3, 1, 1), (4, 0, 1), (5, 7, 2)]


# ---------------------------------------------------------------- GPUs


@cuda
@pytest.mark.parametrize("checksums", [False, True])
@pytest.mark.parametrize("transport", ["gpu", "memfd", "stream"])
@pytest.mark.parametrize("peers_gpu", range(max(1, torch.cuda.device_count())))
def test_gpu_blocks_arrive_bit_by_bit(
    rig: Rig,
    spawn: Callable[..., Worker],
    monkeypatch: pytest.MonkeyPatch,
    transport: str,
    peers_gpu: int,
    checksums: bool,
) -> None:
    if transport != "gpu":
        open_peer = readers.open_peer
        monkeypatch.setattr(
            "llumnix.engine.kv.agent.open_peer",
            lambda *args: open_peer(*args, map_gpu=False),
        )
    made: list[type] = []
    for reader in (readers.MappedReader, readers.StagedReader):
        init = reader.__init__
        monkeypatch.setattr(
            reader, "__init__", lambda s, *a, init=init: (init(s, *a), made.append(type(s)))[0]
        )
    worker = spawn(f"unix:{rig.folder}/source", 1, f"cuda:{peers_gpu}")
    ours = kv_tensors(100, "cuda:0")
    options = TransferOptions(
        staging_bytes=5000,
        checksums=checksums,
        same_host="tcp" if transport == "stream" else "auto",
    )
    client = rig.client(rig.agent(ours, options))
    expected = snapshot(ours)
    for ticket in range(20):
        chance = random.Random(ticket)
        source = chance.choices(range(BLOCKS), k=11)
        destination = chance.sample(range(BLOCKS), k=11)
        expected = after_pull(expected, snapshot(kv_tensors(1)), source, destination)
        client.pull(ticket, [worker.address], source, destination)
        assert rig.answer().error is None
        assert torch.equal(snapshot(ours), expected)
    assert set(made) == {readers.MappedReader if transport == "gpu" else readers.StagedReader}
    # No GPU of another rank's may lose memory to a context of this worker's.
    worker.told.send_bytes(b"contexts?")
    assert [i for i, has in enumerate(worker.told.recv_bytes()) if has] == [peers_gpu]
    worker.kill()
    client.pull(99, [worker.address], [0], [1])
    assert rig.answer().error is not None


def test_copies_of_blocks_that_follow_each_other_on_both_sides_are_one() -> None:
    from llumnix.engine.kv.blocks_cuda import addresses

    far = torch.zeros(3, 16, 4, dtype=torch.int64)
    near = torch.zeros(3, 32, 4, dtype=torch.int64)
    froms, tos, sizes = addresses([(far, near)], [2, 3, 4, 9, 1], [7, 8, 9, 20, 21])
    block = 4 * 8
    assert sizes.tolist() == [3 * block, block, block] * 3
    layer, start = 16 * block, far.data_ptr()
    assert (froms - start).tolist() == [n * layer + b * block for n in range(3) for b in (2, 9, 1)]
    layer, start = 32 * block, near.data_ptr()
    assert (tos - start).tolist() == [n * layer + b * block for n in range(3) for b in (7, 20, 21)]


def test_blocks_that_do_not_lie_end_to_end_are_copied_one_by_one() -> None:
    from llumnix.engine.kv.blocks_cuda import addresses

    far = torch.zeros(2, 16, 8, dtype=torch.int32)[:, :, :4]
    near = torch.zeros(2, 16, 4, dtype=torch.int32)
    froms, tos, sizes = addresses([(far, near)], [2, 3], [5, 6])
    assert sizes.tolist() == [16] * 4
    assert (froms - far.data_ptr()).tolist() == [64, 96, 576, 608]
    assert (tos - near.data_ptr()).tolist() == [80, 96, 336, 352]
