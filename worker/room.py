"""What a stage has room for, asked before it signs: keys and values of each request, jobs at a time, their traces."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from contracts.client import Job
from verifier.commit import Request
from worker.admission import check_disk, check_requests
from worker.config import Serving
from worker.errors import Refused
from worker.homes import largest
from worker.retain import position_bytes
from worker.stage import Stage


class Room:
    """data: the folder on whose disk the traces are."""

    def __init__(self, stage: Stage, serving: Serving, data: Path) -> None:
        self._shape = stage.shape
        self._data = data
        self._most_jobs = serving.max_jobs
        self._position_bytes = position_bytes(stage, serving.retain)
        self.most_positions = min(
            stage.shape.max_positions, largest(serving.cache_positions, serving.swap_positions)
        )  # of one request: what the model takes, and what there is room for

    def check_requests(self, job: Job, requests: Sequence[Request]) -> None:
        """Whether these are the job's, and can be served here. Raises Refused."""
        check_requests(job, requests, self._shape, self.most_positions)

    def check_jobs(self, jobs: Sequence[Job]) -> None:
        """Whether these have room beside each other, their traces too. Blocking. Raises Refused."""
        if len(jobs) > self._most_jobs:
            raise Refused(f"jobs: expected at most {self._most_jobs} at a time, came {len(jobs)}")
        positions = sum(job.prompt_tokens + job.max_tokens for job in jobs)
        check_disk(positions * self._position_bytes, shutil.disk_usage(self._data).free)
