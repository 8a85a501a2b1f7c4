"""Rows in, traces out, whatever the batching."""

import random
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from tests.verifier.test_trace import random_arrays, shape_of
from verifier.program import ModelShape
from verifier.safetensors_file import GrowingFile
from verifier.trace import RequestTrace
from worker import ledger as ledger_module
from worker.batch import Batch, Piece
from worker.errors import JobFailed
from worker.ledger import Bits, Ledger, Taken

Arrays = Mapping[str, Bits]


def batch_of(pieces: list[Piece], served: Mapping[int, Arrays]) -> tuple[Batch, dict[str, Bits]]:
    keys = next(iter(served.values()))
    rows = {key: np.concatenate([served[p.request][key][p.first : p.end] for p in pieces]) for key in keys}
    return Batch(tuple(pieces)), rows


def stored(taken: Taken, shape: ModelShape, folder: Path, request: int) -> RequestTrace:
    """What was taken, through the disk where that is where it is."""
    if taken.file is None:
        return RequestTrace(shape, 0, shape.layers, taken.arrays)
    taken.file.publish()
    path = folder / f"{request}.safetensors"
    assert {len(matrix) for matrix in load_file(path).values()} == {taken.positions}  # by the library of its format
    return RequestTrace.load(path, shape)


@pytest.mark.parametrize("on_disk", [True, False])
@pytest.mark.parametrize("at_once", [0, 40_000, ledger_module.AT_ONCE])
@pytest.mark.parametrize(
    "shape",
    [
        shape_of(64, 320),
        shape_of(128, 256),
        shape_of(40, 320, "float32"),
        shape_of(200, 512),
        shape_of(32, 512, layers=1),
    ],
    ids=lambda shape: f"{shape.hidden}-{shape.kv_width}",
)
def test_a_request_comes_out_as_it_went_in(
    shape: ModelShape, at_once: int, on_disk: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger_module, "AT_ONCE", at_once)
    dice = random.Random(2)
    lengths = {request: dice.choice([1, 7, 8, 33, 60]) for request in range(20)}
    served = {r: random_arrays(shape, 0, shape.layers, n) for r, n in lengths.items()}
    place = (lambda request: tmp_path / f"{request}.safetensors") if on_disk else None
    ledger, done = Ledger(shape, 0, shape.layers, place), dict.fromkeys(lengths, 0)
    active, waiting = sorted(lengths)[:6], sorted(lengths)[6:]
    together = set()  # how many were taken at once
    while active:
        running = [r for r in active if done[r] < lengths[r]]
        pieces = []
        for r in dice.sample(running, dice.randint(1, len(running))):
            pieces.append(Piece(r, done[r], min(dice.choice([1, 1, 1, 20]), lengths[r] - done[r])))
            done[r] = pieces[-1].end
        ledger.add(*batch_of(pieces, served))
        ended = [r for r in active if done[r] == lengths[r]]
        if len(ended) < len(active) and dice.random() < 0.8:
            continue
        together.add(len(ended))
        for r, taken in zip(ended, ledger.take(ended), strict=True):
            assert taken.positions == lengths[r]
            trace = stored(taken, shape, tmp_path, r)
            assert all(np.array_equal(trace.arrays[key], rows) for key, rows in served[r].items())
            assert taken.roots == {key: trace.tensor_root(key) for key in trace.keys}
        active = [r for r in active if r not in ended] + waiting[: len(ended)]
        waiting = waiting[len(ended) :]
    assert max(together) > 2
    assert ledger.held_bytes == 0
    with pytest.raises(JobFailed, match="request 3 ended without a single position"):
        next(ledger.take([3]))


def test_rows_on_their_way_to_the_disk_are_not_in_memory(tmp_path: Path) -> None:
    shape = shape_of(128, 512)  # q is as wide as a leaf, k and v are half as wide
    served = {0: random_arrays(shape, 0, 3, 60)}
    ledger = Ledger(shape, 0, 3, lambda request: tmp_path / f"{request}.safetensors")
    for first in range(60):
        ledger.add(*batch_of([Piece(0, first, 1)], served))
    assert len(ledger.rows(0, "0.h", 60)) == 60  # none waits any more
    held = sum(rows.nbytes for key, rows in served[0].items() if key.endswith(("k", "v")))
    leaves = sum(60 * -(-rows.shape[1] // 256) for key, rows in served[0].items() if not key.endswith("v"))
    assert ledger.held_bytes == held + 32 * leaves


@pytest.mark.parametrize("on_disk", [True, False])
def test_rows_that_two_requests_have_are_those_of_both(on_disk: bool, tmp_path: Path) -> None:
    shape = shape_of(64, 320)
    text = random_arrays(shape, 0, 3, 40)
    place = (lambda request: tmp_path / f"{request}.safetensors") if on_disk else None
    ledger = Ledger(shape, 0, 3, place)

    def add(request: int, first: int, end: int) -> None:
        ledger.add(*batch_of([Piece(request, first, end - first)], {request: text}))

    add(0, 0, 20)
    ledger.share(1, 0, 16)
    add(1, 16, 30)
    ledger.share(2, 1, 16)
    assert np.array_equal(ledger.rows(2, "0.v", 5), text["0.v"][:5])
    assert np.array_equal(ledger.rows(2, "1.h", 5), text["1.h"][:5])
    assert np.array_equal(ledger.rows(2, "2.q", 5), text["2.q"][:5])
    for request, end in ((0, 20), (1, 30), (2, 16)):
        (taken,) = ledger.take([request])
        trace = stored(taken, shape, tmp_path, request)
        assert all(np.array_equal(trace.arrays[key], rows[:end]) for key, rows in text.items())
        assert taken.roots == {key: trace.tensor_root(key) for key in trace.keys}
    with pytest.raises(KeyError):
        ledger.share(3, 0, 16)


def test_what_an_attempt_left_is_overwritten(tmp_path: Path) -> None:
    shape = shape_of()
    served = {0: random_arrays(shape, 0, 3, 9)}
    for last in (9, 4):
        ledger = Ledger(shape, 0, 3, lambda request: tmp_path / f"{request}.safetensors")
        ledger.add(*batch_of([Piece(0, 0, last)], served))
    trace = stored(next(ledger.take([0])), shape, tmp_path, 0)
    assert trace.positions == 4 and [path.name for path in tmp_path.iterdir()] == ["0.safetensors"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_largest_magnitude_is_told_wherever_it_is(dtype: str, tmp_path: Path) -> None:
    shape = shape_of(dtype=dtype)
    bits = np.uint16 if dtype == "bfloat16" else np.uint32
    sign = 1 << (8 * shape.served_dtype.size - 1)
    for value, expected in ((7, 7), (sign + 9, 9), (sign, 3), (0, 3), (sign - 1, sign - 1)):
        for key in ("0.h", "0.k", "0.v", "out"):
            served = {name: np.full_like(rows, 3, bits) for name, rows in random_arrays(shape, 0, 3, 4).items()}
            served[key][2, 17] = value
            ledger = Ledger(shape, 0, 3, lambda request: tmp_path / f"{request}.safetensors")
            assert ledger.add(*batch_of([Piece(0, 0, 4)], {0: served})) == max(expected, 3)


def test_the_header_has_room_for_every_number_of_rows(tmp_path: Path) -> None:
    file = GrowingFile(tmp_path / "t", shape_of().served_dtype, {"a,b": 3, "c": 5}, {"note": "x"})
    rows = np.arange(12, dtype=np.uint16).reshape(4, 3)
    file.add(rows[:1])
    file.add(rows[1:])
    assert np.array_equal(file.first(2), rows[:2]) and file.count == 4
    file.finish([np.ones((4, 5), np.uint16)])
    assert not (tmp_path / "t").exists()
    file.publish()
    assert {name: list(matrix.shape) for name, matrix in load_file(tmp_path / "t").items()} == {
        "a,b": [4, 3],
        "c": [4, 5],
    }
