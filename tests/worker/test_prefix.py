"""Who computes what prompts begin with alike, and what is copied."""

import random
from collections.abc import Sequence

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.worker.alike import SYSTEM, ask, batches
from verifier.commit import Request
from worker.batch import Batch, Piece, Token
from worker.cache import PAGE
from worker.config import Bounds
from worker.homes import Homes
from worker.pace import Pace
from worker.prefix import Prefixes
from worker.scheduler import Scheduler
from worker.swap import SwappingCache

# ---- who computes what


def common(one: Sequence[int], other: Sequence[int]) -> int:
    return next((t for t, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


@given(
    batches(300),
    st.integers(1, 200),
    st.integers(1, 6),
    st.integers(1, 900),
    st.booleans(),
    st.randoms(),
    st.booleans(),
)
def test_a_page_is_computed_once_among_the_requests_in_flight(
    requests: list[Request], rows: int, flights: int, room: int, swaps: bool, dice: random.Random, kept: bool
) -> None:
    homes = Homes(requests, Bounds(room, 128, 300) if swaps else Bounds(room))
    tokens = [[1] * dice.randrange(request.limit) for request in requests] if kept else ()
    prefixes = Prefixes([request.prompt for request in requests])
    pace = Pace(2, flights)
    scheduler = Scheduler(requests, max_rows=rows, pace=pace, homes=[homes], kept=tokens, prefixes=prefixes)
    done, chosen, here = [0] * len(requests), [0] * len(requests), set(range(len(requests)))
    flying: list[Batch] = []
    while not scheduler.done:
        batch = scheduler.next()
        here -= set(scheduler.ended())
        if batch is not None:
            assert 0 < batch.rows <= rows
            begun = {r for r in here if done[r]}
            for piece in batch.pieces:
                r, prompt = piece.request, requests[piece.request].prompt
                if piece.donor is None:
                    assert piece.first == done[r]
                else:
                    assert done[r] == 0 < piece.first and piece.donor in here and done[piece.donor] >= piece.first
                    assert prompt[: piece.first] == requests[piece.donor].prompt[: piece.first]
                if r not in begun:  # whoever began before has no more of its beginning, and does not compute more
                    most = max((common(prompt, requests[other].prompt) for other in begun), default=0)
                    assert piece.first == min(most, len(prompt) - 1) // PAGE * PAGE
                    begun.add(r)
            for piece in batch.pieces:
                done[piece.request] = piece.end
            flying.append(batch)
        else:
            assert flying, "nothing is in flight, and nothing goes"
        while flying and (batch is None or dice.random() < 0.3):
            batch, came = flying.pop(0), []
            for piece in batch.pieces:
                length = len(requests[piece.request].prompt)
                for position in range(max(piece.first, length - 1), piece.end):
                    came.append(Token(piece.request, position + 1 - length, 1))
                    chosen[piece.request] += 1
            scheduler.returned(came)
    assert chosen == [request.limit for request in requests]
    assert done == [len(request.prompt) + request.limit - 1 for request in requests]


def scheduled(requests: Sequence[Request], room: int, rows: int = 64) -> Scheduler:
    prefixes = Prefixes([request.prompt for request in requests])
    return Scheduler(requests, max_rows=rows, pace=Pace(1), homes=[Homes(requests, Bounds(room))], prefixes=prefixes)


def pieces(scheduler: Scheduler) -> tuple[Piece, ...]:
    batch = scheduler.next()
    assert batch is not None
    return batch.pieces


def test_who_asks_the_same_computes_its_last_page_alone() -> None:
    scheduler = scheduled(ask(SYSTEM[:32], SYSTEM[:32], SYSTEM[:33]), 1000)
    assert pieces(scheduler) == (Piece(0, 0, 32),)
    scheduler.returned([Token(0, 0, 7)])
    assert pieces(scheduler) == (Piece(2, 32, 1, donor=0), Piece(0, 32, 1), Piece(1, 16, 16, donor=0))
    assert scheduler.taken_positions == 48


def test_a_prompt_in_chunks_is_waited_for() -> None:
    scheduler = scheduled(ask(SYSTEM, (*SYSTEM[:48], 1), (7,) * 9), 1000, rows=20)
    assert pieces(scheduler) == (Piece(0, 0, 20),)
    scheduler.returned([])
    assert pieces(scheduler) == (Piece(2, 0, 9), Piece(0, 20, 11))
    scheduler.returned([Token(2, 0, 7)])
    assert pieces(scheduler) == (Piece(2, 9, 1), Piece(0, 31, 19))
    scheduler.returned([Token(2, 1, 7), Token(0, 0, 7)])
    assert pieces(scheduler) == (Piece(1, 48, 1, donor=0), Piece(0, 50, 1))


def test_who_has_left_gives_nothing() -> None:
    """The first of three leaves before the second has room, and the second before the third."""
    scheduler = scheduled(ask(SYSTEM, SYSTEM, limit=1), 60)
    assert pieces(scheduler) == (Piece(0, 0, 50),)
    scheduler.returned([Token(0, 0, 7)])
    assert pieces(scheduler) == (Piece(1, 0, 50),) and scheduler.ended() == [0]


def test_who_took_it_gives_it_on() -> None:
    scheduler = scheduled([Request(SYSTEM, 2), Request(SYSTEM, 9), Request(SYSTEM, 1)], 111)
    assert pieces(scheduler) == (Piece(0, 0, 50),)
    scheduler.returned([Token(0, 0, 7)])
    assert pieces(scheduler) == (Piece(0, 50, 1), Piece(1, 48, 2, donor=0))
    scheduler.returned([Token(0, 1, 7), Token(1, 0, 7)])
    assert pieces(scheduler) == (Piece(1, 50, 1), Piece(2, 48, 2, donor=1))


# ---- what is copied

HEADS, SIZE, LAYERS = 2, 4, 2


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32), ahead=st.integers(0, 3), residents=st.integers(0, 6))
def test_who_takes_positions_reads_what_the_donor_reads(seed: int, ahead: int, residents: int) -> None:
    """`residents` of six live on the device, the others on the host: each may take from each, and go on by itself."""
    dice = random.Random(seed)
    cache = SwappingCache(HEADS, SIZE, torch.float32, torch.device("cpu"), range(LAYERS), 8 * PAGE)
    held: dict[int, list[float]] = {}  # what each position of each request holds
    told: list[tuple[Batch, dict[int, list[float]]]] = []
    number = 0.0
    for _ in range(20):
        chosen: list[Piece] = []
        before = {r: len(rows) for r, rows in held.items()}
        for r in dice.sample(range(6), dice.randint(1, 4)):
            donors = [d for d, length in before.items() if length and d != r] if r not in held else []
            donor = dice.choice(donors) if donors and dice.random() < 0.8 else None
            if donor is not None:
                held[r] = held[donor][: dice.randint(1, before[donor])]
            first = len(held.setdefault(r, []))
            chosen.append(Piece(r, first, dice.choice([1, 1, dice.randint(1, 20)]), donor))
            held[r] += [number + t for t in range(chosen[-1].count)]
            number += chosen[-1].count
        batch = Batch(tuple(chosen))
        cache.coming(batch, {piece.request: 4000 for piece in chosen if piece.request >= residents})
        told.append((batch, {r: list(rows) for r, rows in held.items()}))
        while len(told) > ahead:
            _visit(cache, *told.pop(0))
        if not told and dice.random() < 0.3:
            gone = dice.choice(sorted(held))
            cache.drop(gone)
            del held[gone]
    while told:
        _visit(cache, *told.pop(0))


@torch.inference_mode()
def _visit(cache: SwappingCache, batch: Batch, held: dict[int, list[float]]) -> None:
    def rows(piece: Piece, layer: int) -> torch.Tensor:
        numbers = torch.tensor(held[piece.request][piece.first : piece.end]) + 0.25 * layer
        return numbers[:, None, None].expand(-1, HEADS, SIZE)

    with cache.holding(batch):
        cache.share(batch)
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
                keys, _ = cache.read(layer, view)
                for i, piece in enumerate(group):
                    expected = rows(Piece(piece.request, 0, piece.end), layer).transpose(0, 1)
                    assert torch.equal(keys[i, :, : piece.end], expected)
        for piece in batch.pieces:
            cache.advance(piece.request, piece.count)
            assert cache.positions(piece.request) == piece.end
