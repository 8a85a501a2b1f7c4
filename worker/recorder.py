"""Keeps and commits what the stage served, off the serving thread: traces to disk, hashes, the hand-offs of both its
ends.

One Recorder a job and attempt. Its thread takes microbatches from a bounded queue: if hashing or the disk falls behind,
serving waits.
"""

import json
import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from verifier.commit import Request, StageTree, TraceNode
from verifier.program import ModelShape
from verifier.sha256 import HASH_BYTES, HashTree
from verifier.trace import RequestTrace, tensor_keys
from worker.batch import Batch, Piece, Token
from worker.errors import JobFailed, OutOfRange
from worker.handoff import RowHandoff, TokenHandoff
from worker.job import write_bytes
from worker.landing import Landing, land
from worker.ledger import Ledger
from worker.stage import Captured, to_bits

# The smallest magnitude bits that read as invalid: 2^20 or an all-ones exponent (docs/canonical.md, "Decoding a
# float").
INVALID_BITS = (0x4980, 0x7C00, 0x49800000)
MAGNITUDE = (0x7FFF, 0x7FFF, 0x7FFFFFFF)

SYNCED_AT_ONCE = 4  # traces: disks take several files in little more time than one


@dataclass(frozen=True)
class Summary:
    """What a finished stage commits to and signs. Hand-offs are (root, number of records); None where there is none."""

    nodes: tuple[TraceNode, ...]
    root: bytes
    received: tuple[bytes, int] | None
    sent: tuple[bytes, int] | None


@dataclass(frozen=True)
class _Rows:
    batch: Batch
    captured: Landing
    sent: torch.Tensor | None
    size: int


@dataclass(frozen=True)
class _Tokens:
    tokens: tuple[Token, ...]


@dataclass(frozen=True)
class _Ended:
    requests: tuple[int, ...]


class Recorder:
    """`first_layer` .. `end_layer` of requests[r] go to `folder`/<r>.safetensors.

    Raises, from any method, what went wrong in its thread: OutOfRange, or JobFailed.
    """

    def __init__(
        self,
        shape: ModelShape,
        first_layer: int,
        end_layer: int,
        requests: Sequence[Request],
        folder: Path,
        *,
        queue_bytes: int = 256 * 2**20,
        alone: bool = False,
        drops: Callable[[int, RequestTrace], bool] | None = None,
    ) -> None:
        """queue_bytes: of tensors that wait to be recorded, if there is more than one microbatch; alone: the pipeline
        has one stage, so nothing is handed on; drops: whether a request's trace
        need not be stored.
        """
        self._shape = shape
        self._first_layer = first_layer
        self._end_layer = end_layer
        self._requests = requests
        self._folder = folder
        self._alone = alone
        self._drops = drops
        self._dtype = int(shape.served_dtype)
        # Traces that are dropped need no room on the disk, not even for a while.
        paths = None if drops is not None else lambda request: trace_path(folder, request)
        self._ledger = Ledger(shape, first_layer, end_layer, paths)
        self._nodes: dict[int, TraceNode] = {}
        self._roots: dict[int, bytes] = {}  # by request, those of its tensors in a row
        self._tokens = TokenHandoff()
        self._received = RowHandoff()
        self._sent = RowHandoff()
        self._handed: dict[int, list[npt.NDArray[Any]]] = {}  # by request in flight: what was sent of its prompt
        self._error: BaseException | None = None
        self._queue: queue.SimpleQueue[_Rows | _Tokens | _Ended | None] = queue.SimpleQueue()
        self._most_bytes = queue_bytes
        self._waiting_bytes = 0  # of rows; the other items are small, and their callers may not wait
        self.peak_bytes = 0
        self._room = threading.Condition()
        self._disk = ThreadPoolExecutor(SYNCED_AT_ONCE, thread_name_prefix="traces")
        self._syncs: deque[Future[None]] = deque()
        self._thread = threading.Thread(target=self._work, name="recorder", daemon=True)
        self._thread.start()

    def rows(self, batch: Batch, captured: Captured, sent: torch.Tensor | None) -> None:
        """One microbatch: what the forward captured, and what goes on to the successor, [rows, hidden]; waits while the
        queue is full.
        """
        self._check()
        size = sum(tensor.nbytes for tensor in captured.values())
        with self._room:
            self._room.wait_for(lambda: not self._waiting_bytes or self._waiting_bytes + size <= self._most_bytes)
            self._waiting_bytes += size
            self.peak_bytes = max(self.peak_bytes, self._waiting_bytes)
        self._put(_Rows(batch, land(captured), sent, size))

    def tokens(self, tokens: Sequence[Token]) -> None:
        """Output tokens as sent (last stage) or received (stage 0)."""
        self._put(_Tokens(tuple(tokens)))

    def ended(self, requests: Sequence[int]) -> None:
        """They get no further rows."""
        self._check()
        if requests:
            self._queue.put(_Ended(tuple(requests)))

    def finish(self) -> Summary:
        """Ends every request, waits for the thread. Each must have at least one position."""
        self.ended(range(len(self._requests)))
        self._put(None)
        self._thread.join()
        self._check()
        nodes = tuple(self._nodes[request] for request in range(len(self._requests)))
        first, last = self._first_layer == 0, self._end_layer == self._shape.layers
        received, sent = (self._tokens if first else self._received), (self._tokens if last else self._sent)
        return Summary(
            nodes,
            StageTree(nodes).root,
            None if self._alone else received.finish(),
            None if self._alone else sent.finish(),
        )

    def close(self) -> None:
        """Drops an attempt; see `join`."""
        self._error = self._error or JobFailed("the attempt was dropped")
        self._queue.put(None)

    def join(self) -> None:
        """Behind `close`: returns once nothing is written any more. Blocking."""
        self._thread.join()

    def _put(self, item: _Rows | _Tokens | _Ended | None) -> None:
        self._check()
        self._queue.put(item)

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        with self._disk:
            while True:
                item = self._queue.get()
                try:
                    if self._error is None:
                        self._record(item)
                except BaseException as error:  # carried to whoever calls next: a recorder that fails must fail the job
                    what = f"recorder: {type(error).__name__}: {error}"
                    self._error = error if isinstance(error, JobFailed) else JobFailed(what)
                if isinstance(item, _Rows):
                    with self._room:
                        self._waiting_bytes -= item.size
                        self._room.notify_all()
                if item is None:
                    return

    def _record(self, item: _Rows | _Tokens | _Ended | None) -> None:
        match item:
            case _Rows(batch, captured, sent, _):
                for piece in batch.pieces:
                    if piece.donor is not None:
                        self._share(piece, piece.donor)
                captured.wait()
                bits = {key: to_bits(tensor) for key, tensor in captured.tensors.items()}
                if self._ledger.add(batch, bits) >= INVALID_BITS[self._dtype]:
                    for key, rows in bits.items():
                        self._validate(batch, key, rows)
                if self._alone:
                    return
                owners, positions = batch.owners(), batch.positions()
                if self._first_layer > 0:
                    self._received.add(owners, positions, bits[f"{self._first_layer}.h"])
                if sent is not None:
                    handed = to_bits(sent)
                    self._sent.add(owners, positions, handed)
                    for piece, span in batch.spans():
                        if piece.first < len(self._requests[piece.request].prompt):
                            self._handed.setdefault(piece.request, []).append(handed[span].copy())
            case _Tokens(tokens):
                for token in tokens:
                    self._tokens.add(token.request, token.token)
            case _Ended(requests):
                self._finish_requests(requests)
            case None:
                write_bytes(roots_path(self._folder), b"".join(self._roots[r] for r in sorted(self._roots)))
                while self._syncs:
                    self._syncs.popleft().result()

    def _share(self, piece: Piece, donor: int) -> None:
        """Positions before the piece's are the donor's: the same rows, recorded and handed on as the request's own."""
        self._ledger.share(piece.request, donor, piece.first)
        if self._alone:
            return
        owners, positions = np.full(piece.first, piece.request), np.arange(piece.first)
        if self._first_layer > 0:
            rows = self._ledger.rows(donor, f"{self._first_layer}.h", piece.first)
            self._received.add(owners, positions, rows)
        if self._end_layer < self._shape.layers:
            handed = np.concatenate(self._handed[donor])[: piece.first]
            self._handed[piece.request] = [handed]
            self._sent.add(owners, positions, handed)

    def _validate(self, batch: Batch, key: str, rows: npt.NDArray[Any]) -> None:
        magnitudes = rows & MAGNITUDE[self._dtype]
        if magnitudes.max() >= INVALID_BITS[self._dtype]:
            row, column = (int(i) for i in np.argwhere(magnitudes >= INVALID_BITS[self._dtype])[0])
            piece, span = next((piece, span) for piece, span in batch.spans() if row < span.stop)
            raise OutOfRange(key, piece.request, piece.first + row - span.start, column)

    def _finish_requests(self, requests: Sequence[int]) -> None:
        left = [request for request in requests if request not in self._nodes]
        for request in left:
            self._handed.pop(request, None)
        keys = tensor_keys(self._shape, self._first_layer, self._end_layer)
        for request, taken in zip(left, self._ledger.take(left), strict=True):
            if self._error is not None:
                return  # the attempt was dropped meanwhile, and its successor waits
            roots = [taken.roots[key] for key in keys]
            self._roots[request] = b"".join(roots)
            self._nodes[request] = TraceNode(taken.positions, HashTree.of(roots).root)
            if taken.file is not None:
                self._later(taken.file.publish)
                continue
            trace = RequestTrace(self._shape, self._first_layer, self._end_layer, taken.arrays, taken.roots)
            assert self._drops is not None
            if not self._drops(request, trace):
                self._later(partial(trace.save, trace_path(self._folder, request)))

    def _later(self, sync: Callable[[], None]) -> None:
        """Begun here, or once there is room; done by `finish`."""
        if len(self._syncs) == SYNCED_AT_ONCE:
            self._syncs.popleft().result()
        self._syncs.append(self._disk.submit(sync))


def trace_path(folder: Path, request: int) -> Path:
    return folder / f"{request}.safetensors"


def load_roots(folder: Path, keys: Sequence[str]) -> list[dict[str, bytes]]:
    """Of each request's stored trace the roots of its tensors, by key. keys: all of the stage. Raises OSError."""
    if not roots_path(folder).exists() and (former := _former_roots(folder)):
        tables = [json.loads(path.read_bytes()) for path in former]
        return [{key: bytes.fromhex(root) for key, root in table.items()} for table in tables]
    told = roots_path(folder).read_bytes()
    each = [told[at : at + HASH_BYTES] for at in range(0, len(told), HASH_BYTES)]
    return [dict(zip(keys, each[at:], strict=False)) for at in range(0, len(each), len(keys))]


def has_roots(folder: Path) -> bool:
    """Whether all traces were recorded here, stored or not."""
    return roots_path(folder).exists() or bool(_former_roots(folder))


def roots_path(folder: Path) -> Path:
    return folder / "roots"


def _former_roots(folder: Path) -> list[Path]:
    """Of each request, as they were written before one file held them: jobs outlive a version."""
    return sorted(folder.glob("*.roots.json"), key=lambda path: int(path.name.partition(".")[0]))
