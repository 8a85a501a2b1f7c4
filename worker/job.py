"""What a worker keeps of a job on disk, in <data>/jobs/<job id>/: enough to answer for it after a restart.

requests.json   the prompts, as accepted          state.json      where the job stands, and what was signed
<r>.safetensors the trace of request r            (written before anything about it is signed; gone when it is over)
"""

import asyncio
import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from contracts.wire import parse_requests, request_json
from verifier.commit import Request, TraceNode
from worker import ring_pb2 as pb
from worker.errors import UnknownJob
from worker.handoff import Handoff

log = logging.getLogger("plumb.worker.job")

DISK_SECONDS = 1.0  # between attempts to write to a full one


class Phase(StrEnum):
    OPEN = "open"  # on chain, not yet accepted by us
    SIGNED = "signed"  # our acceptance is signed
    SERVING = "serving"  # accepted on chain by all stages
    SEALED = "sealed"  # our trace is final and our hand-off signed; no further attempt
    FINISHED = "finished"  # the predecessor's hand-off is verified too; our claim may be signed
    FAILED = "failed"
    CLOSED = "closed"  # paid, refunded or released: nothing left to do


@dataclass(frozen=True)
class JobState:
    """Stage `stage` of `stages`. Roots and signatures are raw bytes; JSON holds them as hex."""

    phase: Phase
    stage: int
    stages: int
    reason: str = ""
    attempt: int = 0
    nodes: tuple[TraceNode, ...] = ()  # SEALED and after
    root: bytes = b""
    sent: Handoff | None = None  # ours
    sent_sequence: int = 0  # of the Finish that carried it
    received: Handoff | None = None  # the predecessor's, verified; FINISHED and after
    tokens: tuple[tuple[int, ...], ...] = ()  # output tokens, at stage 0 and the last
    outputs: bytes = bytes(32)  # outputs root, last stage
    rings: int = 0  # pipelines that served the job before the one that this is of
    held_until: float = 0.0  # unix seconds by our clock, until which nothing is sealed: the job may be moved
    extra: dict[str, str] = field(default_factory=dict)  # e.g. transaction notes for people

    def finish_message(self, job: bytes) -> pb.Envelope:
        """What a sealed stage says last."""
        sent = self.sent
        assert sent is not None
        finish = pb.Finish(root=sent.root, leaves=sent.leaves, signature=sent.signature)
        return pb.Envelope(job=job, attempt=self.attempt, sequence=self.sent_sequence, finish=finish)

    def to(self, phase: Phase, **changes: Any) -> "JobState":
        return replace(self, phase=phase, **changes)


class JobFolder:
    def __init__(self, data: Path, job: bytes) -> None:
        self.job = job
        self.path = data / "jobs" / job.hex()

    def save_requests(self, requests: Sequence[Request]) -> None:
        self._write("requests.json", {"requests": [request_json(request) for request in requests]})

    def load_requests(self) -> list[Request]:
        """Raises UnknownJob."""
        return list(parse_requests(self.requests_json()))

    def requests_json(self) -> bytes:
        """The same as they lie on disk, which is as they go over the wire. Raises UnknownJob."""
        return self._read("requests.json")

    def drop_requests(self) -> None:
        """Raises OSError."""
        (self.path / "requests.json").unlink(missing_ok=True)

    def has_requests(self) -> bool:
        return (self.path / "requests.json").exists()

    def save_state(self, state: JobState) -> None:
        self._write("state.json", _plain(asdict(state)))

    def load_state(self) -> JobState:
        """Raises UnknownJob."""
        table = json.loads(self._read("state.json"))
        nodes = tuple(TraceNode(n["positions"], bytes.fromhex(n["tensors_root"])) for n in table.pop("nodes"))
        return JobState(
            phase=Phase(table.pop("phase")),
            nodes=nodes,
            root=bytes.fromhex(table.pop("root")),
            outputs=bytes.fromhex(table.pop("outputs")),
            tokens=tuple(tuple(ids) for ids in table.pop("tokens")),
            sent=_handoff(table.pop("sent")),
            received=_handoff(table.pop("received")),
            **table,
        )

    @property
    def over(self) -> bool:
        """Whether nothing is left to do."""
        try:
            return self.load_state().phase is Phase.CLOSED
        except UnknownJob:
            return False

    def drop_traces(self) -> None:
        """SAFETY: of a job that is over, or of an attempt that is given up: no lock answers for what they prove. Raises
        OSError.
        """
        for path in self.path.glob("*.safetensors*"):  # whole or in part
            path.unlink(missing_ok=True)

    def _read(self, name: str) -> bytes:
        try:
            return (self.path / name).read_bytes()
        except FileNotFoundError as error:
            raise UnknownJob(self.job) from error

    def _write(self, name: str, value: Any) -> None:
        """SAFETY: on disk before returning, as all that was written to this folder before it: so no signature can
        outlive the memory of having given it, nor the traces that it is about.
        """
        if not self.path.exists():
            self.path.mkdir(parents=True, exist_ok=True)
            for folder in (self.path.parent, self.path.parent.parent):
                _on_disk(folder)
        write_bytes(self.path / name, json.dumps(value).encode())
        _on_disk(self.path)


def write_bytes(path: Path, data: bytes) -> None:
    """Replaced in one step; on disk once its folder is. Raises OSError."""
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def _on_disk(folder: Path) -> None:
    """The names in it: a file that was written may still have its old one after a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


async def written(folder: JobFolder, state: JobState, before: JobState, note: Callable[[JobState], None]) -> None:
    """Returns once `state` is on disk: what is final is not given up because a disk is full. note: hears of the state
    that is in force.
    """
    while True:
        try:
            folder.save_state(state)
            note(state)
            return
        except OSError as error:
            log.error("job %s: not %s yet: %s", folder.job.hex()[:8], state.phase, error)
            note(replace(before, reason=str(error)))
        await asyncio.sleep(DISK_SECONDS)


def _handoff(table: Any) -> Handoff | None:
    if table is None:
        return None
    return Handoff(bytes.fromhex(table["root"]), table["leaves"], bytes.fromhex(table["signature"]))


def stored_jobs(data: Path) -> list[bytes]:
    """Ids of the jobs on disk."""
    folder = data / "jobs"
    return sorted(bytes.fromhex(path.name) for path in folder.iterdir()) if folder.exists() else []


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
