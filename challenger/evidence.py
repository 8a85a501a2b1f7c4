"""What a committed job is made of, complete or in part, and where it lies on disk.

What is on disk was checked against roots on chain before it got its name there, and its digest was kept: a game that
began is played from disk alone, the accused may stop serving, this process may be killed, and a disk that changes a bit
is noticed before money is put on it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import numpy as np

from challenger.strategy import Cell
from contracts.client import Chain
from contracts.records import Job, Stage
from verifier.audit import Verdict
from verifier.commit import Output, OutputsTree, Request, RequestsTree, StageTree
from verifier.linear import Bits
from verifier.referee.codec import Opening
from verifier.sha256 import HASH_BYTES, HashTree, leaf_hashes
from verifier.shape import ModelShape
from verifier.trace import RequestTrace, tensor_keys, tensor_width

PIECE_BYTES = 1024

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


class CorruptEvidence(Unavailable):
    """A file that is not what was written; names it and both digests."""

    def __init__(self, path: Path, expected: str, actual: str) -> None:
        super().__init__(f"corrupt evidence: {path}: expected digest {expected}, the file has {actual}")
        self.path = path


class Ledger(Protocol):
    """Remembers what was written: the digest, hex, of each file of a job (challenger/store.py)."""

    def digest(self, job: str, name: str) -> str | None: ...
    def keep(self, job: str, name: str, size: int, sha256: str) -> None: ...
    def drop(self, job: str) -> None: ...


class Memory:
    """A Ledger that lasts as long as its process."""

    def __init__(self) -> None:
        self._digests: dict[tuple[str, str], str] = {}

    def digest(self, job: str, name: str) -> str | None:
        return self._digests.get((job, name))

    def keep(self, job: str, name: str, size: int, sha256: str) -> None:
        self._digests[job, name] = sha256

    def drop(self, job: str) -> None:
        self._digests = {key: digest for key, digest in self._digests.items() if key[0] != job}


class Archive:
    """One folder a job. Files appear whole or not at all, and are what the ledger says of them, or CorruptEvidence."""

    def __init__(self, folder: Path, ledger: Ledger | None = None) -> None:
        self.folder = folder
        self.ledger = ledger or Memory()
        self._checked: set[Path] = set()

    def read(self, job: bytes, name: str) -> bytes | None:
        """None for what was never written. Raises CorruptEvidence."""
        path = self.folder / job.hex() / name
        if not self._sound(job, path):
            return None
        return path.read_bytes()

    def write(self, job: bytes, name: str, data: bytes) -> None:
        path = self.folder / job.hex() / name
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_bytes(data)
        self._publish(job, part, path)

    def save(self, job: bytes, name: str, trace: RequestTrace) -> None:
        path = self.folder / job.hex() / name
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        trace.save(part)
        self._publish(job, part, path)

    def names(self, job: bytes) -> set[str]:
        """The files of a job."""
        folder = self.folder / job.hex()
        return {path.name for path in folder.iterdir()} if folder.exists() else set()

    def holds(self, job: bytes, name: str) -> bool:
        """Whether a file is there, unread."""
        return self.ledger.digest(job.hex(), name) is not None and (self.folder / job.hex() / name).exists()

    def trace_path(self, job: bytes, name: str) -> Path:
        """The file of a trace, once it was found to be what was written. Raises Unavailable, CorruptEvidence."""
        path = self.folder / job.hex() / name
        if not self._sound(job, path):
            raise Unavailable(f"{path} is not on disk")
        return path

    def doubt(self, job: bytes) -> None:
        """Has every file of a job compared with its digest again when it is read next: before money is put on it."""
        self._checked = {path for path in self._checked if path.parent.name != job.hex()}

    def delete(self, job: bytes, name: str) -> None:
        self.remove(self.folder / job.hex() / name)

    def remove(self, path: Path) -> None:
        self._checked.discard(path)
        path.unlink(missing_ok=True)

    def jobs(self) -> set[str]:
        """Ids, hex, of the jobs that have a folder."""
        return {path.name for path in self.folder.iterdir()} if self.folder.exists() else set()

    def forget(self, job: bytes) -> None:
        self.doubt(job)
        shutil.rmtree(self.folder / job.hex(), ignore_errors=True)
        self.ledger.drop(job.hex())

    def _publish(self, job: bytes, part: Path, path: Path) -> None:
        """The digest first: a file without one counts as not there."""
        self.ledger.keep(job.hex(), path.name, part.stat().st_size, _digest(part))
        os.replace(part, path)
        self._checked.add(path)

    def _sound(self, job: bytes, path: Path) -> bool:
        """Whether a file is there. Raises CorruptEvidence."""
        if path in self._checked and path.exists():
            return True
        expected = self.ledger.digest(job.hex(), path.name)
        if expected is None or not path.exists():
            return False
        actual = _digest(path)
        if actual != expected:
            raise CorruptEvidence(path, expected, actual)
        self._checked.add(path)
        return True


def _digest(path: Path) -> str:
    """Root of the tree of SHA-256 over a file's pieces: sixteen are hashed at a time, which takes a third of the time
    of one hash over all of it on a processor without instructions for SHA.
    """
    data = np.fromfile(path, np.uint8)
    whole = len(data) // PIECE_BYTES * PIECE_BYTES
    parts = [leaf_hashes(data[:whole], PIECE_BYTES)] if whole else []
    if whole < len(data):
        parts.append(leaf_hashes(data[whole:], len(data) - whole))
    return HashTree(np.concatenate(parts)).root.hex() if parts else ""


def trace_name(stage: int, request: int) -> str:
    """The file of one request's tensors at one stage."""
    return f"{stage}-{request}.safetensors"


def part_name(stage: int, request: int, key: str) -> str:
    """The file of one tensor alone."""
    return f"{stage}-{request}-{key}.bits"


class TensorRoots:
    """What a stage's records say of the roots of its tensors, parsed once for all of its requests.

    Whether they are the roots that it committed to is for the caller to see. Keeps 32 bytes a tensor, whatever came.
    """

    def __init__(self, body: bytes, keys: Sequence[str]) -> None:
        """body: of `GET .../trace`; keys: the stage's tensors, in their order. Raises Unavailable."""
        self._keys = tuple(keys)
        try:
            told = json.loads(body)["requests"]
            self._joined = [self._joined_of(item) for item in told]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise Unavailable(f"trace: expected a list of requests: {error!r}") from error

    def of(self, request: int) -> dict[str, bytes]:
        """A request's roots by tensor, in their order. Raises Unavailable."""
        joined = self._joined[request] if request < len(self._joined) else b""
        if not joined:
            raise Unavailable(f"trace: request {request}: expected a root of {HASH_BYTES} bytes for each tensor")
        return {key: joined[HASH_BYTES * i : HASH_BYTES * (i + 1)] for i, key in enumerate(self._keys)}

    def _joined_of(self, item: Any) -> bytes:
        """Nothing where one is missing or malformed: only who asks for this request is concerned."""
        try:
            roots = [bytes.fromhex(item["roots"][key]) for key in self._keys]
        except (ValueError, KeyError, TypeError):
            return b""
        return b"".join(roots) if all(len(root) == HASH_BYTES for root in roots) else b""


class _Absent:
    """In place of an array that is not on disk.

    SAFETY: nothing stands in for its values. Zeros would be judged, and a bond put on an honest stage.
    """

    def __init__(self, why: str, shape: tuple[int, int], dtype: np.dtype[Any]) -> None:
        self._why, self.shape, self.dtype = why, shape, dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, _: object) -> Any:
        raise Unavailable(self._why)

    def __array__(self, *_: object, **__: object) -> Any:
        raise Unavailable(self._why)


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

    stage_trees: None for a stage that gave no records; held: whether all its tensors are on disk; parts: tensors that
    are, by stage and request, where not all were asked for. missing: what was asked for and did not come, one sentence
    a stage. plan: the strategy; drawn: the cells that are to be judged, None: all. seed: secret and younger than the
    commitment, b"" for none; one_in: of so many positions one has its MLP judged. closer: the requests that were asked
    for whole, where not all were; roots: what stages' records say of their tensors' roots, once it was read.
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
    parts: Mapping[tuple[int, int], frozenset[str]] = field(default_factory=dict)
    plan: str = "full"
    drawn: tuple[Cell, ...] | None = None
    seed: bytes = b""
    one_in: int = 1
    closer: tuple[int, ...] = ()
    roots: dict[int, TensorRoots] = field(default_factory=dict)

    def tree(self, stage: int) -> StageTree:
        """Raises Unavailable."""
        found = self.stage_trees[stage]
        if found is None:
            raise Unavailable(f"the records of stage {stage} are not on disk")
        return found

    def has(self, stage: int, request: int, keys: Iterable[str]) -> bool:
        """Whether these tensors are on disk: of a stage that broke off, a trace has others alone."""
        return self.held[stage] or self.parts.get((stage, request), frozenset()).issuperset(keys)

    def trace(self, stage: int, request: int) -> RequestTrace | None:
        """One request's tensors at one stage, mapped into memory; None where the stage gave none.

        Raises CorruptEvidence. Who reads a tensor that is not on disk (`has`) gets Unavailable.
        """
        if self.held[stage]:
            return RequestTrace.load(self.archive.trace_path(self.id, trace_name(stage, request)), self.shape)
        keys, tree = self.parts.get((stage, request), frozenset()), self.stage_trees[stage]
        if not keys or tree is None:
            return None
        place, positions = self.stages[stage], tree.nodes[request].positions
        roots = self.roots_of(stage, request)
        dtype = np.dtype(f"<u{self.shape.served_dtype.size}")
        arrays: dict[str, Bits] = {}
        for key in roots:
            size = (positions, tensor_width(self.shape, key))
            if key in keys:
                path = self.archive.trace_path(self.id, part_name(stage, request, key))
                arrays[key] = np.memmap(path, dtype, "r", shape=size)
            else:
                arrays[key] = cast(Bits, _Absent(f"{part_name(stage, request, key)} is not on disk", size, dtype))
        return RequestTrace(self.shape, place.first_layer, place.end_layer, arrays, roots)

    def roots_of(self, stage: int, request: int) -> dict[str, bytes]:
        """By tensor. Raises Unavailable."""
        if stage not in self.roots:
            body, place = self.archive.read(self.id, f"nodes-{stage}.json"), self.stages[stage]
            if body is None:
                raise Unavailable(f"the records of stage {stage} are not on disk")
            keys = tensor_keys(self.shape, place.first_layer, place.end_layer)
            self.roots[stage] = TensorRoots(body, keys)
        return self.roots[stage].of(request)


def received(evidence: Dossier, verdict: Verdict) -> bool:
    """Whether a LINK is one between two stages: the receiver is accused."""
    return evidence.stages[verdict.stage].first_layer == verdict.layer + 1
