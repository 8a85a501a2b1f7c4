"""Traces that are computed again instead of stored: what a stage keeps of a request then, and how it gets the rest.

INVARIANT: a trace is dropped only by a stage that computed it again and got the same bits, for this request or, where
only a share is looked at, for the others; from the first that differs on, the job's traces are stored.

Kept of a request: the roots of its tensors; where the stage is not the first, the rows that came to it. The first one's
are the embeddings of prompt and tokens, which every job keeps.
"""

import logging
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from verifier.commit import Request
from verifier.safetensors_file import Bits, SafetensorsFile, write
from verifier.trace import RequestTrace, tensor_keys, tensor_width
from worker.config import Serving
from worker.errors import NotRepeated
from worker.job import JobFolder
from worker.recorder import Recorder, has_roots, trace_path
from worker.repeat import RepeatableStage
from worker.stage import Stage, to_bits

log = logging.getLogger("plumb.worker.retain")


def position_bytes(stage: Stage, retain: str) -> int:
    """Of what is stored of a position, where traces that are to be computed again can be."""
    keys = tensor_keys(stage.shape, stage.first_layer, stage.end_layer)
    if retain == "regenerate":
        keys = [f"{stage.first_layer}.h"] if stage.first_layer > 0 else []
    return stage.shape.served_dtype.size * sum(tensor_width(stage.shape, key) for key in keys)


class Retention:
    """Of one job and attempt. `drops` says of each finished request whether its trace need not be stored."""

    def __init__(self, stage: Stage, folder: Path, checked: float) -> None:
        """checked: the share of requests, 0 .. 1, that are computed again; the first always is."""
        self._stage = stage
        self._folder = folder
        self._checked = checked
        self._told = False
        self._due = 1.0 - checked
        self.stored_because = "" if isinstance(stage, RepeatableStage) else f"{type(stage).__name__} repeats nothing"

    def drops(self, request: int, trace: RequestTrace) -> bool:
        """Keeps what `Traces` needs, if so. Raises OSError."""
        if isinstance(self._stage, RepeatableStage) and not self.stored_because and self._is_due():
            again = self._stage.regenerate(trace.arrays[_inputs_key(trace)])
            differing = [key for key in trace.keys if not np.array_equal(again[key], trace.arrays[key])]
            if differing:
                self.stored_because = f"request {request}: {differing[0]} comes out differently when computed again"
        if self.stored_because:
            if not self._told:
                log.warning("traces are stored: %s", self.stored_because)
            self._told = True
            _inputs_path(self._folder, request).unlink(missing_ok=True)
            return False
        key = _inputs_key(trace)
        if trace.first_layer > 0:
            write(_inputs_path(self._folder, request), trace.shape.served_dtype, {key: trace.arrays[key]}, {})
        trace_path(self._folder, request).unlink(missing_ok=True)  # of an attempt that was given up
        return True

    def _is_due(self) -> bool:
        self._due += self._checked
        if self._due < 1.0:
            return False
        self._due -= 1.0
        return True


def new_recorder(
    kind: type[Recorder], stage: Stage, requests: Sequence[Request], folder: Path, serving: Serving, *, alone: bool
) -> Recorder:
    """Of one attempt. alone: the pipeline has one stage."""
    retention = Retention(stage, folder, serving.regenerate_checked) if serving.retain == "regenerate" else None
    return kind(
        stage.shape,
        stage.first_layer,
        stage.end_layer,
        requests,
        folder,
        queue_bytes=serving.recorder_bytes,
        alone=alone,
        drops=None if retention is None else retention.drops,
    )


class Traces:
    """What a worker committed to: from disk, or computed again and looked at once more before it is told. Threads may
    share one.
    """

    def __init__(self, stage: Stage, most_bytes: int = 512 * 2**20) -> None:
        """most_bytes: of traces kept after they were computed again, if there is more than one."""
        self._stage = stage
        self._most_bytes = most_bytes
        self._held: OrderedDict[tuple[bytes, int], RequestTrace] = OrderedDict()
        self._lock = threading.Lock()

    def load(self, folder: JobFolder, request: int) -> RequestTrace:
        """Blocking. Raises NotRepeated, UnknownJob, OSError, ValueError."""
        path = trace_path(folder.path, request)
        if path.exists() or not has_roots(folder.path):
            return RequestTrace.load(path, self._stage.shape)
        with self._lock:
            name = (folder.job, request)
            trace = self._held.get(name)
            if trace is None:
                trace = self._held[name] = self._again(folder, request)
            self._held.move_to_end(name)
            while len(self._held) > 1 and sum(map(_size, self._held.values())) > self._most_bytes:
                self._held.popitem(last=False)
            return trace

    def inputs(self, folder: JobFolder, request: int) -> Bits:
        """[positions, hidden] raw bits: what came to the first own layer. As load."""
        key = f"{self._stage.first_layer}.h"
        kept = _inputs_path(folder.path, request)
        if kept.exists():
            return SafetensorsFile(kept).floats(key)[1]
        path = trace_path(folder.path, request)
        if self._stage.first_layer > 0 or path.exists():
            return RequestTrace.load(path, self._stage.shape).arrays[key]
        ids = (*folder.load_requests()[request].prompt, *folder.load_state().tokens[request])
        count = folder.load_state().nodes[request].positions
        return to_bits(self._stage.embed(np.array(ids[:count], np.int64)))

    def _again(self, folder: JobFolder, request: int) -> RequestTrace:
        stage = self._stage = self._repeatable()
        arrays = stage.regenerate(self.inputs(folder, request))
        trace = RequestTrace(stage.shape, stage.first_layer, stage.end_layer, arrays)
        committed = folder.load_state().nodes[request].tensors_root
        if trace.tensors_root != committed:
            raise NotRepeated(folder.job, request, committed, trace.tensors_root)
        return trace

    def _repeatable(self) -> RepeatableStage:
        stage = self._stage
        if isinstance(stage, RepeatableStage):
            return stage
        return RepeatableStage(
            stage.weights.folder,
            stage.first_layer,
            stage.end_layer,
            device=str(stage.device),
            weights=stage.weights,
            products=stage.products,
        )


def _inputs_path(folder: Path, request: int) -> Path:
    return folder / f"{request}.inputs.safetensors"


def _inputs_key(trace: RequestTrace) -> str:
    return f"{trace.first_layer}.h"


def _size(trace: RequestTrace) -> int:
    return sum(array.nbytes for array in trace.arrays.values())
