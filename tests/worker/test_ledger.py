"""Rows in, traces out, whatever the batching."""

import random

import numpy as np
import pytest

from verifier.sha256 import HashTree, row_leaf_hashes
from verifier.trace import is_tiled, tile_leaf_hashes
from worker.batch import Batch, Piece
from worker.ledger import FIRST_ROOM, Bits, Ledger


def test_a_request_comes_out_as_it_went_in() -> None:
    dice, random_bits = random.Random(2), np.random.default_rng(2)
    lengths = {request: dice.randint(1, 90) for request in range(30)}
    served = {
        key: {r: random_bits.integers(0, 60000, (n, width)).astype(np.uint16) for r, n in lengths.items()}
        for key, width in (
            ("3.h", 256),
            ("3.q", 600),
            ("3.k", 512),
            ("3.v", 64),
            ("4.h", 256),
            ("4.v", 32),
            ("5.v", 40),
            ("4.k", 128),
            ("5.k", 128),
            ("6.k", 300),
            ("7.k", 300),
        )
    }
    ledger, done, active = Ledger(), dict.fromkeys(lengths, 0), sorted(lengths)
    waiting = active[8:]
    active = active[:8]
    while active:
        pieces = []
        for r in dice.sample(active, dice.randint(1, len(active))):
            pieces.append(Piece(r, done[r], min(dice.choice([1, 1, 1, 20]), lengths[r] - done[r])))
            done[r] = pieces[-1].end
        tensors = {
            key: np.concatenate([rows[p.request][p.first : p.end] for p in pieces]) for key, rows in served.items()
        }
        ledger.add(Batch(tuple(pieces)), tensors)
        for r in [r for r in active if done[r] == lengths[r]]:
            assert ledger.positions(r) == lengths[r]
            arrays, roots = ledger.take(r)
            assert r not in ledger
            for key, rows in served.items():
                assert np.array_equal(arrays[key], rows[r])
            for key, root in roots.items():
                leaves = tile_leaf_hashes(arrays[key]) if is_tiled(key) else row_leaf_hashes(arrays[key], 256)
                assert root == HashTree(leaves).root
            active.remove(r)
            active += waiting[:1]
            waiting = waiting[1:]


@pytest.mark.parametrize("bits", [np.uint16, np.uint32])
def test_the_largest_magnitude_is_told_wherever_it_is(bits: type) -> None:
    sign = np.array(1, bits) << np.array(np.dtype(bits).itemsize * 8 - 1, bits)
    for value, expected in ((7, 7), (sign + 9, 9), (sign, 3), (0, 3), (sign - 1, int(sign) - 1)):
        for key in ("0.h", "0.k", "0.v"):
            tensors: dict[str, Bits] = {name: np.full((4, 256), 3, bits) for name in ("0.h", "0.k", "0.v")}
            tensors[key][2, 17] = value
            assert Ledger().add(Batch((Piece(0, 0, 4),)), tensors) == max(expected, 3)
    for value, expected in ((sign + 5, 5), (5, 5)):
        assert Ledger().add(Batch((Piece(0, 0, 1),)), {"0.h": np.full((1, 8), value, bits)}) == expected


def test_slots_of_a_request_that_was_taken_are_used_again() -> None:
    ledger = Ledger()
    for request in range(20):
        ledger.add(Batch((Piece(request, 0, FIRST_ROOM),)), {"0.h": np.zeros((FIRST_ROOM, 8), np.uint16)})
        held = ledger.held_bytes
        ledger.take(request)
    assert held == FIRST_ROOM * (16 + 32)
