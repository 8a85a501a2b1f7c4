"""Stages of one pipeline in this process: every Run hands its messages straight to the next one's `receive`, over the
wire's bytes.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

from verifier.commit import Request
from worker import ring_pb2 as pb
from worker.channel import Peer
from worker.config import Serving
from worker.handoff import Handoff
from worker.job import JobFolder, JobState, Phase
from worker.recorder import Recorder
from worker.run import Run
from worker.stage import Stage

JOB = bytes(range(32))


class Stamp:
    """A notary whose signatures are the signed words themselves."""

    def sign_handoff(self, job: bytes, stage: int, root: bytes, leaves: int) -> bytes:
        return job + bytes([stage]) + root + leaves.to_bytes(4, "big")

    def verify_handoff(self, job: bytes, stage: int, handoff: Handoff) -> bool:
        return handoff.signature == self.sign_handoff(job, stage, handoff.root, handoff.leaves)


class Wire:
    """A Link without a network."""

    def __init__(self, sender: str) -> None:
        self.sender = Peer(sender, sender, b"")
        self.target: Run | None = None
        self.sent: list[pb.Envelope] = []

    async def send(self, envelope: pb.Envelope) -> None:
        assert self.target is not None
        self.sent.append(envelope)
        await self.target.receive(self.sender, pb.Envelope.FromString(envelope.SerializeToString()))

    def drop(self, job: bytes, attempt: int) -> None:
        pass


def wire(
    data: Path,
    stages: Sequence[Stage],
    requests: Sequence[Request],
    serving: Serving,
    compute: ThreadPoolExecutor,
    recorder_class: type[Recorder] = Recorder,
) -> list[Run]:
    """Runs of all stages, linked in a ring, not started."""
    n = len(stages)
    wires = [Wire(f"stage {i}") for i in range(n)]
    runs = []
    for i, stage in enumerate(stages):
        state = JobState(Phase.SERVING, i, n)
        successor = wires[i] if n > 1 else None
        before = f"stage {(i - 1) % n}"
        folder = JobFolder(data / str(i), JOB)
        folder.save_requests(requests)
        runs.append(Run(folder, state, requests, stage, serving, Stamp(), compute, successor, before, recorder_class))
    for i, link in enumerate(wires):
        link.target = runs[(i + 1) % n]
    return runs


def split(folder: Path, layers: int, parts: int, stage_class: Callable[..., Stage] = Stage) -> list[Stage]:
    bounds = [round(i * layers / parts) for i in range(parts + 1)]
    return [stage_class(folder, first, end) for first, end in pairwise(bounds)]
