"""Pages, block tables, runs and padding."""

import random
from collections.abc import Sequence

import pytest
import torch

from worker.batch import Batch, Piece
from worker.cache import AHEAD, LAUNCH_COST, PADDING, PAGE, READ_COST, TOGETHER, Cache, Run, View, alike


def made(reserves: Sequence[int] = (), foreseen: int = 0) -> Cache:
    return Cache(2, 4, torch.float32, torch.device("cpu"), reserves, foreseen)


def rows(request: int, first: int, count: int) -> torch.Tensor:
    """[count, 2, 4]: each row tells its request and position."""
    return torch.tensor([[[request + 0.001 * t] * 4] * 2 for t in range(first, first + count)])


def put(cache: Cache, pieces: list[Piece]) -> list[tuple[list[Piece], View]]:
    """What Stage does at one layer. Where the single rows are read."""
    batch = Batch(tuple(pieces))
    cache.extend(batch)
    places = cache.places([piece for piece in pieces if piece.count == 1])
    new = torch.cat([rows(p.request, p.first, p.count) for p in pieces])
    cache.write(0, cache.rows(batch), new, -new)
    for piece in pieces:
        cache.advance(piece.request, piece.count)
    return places


def test_every_position_is_read_back_whatever_came_between() -> None:
    dice, cache = random.Random(5), made()
    lengths = {request: 0 for request in range(5)}
    for _ in range(60):
        pieces = [Piece(r, lengths[r], dice.randint(1, 20)) for r in dice.sample(sorted(lengths), 3)]
        put(cache, pieces)
        for piece in pieces:
            lengths[piece.request] = piece.end
            keys, values = cache.read(0, cache.slots(piece))
            expected = rows(piece.request, 0, piece.end).transpose(0, 1)[None]
            assert torch.equal(keys, expected) and torch.equal(values, -expected)
        if dice.random() < 0.2:
            gone = dice.choice(sorted(lengths))
            cache.drop(gone)
            lengths[gone] = 0
    for request in lengths:
        cache.drop(request)
    assert cache.pages == 0


@pytest.mark.parametrize("read_cost", [READ_COST["cpu"], LAUNCH_COST])
def test_runs_hold_what_was_written_while_requests_come_and_go(read_cost: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(READ_COST, "cpu", read_cost)
    dice, cache = random.Random(6), made()
    cache.extend(Batch((Piece(99, 0, 1),)))
    lengths: dict[int, int] = {}
    for step in range(150):
        if len(lengths) < 20:
            lengths[step] = dice.choice([dice.randint(2, 90), 40])
            put(cache, [Piece(step, 0, lengths[step])])
        chosen = sorted(lengths) if step % 3 else dice.sample(sorted(lengths), 1 + len(lengths) // 2)
        places = put(cache, [Piece(r, lengths[r], 1) for r in chosen])
        assert sorted(piece.request for group, _ in places for piece in group) == sorted(chosen)
        for group, view in places:
            keys, values = cache.read(0, view)
            assert keys.isfinite().all() and values.isfinite().all()
            for i, piece in enumerate(group):
                lengths[piece.request] = piece.end
                expected = rows(piece.request, 0, piece.end).transpose(0, 1)
                assert torch.equal(keys[i, :, : piece.end], expected)
                assert torch.equal(values[i, :, : piece.end], -expected)
        if step % 4 == 0:
            gone = dice.choice(sorted(lengths))
            del lengths[gone]
            cache.drop(gone)
    assert cache.padding <= PADDING
    assert read_cost < LAUNCH_COST or cache.padding > 0  # so runs were joined


def decode(cache: Cache, requests: Sequence[int], first: int, end: int) -> list[list[Run]]:
    """The runs of each step from position `first` on."""
    steps = ([Piece(request, t, 1) for request in requests] for t in range(first, end))
    return [[view.run for _, view in put(cache, pieces)] for pieces in steps]


def test_a_run_moves_only_when_it_is_outgrown() -> None:
    cache = made()
    for request in range(4):
        put(cache, [Piece(request, 0, 10)])
    runs = [step for step in decode(cache, range(4), 10, 10 + 4 * AHEAD) if len(step) == 1]
    assert all(run.requests == (0, 1, 2, 3) for (run,) in runs)
    assert 3 * AHEAD <= len(runs) and len({run for (run,) in runs}) <= 4


def test_who_leaves_a_run_parts_it_and_nobody_moves() -> None:
    cache = made([100] * 6)
    for request in range(6):
        put(cache, [Piece(request, 0, 10)])
    (run,) = decode(cache, range(6), 10, 50)[-1]
    cache.drop(2)
    ((left, right),) = decode(cache, (0, 1, 3, 4, 5), 50, 51)
    assert (left.requests, right.requests) == ((0, 1), (3, 4, 5))
    assert (left.base, right.base) == (run.base, run.base + 3 * run.room)


def test_who_left_a_run_does_not_come_back_when_it_is_outgrown() -> None:
    cache = made([40, 200, 200, 200])
    for request in range(4):
        put(cache, [Piece(request, 0, 30)])
    assert len(decode(cache, range(4), 30, 40)[-1]) == 1
    cache.drop(0)
    for runs in decode(cache, (1, 2, 3), 40, 199):
        assert sorted(r for run in runs for r in run.requests) == [1, 2, 3]


def test_a_request_whose_end_is_known_is_never_moved_alone() -> None:
    cache = made([300])
    put(cache, [Piece(0, 0, 10)])
    assert len({run for (run,) in decode(cache, [0], 10, 300)}) == 1
    assert cache.pages == -(-300 // PAGE)


def test_requests_are_joined_once_that_is_worth_the_copy() -> None:
    cache = made([400] * 8)
    for request in range(8):
        put(cache, [Piece(request, 0, 150)])
    counts = [len(runs) for runs in decode(cache, range(8), 150, 300)]
    apart = counts.index(1)
    assert set(counts[:apart]) == {8} and set(counts[apart:]) == {1}
    assert (apart - 1) * 7 * READ_COST["cpu"] <= 8 * (150 + apart)


def test_what_is_foreseen_needs_no_growing() -> None:
    cache = made([64] * 10, 640)
    put(cache, [Piece(0, 0, 60)])
    (first,) = decode(cache, [0], 60, 61)[0]
    before = cache.read(0, View(first, 61))[0].data_ptr()
    for request in range(1, 10):
        put(cache, [Piece(request, 0, 60)])
    assert cache.device_bytes == 2 * 640 * 8 * 4
    assert cache.read(0, View(first, 61))[0].data_ptr() == before


def test_pages_of_an_ended_request_are_used_again() -> None:
    cache = made([3 * PAGE] * 50)
    for request in range(50):
        cache.extend(Batch((Piece(request, 0, 3 * PAGE),)))
        assert cache.pages == 3
        cache.drop(request)
    assert cache.pages == 0 and cache.positions(3) == 0


@pytest.mark.parametrize("seed", range(20))
def test_padding_stays_within_its_bound(seed: int) -> None:
    dice, cache = random.Random(seed), made()
    pieces = [Piece(r, dice.randint(1, 2000) - 1, 1) for r in range(dice.randint(1, 60))]
    for piece in pieces:
        cache.extend(Batch((Piece(piece.request, 0, piece.end),)))
    groups = [group for group, _ in cache.places(pieces)]
    assert sorted(piece.request for group in groups for piece in group) == list(range(len(pieces)))
    assert 0 <= cache.padding <= PADDING


def test_requests_of_one_length_are_read_together() -> None:
    sizes = [len(group) for group in alike([Piece(r, 40 + r % 3, 1) for r in range(30)])]
    assert sizes == [TOGETHER, TOGETHER, TOGETHER, 30 - 3 * TOGETHER]
