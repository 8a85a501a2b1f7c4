"""Pages, block tables and padding."""

import random

import pytest
import torch

from worker.batch import Batch, Piece
from worker.cache import PADDING, PAGE, Cache, alike


def made() -> Cache:
    return Cache(2, 4, torch.float32, torch.device("cpu"))


def rows(request: int, first: int, count: int) -> torch.Tensor:
    """[count, 2, 4]: each row tells its request and position."""
    return torch.tensor([[[request + 0.001 * t] * 4] * 2 for t in range(first, first + count)])


def test_every_position_is_read_back_whatever_came_between() -> None:
    dice, cache = random.Random(5), made()
    lengths = {request: 0 for request in range(5)}
    for _ in range(60):
        pieces = [Piece(r, lengths[r], dice.randint(1, 20)) for r in dice.sample(sorted(lengths), 3)]
        slots = cache.extend(Batch(tuple(pieces)))
        new = torch.cat([rows(p.request, p.first, p.count) for p in pieces])
        cache.write(0, slots, new, -new)
        for piece in pieces:
            lengths[piece.request] = piece.end
            keys, values = cache.read(0, cache.slots([piece]))
            expected = rows(piece.request, 0, piece.end).transpose(0, 1)[None]
            assert torch.equal(keys, expected) and torch.equal(values, -expected)
        if dice.random() < 0.2:
            gone = dice.choice(sorted(lengths))
            cache.drop(gone)
            lengths[gone] = 0
    assert cache.pages == sum(-(-length // PAGE) for length in lengths.values())


def test_pages_of_an_ended_request_are_used_again() -> None:
    cache = made()
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
    groups = alike(pieces)
    assert sorted(piece.request for group in groups for piece in group) == list(range(len(pieces)))
    for group in groups:
        cache.slots(group)
    assert 0 <= cache.padding <= PADDING


def test_requests_of_one_length_are_read_together() -> None:
    assert len(alike([Piece(r, 40 + r % 3, 1) for r in range(30)])) == 1
