"""Ranks of several hosts, all of which are this machine, give the tokens of one and end together."""

from __future__ import annotations

import asyncio
import queue
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch

from engine.async_engine import AsyncEngine
from engine.config import EngineConfig
from engine.errors import RequestFailed, Unavailable
from engine.executor.hosts import HostRanks, HostsLauncher, Rendezvous
from engine.prompt import EngineInput
from engine.sampling_params import SamplingParams
from tests.engine import tiny

pytestmark = pytest.mark.processes

ANSWER = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
LONG = SamplingParams(temperature=0.0, max_tokens=900, ignore_eos=True)


@pytest.fixture(autouse=True)
def one_thread_per_rank(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    if torch.cuda.is_available():
        pytest.skip("each host would see the GPUs of all")


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return tiny.make_qwen2_vl(tmp_path_factory.mktemp("hosts"), gqa_ratio=2, seed=3)


class Group:
    """An engine on this host, and the ranks of other hosts, which find each other by a queue.

    Attributes:
        hosts: the ranks of the hosts beyond the first.
        ended: set when one of those has noticed an end.
    """

    def __init__(self, path: Path, size: int, hosts: int) -> None:
        self.hosts: list[HostRanks] = []
        self.ended = threading.Event()
        self.retracted = threading.Event()
        published: queue.Queue[Rendezvous] = queue.Queue()

        def join() -> None:
            rendezvous = published.get(timeout=60)
            for host in range(1, hosts):
                self.hosts.append(HostRanks(rendezvous, host, size // hosts, self.ended.set))

        joining = threading.Thread(target=join)
        if hosts > 1:
            joining.start()
        launcher = HostsLauncher("127.0.0.1", hosts, published.put, self.retracted.set, timeout_s=60)
        config = EngineConfig(
            model=str(path), tensor_parallel_size=size, max_model_len=1000, num_kv_blocks=80
        )
        self.engine = AsyncEngine(config, launcher)
        if hosts > 1:
            joining.join()

    def close(self) -> None:
        self.engine.shutdown()
        for host in self.hosts:
            host.stop()


def ranks() -> list[psutil.Process]:
    found = psutil.Process().children(recursive=True)
    return [process for process in found if "engine.executor.worker" in process.cmdline()]


async def tokens(
    engine: AsyncEngine, params: SamplingParams, on_first: Callable[[], None] | None = None
) -> list[int]:
    """The token ids of an answer; ``on_first`` is called when the first ones have come."""
    found: list[int] = []
    async for update in engine.generate("request", EngineInput([5, 6, 7, 8, 9]), params):
        for delta in update.deltas:
            found += delta.token_ids
        if on_first is not None:
            on_first, call = None, on_first
            call()
    return found


@pytest.fixture(scope="module")
def alone(path) -> list[int]:
    """The answer of one host with one rank."""
    group = Group(path, 1, 1)
    try:
        answer = asyncio.run(tokens(group.engine, ANSWER))
    finally:
        group.close()
    assert len(answer) == 40 and not group.retracted.is_set()
    return answer


async def test_hosts_together_give_the_tokens_of_one_and_end_with_the_first(path, alone):
    group = await asyncio.to_thread(Group, path, 4, 2)
    try:
        assert len(ranks()) == 3
        assert await tokens(group.engine, ANSWER) == alone
        await asyncio.to_thread(group.engine.shutdown)
        assert await asyncio.to_thread(group.ended.wait, 60)
    finally:
        await asyncio.to_thread(group.close)
    assert group.retracted.is_set() and not ranks()


async def test_a_host_that_is_lost_ends_the_others(path, alone):
    group = await asyncio.to_thread(Group, path, 2, 2)
    try:
        (process,) = ranks()
        assert await tokens(group.engine, ANSWER) == alone
        with pytest.raises((Unavailable, RequestFailed)):
            await tokens(group.engine, LONG, on_first=process.kill)
        with pytest.raises(Unavailable):
            group.engine.check_health()
        assert await asyncio.to_thread(group.ended.wait, 60)
        assert not group.hosts[0].alive
    finally:
        await asyncio.to_thread(group.close)
    assert group.retracted.is_set() and not ranks()


def launched(launcher: HostsLauncher) -> tuple[threading.Thread, list]:
    """``launcher.start(2)`` on a thread, and what comes of it."""
    result: list = []

    def start() -> None:
        try:
            result.extend(launcher.start(2))
        except Unavailable as error:
            result.append(error)

    thread = threading.Thread(target=start)
    thread.start()
    return thread, result


def test_strangers_are_turned_away_and_do_not_stand_in_the_way():
    published: queue.Queue[Rendezvous] = queue.Queue()
    launcher = HostsLauncher("127.0.0.1", 2, published.put, lambda: None, timeout_s=60)
    thread, connections = launched(launcher)
    rendezvous = published.get(timeout=60)
    with pytest.raises(Unavailable):
        HostRanks(Rendezvous(rendezvous.host, rendezvous.port, b"another key"), 1, 1, lambda: None)
    with socket.create_connection((rendezvous.host, rendezvous.port)) as stranger:
        stranger.sendall(b"\\0\\0\\0\\5hello")
        # The launcher may have turned the stranger away by now.
        with suppress(OSError):
            stranger.shutdown(socket.SHUT_WR)
    host = HostRanks(rendezvous, 1, 1, lambda: None)
    thread.join(60)
    try:
        (connection,) = connections
        option = socket.socket(fileno=connection.fileno())
        assert option.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert option.getsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, 16) == bytes(16)
        option.detach()
    finally:
        launcher.stop()
        host.stop()
    assert not ranks()


def test_hosts_that_do_not_come_are_named():
    gone = threading.Event()
    launcher = HostsLauncher("127.0.0.1", 2, lambda _: None, gone.set, timeout_s=0.1)
    thread, result = launched(launcher)
    thread.join(60)
    (error,) = result
    assert isinstance(error, Unavailable) and "[1]" in str(error) and gone.is_set()
