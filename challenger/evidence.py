"""What a committed job is made of, complete or in part, and where it lies on disk.

What is on disk was checked against roots on chain before it got its name there, so a game that began is played from
disk alone: the accused may stop serving, and this process may be killed.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from contracts.client import Chain
from contracts.records import Job, Stage
from verifier.audit import Verdict
from verifier.commit import Output, OutputsTree, Request, RequestsTree, StageTree
from verifier.referee.codec import Opening
from verifier.shape import ModelShape
from verifier.trace import RequestTrace

T_co = TypeVar("T_co", covariant=True)


class Unavailable(Exception):
    """A party did not give what it owes; names the party and says what was expected."""


@dataclass(frozen=True)
class Facts:
    """What the chain says of a committed job."""

    id: bytes
    job: Job
    stages: tuple[Stage, ...]
    urls: tuple[str, ...]
    outputs_root: bytes
    tokens: int
    roots: tuple[bytes, ...]


def read_facts(chain: Chain, id: bytes) -> Facts:
    """Raises ContractsError."""
    job = chain.escrow.job(id)
    stages = chain.workers.pipeline_stages(job.pipeline)
    outputs_root, tokens = chain.escrow.outputs(id)
    urls = tuple(chain.workers.worker(stage.worker).url.rstrip("/") for stage in stages)
    roots = tuple(chain.escrow.root(id, index) for index in range(len(stages)))
    return Facts(id, job, stages, urls, outputs_root, tokens, roots)


class Archive:
    """One folder a job. Files appear whole or not at all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, job: bytes, name: str) -> bytes | None:
        try:
            return (self.folder / job.hex() / name).read_bytes()
        except FileNotFoundError:
            return None

    def write(self, job: bytes, name: str, data: bytes) -> None:
        path = self.folder / job.hex() / name
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_bytes(data)
        os.replace(part, path)

    def save(self, job: bytes, stage: int, request: int, trace: RequestTrace) -> None:
        path = self.trace_path(job, stage, request)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        trace.save(part)
        os.replace(part, path)

    def trace_path(self, job: bytes, stage: int, request: int) -> Path:
        return self.folder / job.hex() / f"{stage}-{request}.safetensors"

    def jobs(self) -> set[str]:
        """Ids, hex, of the jobs that have a folder."""
        return {path.name for path in self.folder.iterdir()} if self.folder.exists() else set()

    def forget(self, job: bytes) -> None:
        shutil.rmtree(self.folder / job.hex(), ignore_errors=True)


class RecordsTree(Protocol):
    """What opens request or output records: a tree of verifier.commit, or what was posted of one."""

    def record_opening(self, r: int) -> Opening: ...
    def token_opening(self, r: int, index: int) -> Opening: ...


class NodesTree(Protocol):
    """What opens a stage's trace nodes."""

    def opening(self, r: int) -> Opening: ...


class OfEach(Protocol[T_co]):
    """One item a request."""

    def __len__(self) -> int: ...
    def __getitem__(self, r: int, /) -> T_co: ...


class Dossier(Protocol):
    """What a game is played from: an Evidence, or what demands brought to light (challenger/posted.py)."""

    @property
    def id(self) -> bytes: ...
    @property
    def stages(self) -> tuple[Stage, ...]: ...
    @property
    def requests(self) -> OfEach[Request]: ...
    @property
    def requests_tree(self) -> RecordsTree: ...
    @property
    def outputs_tree(self) -> RecordsTree: ...
    def tree(self, stage: int) -> NodesTree: ...
    def trace(self, stage: int, request: int) -> RequestTrace | None: ...


@dataclass(frozen=True)
class Evidence:
    """A committed job, matching its roots.

    stage_trees: None for a stage that gave no records; held: whether all its tensors are on disk. missing: why not,
    one sentence a stage.
    """

    id: bytes
    job: Job
    stages: tuple[Stage, ...]
    requests: tuple[Request, ...]
    outputs: tuple[Output, ...]
    tokens: int  # output tokens, as billed on chain
    requests_tree: RequestsTree
    outputs_tree: OutputsTree
    stage_trees: tuple[StageTree | None, ...]
    held: tuple[bool, ...]
    missing: tuple[str, ...]
    shape: ModelShape
    archive: Archive

    def tree(self, stage: int) -> StageTree:
        """Raises Unavailable."""
        found = self.stage_trees[stage]
        if found is None:
            raise Unavailable(f"the records of stage {stage} are not on disk")
        return found

    def trace(self, stage: int, request: int) -> RequestTrace | None:
        """One request's tensors at one stage, mapped into memory; None where the stage gave none."""
        if not self.held[stage]:
            return None
        return RequestTrace.load(self.archive.trace_path(self.id, stage, request), self.shape)


def received(evidence: Dossier, verdict: Verdict) -> bool:
    """Whether a LINK is one between two stages: the receiver is accused."""
    return evidence.stages[verdict.stage].first_layer == verdict.layer + 1
