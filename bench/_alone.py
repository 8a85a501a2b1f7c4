"""A pipeline of one stage in this process, for benchmarks of a single machine: the worker's Run without a network."""

import asyncio
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from verifier.commit import Request
from worker.batch import Batch
from worker.config import Serving
from worker.handoff import Handoff
from worker.job import JobFolder, JobState, Phase
from worker.recorder import Recorder, Summary
from worker.run import Run
from worker.stage import Captured, Stage

JOB = bytes(32)


class Silent(Recorder):
    """Records and commits to nothing: the other side of a comparison."""

    def rows(self, batch: Batch, captured: Captured, sent: object) -> None:
        pass

    def ended(self, requests: Sequence[int]) -> None:
        pass

    def finish(self) -> Summary:
        self.close()
        return Summary((), bytes(32), None, None)


class _Unsigned:
    """A single stage hands nothing on."""

    def sign_handoff(self, job: bytes, stage: int, root: bytes, leaves: int) -> bytes:
        raise ValueError("a single stage signs no hand-off")

    def verify_handoff(self, job: bytes, stage: int, handoff: Handoff) -> bool:
        return False


@dataclass(frozen=True)
class Served:
    """What came out, and what it took; CPU seconds are of all threads."""

    outputs: Sequence[Sequence[int]]
    seconds: float
    cpu_seconds: float

    @property
    def tokens(self) -> int:
        return sum(map(len, self.outputs))


def timed(work: Callable[[], Sequence[Sequence[int]]]) -> Served:
    wall, cpu = time.perf_counter(), time.process_time()
    outputs = work()
    return Served(outputs, time.perf_counter() - wall, time.process_time() - cpu)


def serve(
    stage: Stage, requests: Sequence[Request], serving: Serving, recorder_class: type[Recorder] = Recorder
) -> Served:
    """A batch, from its requests to the roots of traces that the disk has. The traces' removal, from a temporary
    folder, is not timed.
    """

    async def work(folder: Path) -> tuple[tuple[int, ...], ...]:
        job = JobFolder(folder, JOB)
        job.save_requests(requests)
        with ThreadPoolExecutor(1) as compute:
            state = JobState(Phase.SERVING, 0, 1)
            run = Run(job, state, requests, stage, serving, _Unsigned(), compute, None, "nobody", recorder_class)
            run.start()
            return (await run.finished).tokens

    with tempfile.TemporaryDirectory() as name:
        return timed(lambda: asyncio.run(work(Path(name))))
