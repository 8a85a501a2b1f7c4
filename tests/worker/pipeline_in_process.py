"""A batch served by the stages of one pipeline in this process, and what tests of it share."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from bench._pipeline import JOB as JOB
from bench._pipeline import Stamp as Stamp
from bench._pipeline import split as split
from bench._pipeline import wire as wire
from verifier.commit import Request
from worker.config import Bounds, Serving
from worker.job import JobState
from worker.stage import Stage

T = TypeVar("T")

Tiny = tuple[Path, Any]  # a model's folder, and the model in transformers
Greedy = Callable[[Any, Request], list[int]]


async def within(seconds: float, awaited: Awaitable[T]) -> T:
    async with asyncio.timeout(seconds):
        return await awaited


def telling(*bounds: Bounds) -> Callable[[], Awaitable[Sequence[Bounds]]]:
    """For stage 0: that the other stages have this much room."""

    async def ready() -> Sequence[Bounds]:
        return bounds

    return ready


def serve(
    data: Path, stages: Sequence[Stage], requests: Sequence[Request], serving: Serving | None = None
) -> list[JobState]:
    """Serves the batch; the final states of all stages."""
    chosen = replace(serving or Serving(max_rows=16), stall_seconds=20.0)

    async def work() -> list[JobState]:
        with ThreadPoolExecutor(1) as compute:
            runs = wire(data, stages, requests, chosen, compute)
            for run in runs:
                run.start()
            return list(await within(900, asyncio.gather(*(run.finished for run in runs))))

    return asyncio.run(work())
