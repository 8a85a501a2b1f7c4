"""Hand-off roots and proofs equal the plain tree over the records of docs/protocol.md."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from verifier.commit import HandoffTree
from verifier.referee.tree import leaf, root_of_range
from worker.handoff import RowHandoff, TokenHandoff, prove_row, prove_token


@pytest.mark.parametrize(("width", "dtype"), [(64, np.uint16), (256, np.uint32), (600, np.uint16)])
def test_rows_whatever_the_batching(width: int, dtype: type) -> None:
    random = np.random.default_rng(3)
    rows: list[npt.NDArray[Any]] = [random.integers(0, 60000, (n, width)).astype(dtype) for n in (5, 1, 9)]
    records = [
        b"".join(v.to_bytes(4, "big") for v in (r, t, c)) + bits[t, 256 * c : 256 * (c + 1)].tobytes()
        for r, bits in enumerate(rows)
        for t in range(len(bits))
        for c in range(-(-width // 256))
    ]
    expected = HandoffTree(records).root
    for step in (1, 4, 100):
        handoff = RowHandoff()
        for r in (2, 0, 1):
            for first in range(0, len(rows[r]), step):
                part = rows[r][first : first + step]
                handoff.add(np.full(len(part), r), np.arange(first, first + len(part)), part)
        assert handoff.finish() == (expected, len(records))
    mixed = RowHandoff()
    for t in range(9):
        owners = np.array([r for r in (2, 0, 1) if t < len(rows[r])])
        mixed.add(owners, np.full(len(owners), t), np.stack([rows[r][t] for r in owners]))
    assert mixed.finish() == (expected, len(records))
    place, record, siblings = prove_row(rows, 2, 7, (width - 1) // 256)
    assert record == records[place]
    assert root_of_range([leaf(record)], place, len(records), siblings) == expected


def test_tokens() -> None:
    tokens = {0: [5, 6], 1: [7], 2: [8, 9, 10]}
    handoff = TokenHandoff()
    for r, ids in tokens.items():
        for token in ids:
            handoff.add(r, token)
    records = [
        b"".join(v.to_bytes(4, "big") for v in (r, i, token))
        for r, ids in tokens.items()
        for i, token in enumerate(ids)
    ]
    root, leaves = handoff.finish()
    assert (root, leaves) == (HandoffTree(records).root, 6)
    place, record, siblings = prove_token(tokens, 2, 1)
    assert (place, record) == (4, records[4])
    assert root_of_range([leaf(record)], place, leaves, siblings) == root


def test_a_handoff_of_nothing_has_no_root() -> None:
    with pytest.raises(ValueError, match="nothing"):
        RowHandoff().finish()
