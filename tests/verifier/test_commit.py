"""The batch's records, their checks and openings."""

from dataclasses import dataclass, replace
from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st

from verifier.commit import (
    LIMITED,
    STOPPED,
    HandoffTree,
    InvalidRequest,
    Output,
    OutputsTree,
    Request,
    RequestsTree,
    StageTree,
    TraceNode,
    make_outputs,
    outputs_root,
    positions,
    requests_root,
    total_tokens,
    validate_request,
)
from verifier.referee import codec, tree
from verifier.referee.errors import IndexOutOfRange


@dataclass(frozen=True)
class Limits:
    vocabulary: int = 1000
    max_positions: int = 32


GOOD = Request((1, 2, 3), 5, (999,))


def test_the_request_record_worked_by_hand() -> None:
    prompt_root = sha256(b"\x00" + bytes.fromhex("000000010000000200000003")).digest()
    expected = "00000007 00000003 00000005 00000000 00000000 00010000 000000000000002a 00000001 000003e7" + "00" * 28
    assert replace(GOOD, seed=42).record(7) == bytes.fromhex(expected) + prompt_root
    assert len(GOOD.record(0)) == 100


def test_the_output_and_trace_records_worked_by_hand() -> None:
    tokens_root = sha256(b"\x00" + bytes.fromhex("00000009")).digest()
    record = Output(258, 1, STOPPED, (9,)).record(3)
    assert record == bytes.fromhex("00000003 0000000000000102 00000001 00000001") + tokens_root
    assert TraceNode(515, b"\x11" * 32).record(2) == bytes.fromhex("00000002 00000203") + b"\x11" * 32


def test_the_roots_of_a_batch_of_one_and_of_two() -> None:
    assert requests_root([GOOD]) == sha256(b"\x00" + GOOD.record(0)).digest()
    leaves = [sha256(b"\x00" + GOOD.record(r)).digest() for r in (0, 1)]
    assert requests_root([GOOD, GOOD]) == sha256(b"\x01" + leaves[0] + leaves[1]).digest()
    output = Output(0, 1, LIMITED, (4,))
    assert outputs_root([output]) == sha256(b"\x00" + output.record(0)).digest()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"prompt": ()}, "prompt of 1 token"),
        ({"limit": 0}, "limit of 1 token"),
        ({"limit": 30}, "within 32 positions"),
        ({"prompt": (1, 1000)}, "prompt ids below 1000, got 1000 at 1"),
        ({"prompt": (-1,)}, "prompt ids below 1000"),
        ({"stops": (1000,)}, "stop ids below 1000"),
        ({"stops": tuple(range(9))}, "at most 8 stop ids"),
        ({"temperature": (100 << 16) + 1}, "temperature of 0 .. 6553600"),
        ({"temperature": -1}, "temperature of 0"),
        ({"temperature": 1, "top_k": 1001}, "top_k of 0 .. 1000"),
        ({"temperature": 1, "top_k": -1}, "top_k of 0 .. 1000"),
        ({"temperature": 1, "top_p": 0}, "top_p of 1 .. 65536"),
        ({"temperature": 1, "top_p": 65537}, "top_p of 1 .. 65536"),
        ({"top_k": 1}, "greedy"),
        ({"top_p": 65535}, "greedy"),
        ({"seed": 1 << 64}, "seed"),
        ({"seed": -1}, "seed"),
    ],
)
def test_what_the_law_cannot_serve_is_refused(change: dict[str, object], reason: str) -> None:
    with pytest.raises(InvalidRequest, match=reason):
        validate_request(replace(GOOD, **change), Limits())  # type: ignore[arg-type]


def test_what_just_fits_is_served() -> None:
    validate_request(replace(GOOD, limit=29, stops=tuple(range(8)), seed=(1 << 64) - 1), Limits())
    validate_request(replace(GOOD, temperature=1, top_k=1000, top_p=1), Limits())
    validate_request(replace(GOOD, temperature=100 << 16), Limits())


def test_what_sample_knows_of_a_request_is_a_part_of_its_record() -> None:
    drawn = replace(GOOD, temperature=1 << 16, top_k=7, top_p=9, seed=11)
    assert GOOD.sampling(5) == bytes(32) and GOOD.greedy and not drawn.greedy
    assert drawn.sampling(5) == drawn.record(5)[12:32] + (5).to_bytes(4, "big") + bytes(8)


def test_outputs_start_behind_one_another_and_say_why_they_ended() -> None:
    outputs = make_outputs([[7, 999], [5, 6, 7, 8, 9], [1, 2, 3, 4, 999]], [GOOD] * 3)
    assert [(o.start, o.count, o.code) for o in outputs] == [(0, 2, STOPPED), (2, 5, LIMITED), (7, 5, STOPPED)]
    assert total_tokens(outputs) == 12
    assert positions(GOOD, outputs[1]) == 7


@pytest.mark.parametrize("tokens", [[], [1], [999, 1, 2, 3, 4], [1, 2, 3, 4, 5, 6]])
def test_tokens_that_end_against_the_law_are_refused(tokens: list[int]) -> None:
    with pytest.raises(ValueError, match="request 0"):
        make_outputs([tokens], [GOOD])


@given(st.lists(st.integers(1, 400), min_size=1, max_size=9), st.data())
def test_every_opening_verifies(lengths: list[int], data: st.DataObject) -> None:
    requests = [Request(tuple(range(r, r + n)), 1) for r, n in enumerate(lengths)]
    outputs = [Output(r, n, LIMITED, tuple(range(n))) for r, n in enumerate(lengths)]
    r = data.draw(st.integers(0, len(lengths) - 1))
    index = data.draw(st.integers(0, lengths[r] - 1))
    batches: list[RequestsTree | OutputsTree] = [RequestsTree(requests), OutputsTree(outputs)]
    for batch in batches:
        record = batch.record_opening(r)
        assert tree.root_of_range([tree.leaf(record.data)], r, len(lengths), record.siblings) == batch.root
        asked = isinstance(batch, RequestsTree)
        decoded = codec.Request.decode(record.data) if asked else codec.Output.decode(record.data)
        assert decoded.index == r
        tokens_root = decoded.prompt_root if isinstance(decoded, codec.Request) else decoded.tokens_root
        opening = batch.token_opening(r, index)
        count = -(-lengths[r] // 128)
        assert tree.root_of_range([tree.leaf(opening.data)], index // 128, count, opening.siblings) == tokens_root
        held = requests[r].prompt if asked else outputs[r].tokens
        at = index % 128 * 4
        assert int.from_bytes(opening.data[at : at + 4], "big") == held[index]


def test_stage_and_handoff_trees_open() -> None:
    stage = StageTree([TraceNode(t, bytes([t]) * 32) for t in range(1, 6)])
    opening = stage.opening(4)
    assert codec.TraceNode.decode(opening.data) == codec.TraceNode(4, 5, b"\x05" * 32)
    assert tree.root_of_range([tree.leaf(opening.data)], 4, 5, opening.siblings) == stage.root
    handoffs = HandoffTree([codec.handoff_token(0, i, 10 + i) for i in range(3)] + [codec.handoff_row(0, 1, 2, b"ab")])
    opening = handoffs.opening(3)
    assert opening.data == bytes.fromhex("000000000000000100000002") + b"ab"
    assert tree.root_of_range([tree.leaf(opening.data)], 3, handoffs.leaves, opening.siblings) == handoffs.root


@pytest.mark.parametrize(("r", "index"), [(-1, 0), (1, 0), (0, -1), (0, 3)])
def test_what_the_batch_does_not_hold_is_refused(r: int, index: int) -> None:
    with pytest.raises(IndexOutOfRange):
        RequestsTree([GOOD]).token_opening(r, index)


def test_no_batch_without_requests() -> None:
    with pytest.raises(IndexOutOfRange):
        requests_root([])
