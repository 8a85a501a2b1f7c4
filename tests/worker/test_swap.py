"""Guests: who is one, where they lie, and that nothing of them is lost on the way to the host and back."""

import asyncio
import random
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from tests.worker.pipeline_in_process import JOB, Greedy, Tiny, serve, split, telling, wire, within
from verifier.commit import Request
from verifier.trace import RequestTrace
from worker.attempt import take_in
from worker.batch import Batch, Piece, Token, sampling
from worker.cache import PADDING, PAGE
from worker.config import Bounds, Serving
from worker.errors import BadMessage
from worker.homes import Homes, laid, largest, needed, whole_pages
from worker.job import JobState
from worker.pace import Pace
from worker.prefix import Prefixes
from worker.recorder import trace_path
from worker.repeat import RepeatableStage
from worker.scheduler import Scheduler
from worker.stage import Captured, Stage
from worker.swap import BUFFERS, SwappingCache

HEADS, SIZE, LAYERS, BUFFER = 2, 4, 2, 8 * PAGE


class TornCache(SwappingCache):
    """A bus that breaks."""

    def _copy(self, *_: Any, **__: Any) -> None:
        raise OSError("the bus is gone")


def made(buffer: int = BUFFER, kind: type[SwappingCache] = SwappingCache) -> SwappingCache:
    return kind(HEADS, SIZE, torch.float32, torch.device("cpu"), range(LAYERS), buffer)


def rows(piece: Piece, layer: int) -> torch.Tensor:
    """[count, heads, size]: each row tells its request, position and layer."""
    return torch.stack(
        [torch.full((HEADS, SIZE), 1000.0 * piece.request + t + 0.25 * layer) for t in range(piece.first, piece.end)]
    )


@torch.inference_mode()
def visit(cache: SwappingCache, batch: Batch) -> None:
    """What a stage does with a microbatch that it was told of: everything is read back as it was written."""
    with cache.holding(batch):
        cache.extend(batch)
        places = cache.places([piece for piece in batch.pieces if piece.count == 1])
        for layer in range(LAYERS):
            new = torch.cat([rows(piece, layer) for piece in batch.pieces])
            cache.write(layer, cache.rows(batch), new, -new)
            for piece in batch.pieces:
                keys, values = cache.read(layer, cache.slots(piece))
                expected = rows(Piece(piece.request, 0, piece.end), layer).transpose(0, 1)[None]
                assert torch.equal(keys, expected) and torch.equal(values, -expected)
            for group, view in places:
                keys, values = cache.read(layer, view)
                assert keys.isfinite().all() and values.isfinite().all()
                for i, piece in enumerate(group):
                    expected = rows(Piece(piece.request, 0, piece.end), layer).transpose(0, 1)
                    assert torch.equal(keys[i, :, : piece.end], expected)
        assert sorted(piece.request for group, _ in places for piece in group) == sorted(
            piece.request for piece in batch.pieces if piece.count == 1
        )
        slots = [slot for piece in batch.pieces for slot in cache.slots(piece)[0].tolist()]
        assert len(slots) == len(set(slots))  # nobody's position is another's
        for piece in batch.pieces:
            cache.advance(piece.request, piece.count)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), ahead=st.integers(0, 3), homes=st.integers(0, 6))
@example(seed=988, ahead=0, homes=5)  # one of a run leaves before another outgrows it
def test_what_comes_in_is_what_went_out(seed: int, ahead: int, homes: int) -> None:
    """Any microbatches of `homes` residents and others, up to `ahead` of them known before their turn."""
    dice, cache = random.Random(seed), made()
    lengths, told, born = dict.fromkeys(range(6), 0), [], 6
    for _ in range(25):
        pieces: list[Piece] = []
        for r in dice.sample(sorted(lengths), dice.randint(1, 4)):
            pieces.append(Piece(r, lengths[r], dice.choice([1, 1, dice.randint(1, 20)])))
            lengths[r] = pieces[-1].end
        batch = Batch(tuple(pieces))
        cache.coming(batch, {piece.request: 4000 for piece in pieces if piece.request >= homes})
        told.append(batch)
        while len(told) > ahead:
            visit(cache, told.pop(0))
        if not told and dice.random() < 0.5:
            gone = dice.choice(sorted(lengths))
            cache.drop(gone)
            del lengths[gone]
            lengths[born] = 0
            born += 1
    for batch in told:
        visit(cache, batch)
    for r in lengths:
        cache.drop(r)
    cache._thread.shutdown()
    assert cache.pages == BUFFERS * BUFFER // PAGE and not cache._slabs and len(cache._unused) == BUFFERS


def test_a_microbatch_that_no_buffer_holds_is_served_all_the_same() -> None:
    cache, told = made(buffer=PAGE), []
    for first in range(0, 3 * 40, 40):
        told.append(Batch((Piece(0, first, 40), Piece(1, first, 40), Piece(2, first // 40, 1))))
        cache.coming(told[-1], {0: 200, 1: 200, 2: 200})
    for batch in told:
        visit(cache, batch)
    cache._thread.shutdown()
    assert cache.pages == BUFFERS


def test_the_device_holds_two_buffers_however_many_guests_there_are() -> None:
    cache, told = made(), []
    for turn in range(3):
        for r in range(40):
            told.append(Batch((Piece(r, turn, 1),)))
            cache.coming(told[-1], {r: 3})
    for batch in told:
        visit(cache, batch)
    cache._thread.shutdown()
    position = 2 * LAYERS * HEADS * SIZE * 4
    assert cache.device_bytes == BUFFERS * BUFFER * position
    assert cache.peak_host_bytes == 40 * 3 * position
    assert cache.moved_bytes == 40 * (0 + 1 + 2 + 3) * position  # in, what was there; out, what was new


def test_a_bus_that_breaks_fails_the_microbatches_that_need_it() -> None:
    cache, told = made(kind=TornCache), []
    for t in range(3):
        told.append(Batch((Piece(0, t, 1),)))
        cache.coming(told[-1], {0: 9})
    with pytest.raises(OSError, match="the bus is gone"):
        visit(cache, told[0])


def test_what_does_not_get_out_fails_the_microbatches_behind_it() -> None:
    cache, told = made(), []
    for t in range(3):
        told.append(Batch((Piece(0, t, 1),)))
        cache.coming(told[-1], {0: 9})
    cache._visits[0].brought.result()
    cache.__class__ = TornCache
    visit(cache, told[0])
    cache._thread.shutdown()
    assert all(isinstance(waiting.brought.exception(), OSError) for waiting in cache._visits)
    cache.coming(Batch((Piece(0, 3, 1),)), {0: 9})
    assert isinstance(cache._visits[-1].brought.exception(), OSError)


# ---------------------------------------------------------------------------------------------------------------- homes


def ask(*sizes: int) -> list[Request]:
    return [Request((1,) * (size - 1), 1) for size in sizes]


@given(
    st.lists(st.integers(2, 200), min_size=1, max_size=60),
    st.integers(1, 400),
    st.integers(1, 300),
    st.integers(1, 10),
)
def test_no_room_is_lost_and_no_guest_is_too_large(sizes: list[int], main: int, buffer: int, visits: int) -> None:
    assume(largest(main, buffer) > 1)
    sizes = [min(size, largest(main, buffer)) for size in sizes]
    homes = Homes(ask(*sizes), Bounds(main, buffer, visits * buffer))
    assert all(whole_pages(sizes[r]) <= buffer for r in homes.guests)
    admitted: set[int] = set()
    for r, size in enumerate(sizes):
        if homes.has_room(r):
            homes.admit(r)
            admitted.add(r)
        there = sum(sizes[r] for r in admitted & homes.guests)
        here = sum(sizes[r] for r in admitted - homes.guests)
        assert here <= main and there <= visits * buffer
        if r not in admitted:
            assert size + (there if r in homes.guests else here) > (visits * buffer if r in homes.guests else main)
    for r in admitted:
        homes.leave(r)
    assert (homes._main_left, homes._host_left, homes.turns) == (main, visits * buffer, 1)


def test_the_main_pool_fills_up_before_there_are_guests() -> None:
    assert Homes(ask(*[10] * 5), Bounds(50, 100, 200)).guests == set()
    assert Homes(ask(*[10] * 9), Bounds(50, 100, 200)).guests == {5, 6, 7, 8}
    assert Homes(ask(*[10] * 9), Bounds(50)).guests == set()
    shares = Homes(ask(*[10] * 900), Bounds(50, 100, 200)).guests
    assert 900 * 4 // 5 - 5 <= len(shares) <= 900 * 4 // 5  # as the rooms are, in the long run


@given(st.lists(st.tuples(st.integers(0, 500), st.integers(1, 40)), min_size=1, max_size=30))
def test_guests_lie_apart_within_what_they_need(ends: list[tuple[int, int]]) -> None:
    pieces = [Piece(r, first, count) for r, (first, count) in enumerate(ends)]
    groups = laid(pieces)
    assert sorted(piece.request for group, _ in groups for piece in group) == list(range(len(pieces)))
    assert all(piece.end <= room for group, room in groups for piece in group)
    assert needed(pieces) <= sum(piece.end / (1 - PADDING) + PAGE for piece in pieces)


def test_one_microbatch_takes_as_many_guests_as_a_buffer_holds() -> None:
    requests = ask(*[16] * 11)
    homes = Homes(requests, Bounds(16, 3 * PAGE, 10 * PAGE))
    scheduler = Scheduler(requests, max_rows=1000, pace=Pace(1, swaps=True), homes=[homes])
    seen: set[int] = set()
    while not scheduler.done:
        batch = scheduler.next()
        assert batch is not None and 1 <= len(batch.pieces) <= 3
        seen |= {piece.request for piece in batch.pieces}
        scheduler.returned([Token(piece.request, 0, 7) for piece in batch.pieces])
    assert seen == set(range(11)) and homes.turns == 1


@given(
    st.lists(st.tuples(st.integers(1, 60), st.integers(1, 20)), min_size=1, max_size=25),
    st.lists(st.tuples(st.integers(1, 150), st.integers(0, 100), st.integers(1, 5)), min_size=1, max_size=3),
    st.integers(1, 40),
    st.integers(1, 4),
    st.booleans(),
)
def test_what_stage_0_sends_has_room_at_every_stage(
    sizes: list[tuple[int, int]], rooms: list[tuple[int, int, int]], rows: int, flights: int, shared: bool
) -> None:
    """By each stage's own count, whatever they have; and every request is served."""
    bounds = {Bounds(main, buffer, buffer * turns if buffer else 0) for main, buffer, turns in rooms}
    most = min(largest(b.main, b.buffer) for b in bounds)
    requests = [Request((1,) * prompt, limit) for prompt, limit in sizes if prompt + limit <= most]
    assume(requests)
    mine = [Homes(requests, b) for b in bounds]
    pace = Pace(1, flights, any(homes.guests for homes in mine))
    prefixes = Prefixes([request.prompt for request in requests]) if shared else None
    scheduler = Scheduler(requests, max_rows=rows, pace=pace, homes=mine, prefixes=prefixes)
    stages = [(Homes(requests, b), [0] * len(requests), set[int]()) for b in bounds]
    flying: deque[Batch] = deque()
    while not scheduler.done:
        batch = scheduler.next()
        if batch is None:
            tokens = sampling(flying.popleft(), scheduler.prompt_counts)
            scheduler.returned([Token(r, at + 1 - scheduler.prompt_counts[r], 7) for r, at, _ in tokens])
            continue
        flying.append(batch)
        leaving = scheduler.ended()
        for homes, positions, ended in stages:
            take_in("stage 0", batch, leaving, requests, positions, ended, homes)
            for piece in batch.pieces:
                positions[piece.request] = piece.end
    assert all(len(ids) == request.limit for ids, request in zip(scheduler.outputs, requests, strict=True))


def test_what_a_stage_has_no_room_for_is_refused_by_name() -> None:
    requests = [Request((1,) * 9, 8)] * 5  # 17 positions each
    homes, ended, positions = Homes(requests, Bounds(40)), set[int](), [0] * 5

    def come(*who: int, leaving: Sequence[int] = ()) -> None:
        batch = Batch(tuple(Piece(r, positions[r], 1) for r in who))
        take_in("stage 0", batch, leaving, requests, positions, ended, homes)
        for r in who:
            positions[r] += 1

    come(0, 1)
    with pytest.raises(BadMessage, match=r"^stage 0: request 2: expected it once there is room for its 17 positions$"):
        come(0, 2)
    come(1, 3, leaving=[0, 4])  # of one that was never in there is nothing to leave
    with pytest.raises(BadMessage, match="request 2: expected it once there is room"):
        come(2)

    homes, ended, positions = Homes(requests, Bounds(17, 32, 64)), set[int](), [0] * 5
    assert homes.guests == {1, 2, 3, 4}
    come(0, 1, 2)
    with pytest.raises(BadMessage, match=r"^stage 0: rows: expected guests of at most 32 positions, came 48$"):
        come(1, 2, 3)
    with pytest.raises(BadMessage, match="request 4: expected it once there is room"):
        come(4)
    homes.rows = 2
    with pytest.raises(BadMessage, match=r"^stage 0: rows: expected at most 2 in a microbatch, came 3$"):
        come(0, 1, 2)


# ----------------------------------------------------------------------------------------------------------- whole jobs

PLAIN = Serving(max_rows=16, microbatches=3)
SWAPPED = replace(PLAIN, cache_positions=60, swap_positions=64, host_positions=1000)


def traces(data: Path, stages: Sequence[Stage], requests: Sequence[Request]) -> list[RequestTrace]:
    return [
        RequestTrace.load(trace_path(data / str(i) / "jobs" / JOB.hex(), r), stage.shape)
        for i, stage in enumerate(stages)
        for r in range(len(requests))
    ]


@pytest.fixture
def many() -> list[Request]:
    return [Request(tuple((7 * r + 3 * t) % 211 for t in range(5 + 3 * (r % 7))), 6 + r % 5) for r in range(14)]


@pytest.mark.parametrize("parts", [1, 2])
def test_a_job_has_the_same_bits_with_and_without_guests(
    tiny: Tiny, many: list[Request], tmp_path: Path, parts: int
) -> None:
    folder, _ = tiny
    ends = [0, *[3 * (i + 1) // parts for i in range(parts)]]
    stages = [RepeatableStage(folder, first, end) for first, end in pairwise(ends)]
    assert len(Homes(many, Bounds(60, 64, 1000)).guests) > 7
    plain, swapped = (
        serve(tmp_path / name, stages, many, serving) for name, serving in (("plain", PLAIN), ("swapped", SWAPPED))
    )
    assert [state.tokens for state in plain] == [state.tokens for state in swapped]
    assert [state.root for state in plain] == [state.root for state in swapped]


def test_tokens_of_guests_equal_transformers_greedy(
    tiny: Tiny, many: list[Request], greedy: Greedy, tmp_path: Path
) -> None:
    folder, model = tiny
    states = serve(tmp_path, split(folder, 3, 2), many, SWAPPED)
    assert [list(ids) for ids in states[0].tokens] == [greedy(model, request) for request in many]


def test_a_stage_with_less_room_is_sent_what_it_has_room_for(
    tiny: Tiny, many: list[Request], greedy: Greedy, tmp_path: Path
) -> None:
    folder, model = tiny
    smaller = replace(SWAPPED, max_rows=5, cache_positions=16, swap_positions=48, host_positions=48)

    async def work() -> list[JobState]:
        with ThreadPoolExecutor(1) as compute:
            runs = wire(tmp_path, split(folder, 3, 2), many, SWAPPED, compute)
            runs[1]._serving, runs[0]._ready = smaller, telling(smaller.bounds)
            for run in runs:
                run.start()
            return list(await within(300, asyncio.gather(*(run.finished for run in runs))))

    states = asyncio.run(work())
    assert [list(ids) for ids in states[0].tokens] == [greedy(model, request) for request in many]


def test_the_same_microbatches_have_the_same_bits_wherever_their_requests_live(tiny_bf16: Tiny) -> None:
    """Of a stage that chooses its shapes by what is read together, as long as the same are read together."""
    folder, _ = tiny_bf16
    stage = Stage(folder, 0, 3)
    prompts = [[(7 * r + 3 * t) % 211 for t in range(40)] for r in range(6)]

    def forwards(guests: dict[int, int], buffer: int) -> list[Captured]:
        cache = stage.cache(buffer)
        spans = [(0, 25), *[(t, 1) for t in range(25, 40)]]
        batches = [Batch(tuple(Piece(r, first, count) for r in range(6))) for first, count in spans]
        captured = []
        for batch in batches:
            cache.coming(batch, guests)
        for batch in batches:
            ids = np.array([prompts[p.request][t] for p in batch.pieces for t in range(p.first, p.end)])
            with cache.holding(batch):
                captured.append(stage.forward(stage.embed(ids), batch, cache)[1])
        return captured

    plain, swapped = forwards({}, 0), forwards(dict.fromkeys(range(6), 40), 6 * 48)
    for one, other in zip(plain, swapped, strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_what_is_larger_than_the_main_pool_is_a_guest_however_much_the_host_was_promised() -> None:
    requests = [Request((1,), 15), *[Request((1,), 47)] * 12]
    assert Homes(requests, Bounds(16, 64, 100)).guests == set(range(1, 13))
    assert largest(16, 64) == 64 and largest(100, 64) == 100 and largest(10, 30) == 16
