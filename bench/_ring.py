"""A ring of stages on this machine for bench/ring.py: a process each, the worker's own Run, Link and Ring over gRPC and
mutual TLS, and between neighbours a relay that holds every byte back for the hop's latency, both ways.
"""

import asyncio
import json
import math
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from verifier.commit import Request
from verifier.trace import tensor_keys, tensor_width
from worker import ring_pb2 as pb
from worker import tls
from worker.batch import Batch, Token
from worker.cache import Cache
from worker.channel import Peer
from worker.config import Serving
from worker.grpc_channel import Link, Ring
from worker.handoff import Handoff
from worker.job import JobFolder, JobState, Phase
from worker.run import Run
from worker.sampler import Draw
from worker.stage import Captured, Stage

JOB = bytes(32)
MESSAGE_BYTES = 64 * 2**20
PATIENCE_SECONDS = 600

Build = Callable[[], Stage]


@dataclass(frozen=True)
class Returned:
    """One microbatch back at stage 0: `seconds` by the clock, tokens, microbatches that may be in flight, and what the
    stages told of their times.
    """

    seconds: float
    tokens: int
    microbatches: int
    busy_seconds: float
    slowest_seconds: float


class EmulatedStage(Stage):
    """Takes its time and computes nothing: it hands on what came, and the rest of its trace is zeros, recorded and
    committed as ever.
    """

    seconds = 0.020

    def forward(self, hidden: torch.Tensor, batch: Batch, cache: Cache) -> tuple[torch.Tensor, Captured]:
        end = time.perf_counter() + self.seconds
        keys = tensor_keys(self.shape, self.first_layer, self.end_layer)
        dtype = hidden.dtype
        captured = {key: torch.zeros(batch.rows, tensor_width(self.shape, key), dtype=dtype) for key in keys}
        captured[f"{self.first_layer}.h"] = hidden  # as signed for by the stage before
        time.sleep(max(0.0, end - time.perf_counter()))
        return hidden, captured

    def tokens(self, hidden: torch.Tensor, draws: Sequence[Draw] = ()) -> list[int]:
        return [1] * len(hidden)


class _Stamp:
    """Signs with nothing: no chain stands behind a benchmark."""

    def sign_handoff(self, job: bytes, stage: int, root: bytes, leaves: int) -> bytes:
        return root

    def verify_handoff(self, job: bytes, stage: int, handoff: Handoff) -> bool:
        return handoff.signature == handoff.root


class _WatchedRun(Run):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.returned: list[Returned] = []

    async def _returned_tokens(self) -> tuple[list[Token], pb.Times]:
        tokens, times = await super()._returned_tokens()
        now, in_flight = time.perf_counter(), self.pace.microbatches
        self.returned.append(Returned(now, len(tokens), in_flight, times.busy / 1e6, times.slowest / 1e6))
        return tokens, times


def measure(
    builds: Sequence[Build],
    requests: Sequence[Request],
    serving: Serving,
    latencies_seconds: Sequence[float],
    cores: Sequence[int | None] = (),
) -> list[Returned]:
    """Serves the batch; what came back to stage 0. latencies_seconds[i]: one way, from stage i to the next; cores[i]:
    the one it keeps to.
    """
    # Rationale: a process that has used gRPC can't be forked; the server that forks here only imports it.
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["bench._ring"])
    with tempfile.TemporaryDirectory() as name:
        folder, n = Path(name), len(builds)
        for i in range(n):
            tls.create(folder / f"{i}.pem", folder / f"{i}.key")
        doors, processes = [], []
        for i, build in enumerate(builds):
            ours, theirs = server.Pipe()
            core = cores[i] if cores else None
            process = server.Process(target=_stage, args=(i, n, build, requests, serving, folder, theirs, core))
            process.start()
            theirs.close()  # so that a stage that is gone is noticed
            doors.append(ours)
            processes.append(process)
        try:
            answer: dict[str, Any] = asyncio.run(_conduct(doors, latencies_seconds))
            for process in processes:
                process.join(PATIENCE_SECONDS)
        finally:
            for process in processes:
                process.kill()
    return [Returned(*row) for row in answer["returned"]]


async def _conduct(doors: Sequence[Connection], latencies_seconds: Sequence[float]) -> dict[str, Any]:
    """Tells every stage where its successor is, a relay in between; waits until all are done. Stage 0's answer."""
    ports = [(await _read(door))["port"] for door in doors]
    relays = []
    for i, door in enumerate(doors):
        before, port = await relay(ports[(i + 1) % len(doors)], latencies_seconds[i])
        relays.append(before)
        door.send_bytes(json.dumps({"port": port}).encode())
    answers = [await _read(door) for door in doors]
    for door in doors:
        door.send_bytes(b"{}")
    for before in relays:
        before.close()
    return answers[0]


async def _read(door: Connection) -> dict[str, Any]:
    """Raises EOFError if the process is gone."""

    def wait() -> dict[str, Any]:
        if not door.poll(PATIENCE_SECONDS):
            raise TimeoutError(f"a stage said nothing for {PATIENCE_SECONDS} s")
        answer: dict[str, Any] = json.loads(door.recv_bytes())
        return answer

    return await asyncio.to_thread(wait)


async def relay(target: int, latency_seconds: float, bytes_per_second: float = math.inf) -> tuple[asyncio.Server, int]:
    """Before a port of this machine: a slow link, alike both ways. (It, its own port.)"""
    tasks = set()

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        waiting: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

        async def take() -> None:
            free = 0.0
            while data := await reader.read(2**16):
                free = max(free, time.monotonic()) + len(data) / bytes_per_second
                waiting.put_nowait((free + latency_seconds, data))
            waiting.put_nowait((max(free, time.monotonic()) + latency_seconds, b""))

        taking = asyncio.create_task(take())
        try:
            while True:
                due, data = await waiting.get()
                if (left := due - time.monotonic()) > 0:
                    await asyncio.sleep(left)
                if not data:
                    break
                writer.write(data)
                await writer.drain()
        except OSError:
            pass  # the other side is gone: so is this connection
        finally:
            taking.cancel()
            writer.close()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        onward_reader, onward_writer = await asyncio.open_connection("127.0.0.1", target)
        for ends in ((reader, onward_writer), (onward_reader, writer)):
            task = asyncio.create_task(pump(*ends))
            tasks.add(task)
            task.add_done_callback(tasks.discard)

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    return server, server.sockets[0].getsockname()[1]


def _stage(
    place: int,
    stages: int,
    build: Build,
    requests: Sequence[Request],
    serving: Serving,
    folder: Path,
    door: Connection,
    core: int | None,
) -> None:
    """The process of one stage."""
    if core is not None:
        os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    asyncio.run(_serve(place, stages, build(), requests, serving, folder, door))


async def _serve(
    place: int,
    stages: int,
    stage: Stage,
    requests: Sequence[Request],
    serving: Serving,
    folder: Path,
    door: Connection,
) -> None:
    def identity(i: int) -> tuple[bytes, bytes]:
        return (folder / f"{i}.pem").read_bytes(), (folder / f"{i}.key").read_bytes()

    def peer(i: int) -> Peer:
        return Peer(f"stage {i}", f"stage {i}", identity(i)[0])

    ready: asyncio.Future[_WatchedRun] = asyncio.get_running_loop().create_future()

    async def handler(sender: Peer, envelope: pb.Envelope) -> None:
        await (await asyncio.shield(ready)).receive(sender, envelope)

    ring = Ring(*identity(place), handler, MESSAGE_BYTES)
    ring.admit(peer((place - 1) % stages))
    port = await ring.start("127.0.0.1:0")
    door.send_bytes(json.dumps({"port": port}).encode())
    address = f"127.0.0.1:{(await _read(door))['port']}"
    link = Link(peer((place + 1) % stages), address, *identity(place), MESSAGE_BYTES)
    job = JobFolder(folder / str(place), JOB)
    job.save_requests(requests)
    with ThreadPoolExecutor(1) as compute:
        state = JobState(Phase.SERVING, place, stages)
        run = _WatchedRun(job, state, requests, stage, serving, _Stamp(), compute, link, "the stage before")
        ready.set_result(run)
        run.start()
        await run.finished
        returned = [list(vars(row).values()) for row in run.returned]
        door.send_bytes(json.dumps({"returned": returned}).encode())
        await _read(door)
    await link.close()
    await ring.stop()
