"""A pipeline of one stage in this process, for benchmarks of a single machine: the worker's Run without a network."""

import asyncio
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
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

    def ended(self, request: int) -> None:
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


def serve(
    stage: Stage, requests: Sequence[Request], serving: Serving, recorder_class: type[Recorder] = Recorder
) -> tuple[tuple[int, ...], ...]:
    """The outputs of a batch. Traces go to a temporary folder that is gone afterwards."""

    async def work(folder: Path) -> tuple[tuple[int, ...], ...]:
        job = JobFolder(folder, JOB)
        job.save_requests(requests)
        with ThreadPoolExecutor(1) as compute:
            state = JobState(Phase.SERVING, 0, 1)
            run = Run(job, state, requests, stage, serving, _Unsigned(), compute, None, "nobody", recorder_class)
            run.start()
            return (await run.finished).tokens

    with tempfile.TemporaryDirectory() as name:
        return asyncio.run(work(Path(name)))
