"""Back-pressure: what waits to be recorded is bounded by its bytes."""

import threading
from pathlib import Path

import pytest
import torch

from tests.worker.pipeline_in_process import Tiny
from verifier.commit import Request
from verifier.trace import tensor_keys, tensor_width
from worker.batch import Batch, Piece
from worker.errors import JobFailed, OutOfRange
from worker.landing import Landing, land
from worker.ledger import Ledger
from worker.recorder import Recorder
from worker.stage import Captured, Stage


def captured(stage: Stage, rows: int, value: float = 1.0) -> Captured:
    keys = tensor_keys(stage.shape, 0, 3)
    return {key: torch.full((rows, tensor_width(stage.shape, key)), value) for key in keys}


def test_serving_waits_while_the_queue_is_full(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(tiny[0], 0, 3)
    one = sum(tensor.nbytes for tensor in captured(stage, 1).values())
    go = threading.Event()
    add = Ledger.add

    def slowly(self: Ledger, *arguments: object) -> int:
        assert go.wait(60)
        return add(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Ledger, "add", slowly)
    recorder = Recorder(stage.shape, 0, 3, [Request((1,), 20)], tmp_path, queue_bytes=3 * one, alone=True)
    put: list[int] = []

    def serve() -> None:
        for t in range(20):
            recorder.rows(Batch((Piece(0, t, 1),)), captured(stage, 1), None)
            put.append(t)

    serving = threading.Thread(target=serve)
    serving.start()
    while len(put) < 3:
        serving.join(0.01)
    serving.join(0.2)
    assert len(put) == 3 and serving.is_alive()
    go.set()
    serving.join(60)
    assert recorder.finish().nodes[0].positions == 20
    assert recorder.peak_bytes == 3 * one


def test_a_microbatch_larger_than_the_queue_is_recorded_alone(tiny: Tiny, tmp_path: Path) -> None:
    stage = Stage(tiny[0], 0, 3)
    recorder = Recorder(stage.shape, 0, 3, [Request((1,), 8)], tmp_path, queue_bytes=1, alone=True)
    for first in (0, 4):
        recorder.rows(Batch((Piece(0, first, 4),)), captured(stage, 4), None)
    assert recorder.finish().nodes[0].positions == 8


def test_rows_that_are_still_on_their_way_are_waited_for(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As from a GPU: what the host has is not what was captured before the copies are done."""
    stage = Stage(tiny[0], 0, 3)

    class Copies:
        def __init__(self, source: Captured, target: Captured) -> None:
            self.source, self.target = source, target

        def synchronize(self) -> None:
            for key, tensor in self.source.items():
                self.target[key].copy_(tensor)

    def later(rows: Captured) -> Landing:
        host = {key: torch.full_like(tensor, torch.nan) for key, tensor in rows.items()}
        return Landing(host, Copies(rows, host))

    roots = []
    for begin in (land, later):
        monkeypatch.setattr("worker.recorder.land", begin)
        recorder = Recorder(stage.shape, 0, 3, [Request((1,), 8)], tmp_path, alone=True)
        recorder.rows(Batch((Piece(0, 0, 8),)), captured(stage, 8, 3.5), None)
        roots.append(recorder.finish().root)
    assert roots[0] == roots[1]


def test_a_failed_recorder_fails_whoever_comes_next_and_blocks_nobody(tiny: Tiny, tmp_path: Path) -> None:
    stage = Stage(tiny[0], 0, 3)
    recorder = Recorder(stage.shape, 0, 3, [Request((1,), 8)], tmp_path, queue_bytes=1, alone=True)
    with pytest.raises(OutOfRange, match=r"0\.h, request 0, position 0"):
        for first in range(8):
            recorder.rows(Batch((Piece(0, first, 1),)), captured(stage, 1, 2.0**20), None)
        recorder.finish()
    recorder.close()


def test_a_dropped_attempt_commits_to_nothing_more_of_those_that_ended_together(tiny: Tiny, tmp_path: Path) -> None:
    """Each may take as long as its own forward, and the next attempt waits until nothing is written any more."""
    stage = Stage(tiny[0], 0, 3)
    finished: list[int] = []

    def drops(request: int, trace: object) -> bool:
        finished.append(request)
        recorder.close()
        return True

    requests = [Request((1,), 8) for _ in range(5)]
    recorder = Recorder(stage.shape, 0, 3, requests, tmp_path, alone=True, drops=drops)
    recorder.rows(Batch(tuple(Piece(r, 0, 1) for r in range(5))), captured(stage, 5), None)
    recorder.ended(range(5))
    recorder.join()
    assert finished == [0]
    with pytest.raises(JobFailed, match="dropped"):
        recorder.ended([])
