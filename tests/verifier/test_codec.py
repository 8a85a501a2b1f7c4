"""verifier.referee.codec: every format round-trips, and the bytes are those of the law."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from verifier.referee.codec import (
    Instruction,
    Model,
    Operand,
    Output,
    ProfileCell,
    Request,
    SegmentHeader,
    TraceNode,
    decode_vector,
    encode_vector,
    handoff_row,
    handoff_token,
    table_leaves,
    token_leaves,
    vector_leaves,
    vector_root,
)
from verifier.referee.errors import DataLength
from verifier.referee.tree import leaf, node

U8, U32, U64 = (st.integers(0, (1 << bits) - 1) for bits in (8, 32, 64))
OPERANDS = st.builds(Operand, U8, U8, U64, U64, U32, U32)
INSTRUCTIONS = st.builds(Instruction, U8, U8, U32, U32, U32, U32, U64, U32, OPERANDS, OPERANDS, OPERANDS)


@given(st.booleans(), st.data())
def test_zigzag_is_a_bijection(wide: bool, data: st.DataObject) -> None:
    bits = 128 if wide else 64
    values = data.draw(st.lists(st.integers(-(1 << bits - 1), (1 << bits - 1) - 1)))
    assert decode_vector(encode_vector(values, wide), wide) == values
    raw = data.draw(st.binary(min_size=bits // 8, max_size=bits // 8))
    assert encode_vector(decode_vector(raw, wide), wide) == raw


def test_zigzag_by_hand() -> None:
    assert (
        encode_vector([0, -1, 1, -2], False).hex() == "0000000000000000000000000000000100000000000000020000000000000003"
    )
    assert encode_vector([-(1 << 127)], True) == b"\xff" * 16
    for value, wide in ((1 << 63, False), (-(1 << 63) - 1, False), (1 << 127, True)):
        with pytest.raises(ValueError, match="expected an i"):
            encode_vector([value], wide)
    with pytest.raises(DataLength):
        decode_vector(bytes(9), False)


def test_vector_leaves_hold_64_or_128_elements_and_the_last_is_shorter() -> None:
    assert [len(x) for x in vector_leaves(range(130), False)] == [512, 512, 16]
    assert [len(x) for x in vector_leaves(range(129), True)] == [2048, 16]
    a, b = vector_leaves(range(65), False)
    assert vector_root(range(65), False) == node(leaf(a), leaf(b))


@given(INSTRUCTIONS)
def test_instruction_round_trips(instruction: Instruction) -> None:
    data = instruction.encode()
    assert len(data) == 128
    assert Instruction.decode(data) == instruction


def test_instruction_by_hand() -> None:
    x = Operand(1, 2, 3, 4, 5, 6)
    data = Instruction(7, 1, 2, 3, 4, 5, 6, 8, x=x).encode()
    head = "07" + "01" + "00000002" + "00000003" + "00000004" + "00000005" + "0000000000000006" + "00000008" + "0000"
    operand = "01" + "02" + "0000000000000003" + "0000000000000004" + "00000005" + "00000006" + "000000000000"
    assert data.hex() == head + operand + "00" * 64
    with pytest.raises(DataLength):
        Instruction.decode(data[:-1])
    with pytest.raises(ValueError, match="zero padding"):
        Instruction.decode(data[:-1] + b"\x01")


def test_model_is_fourteen_words() -> None:
    roots = [bytes([i]) * 32 for i in (1, 2, 3)]
    model = Model(roots[0], 5, roots[1], 6, roots[2], 7, 8, 9, 10, 11, 12, 13, 0, 2)
    words = [model.abi_words()[i : i + 32] for i in range(0, 448, 32)]
    assert len(model.abi_words()) == 448
    assert words[0::2][:3] == roots
    assert [int.from_bytes(w, "big") for w in words[1:6:2] + words[6:]] == [5, 6, 7, 8, 9, 10, 11, 12, 13, 0, 2]


@given(U32, U32, U32, U64)
def test_header_and_profile_round_trip(a: int, b: int, c: int, d: int) -> None:
    header, cell = SegmentHeader(a, b, c), ProfileCell(a, b, d)
    assert SegmentHeader.decode(header.encode()) == header
    assert ProfileCell.decode(cell.encode()) == cell
    for kind in (SegmentHeader, ProfileCell):
        with pytest.raises(DataLength):
            kind.decode(bytes(15))


@given(U32, U32, U32, U64, st.lists(U32, max_size=8), st.binary(min_size=32, max_size=32))
def test_records_round_trip(a: int, b: int, c: int, d: int, stops: list[int], hash_: bytes) -> None:
    request = Request(a, b, c, d, tuple(stops), hash_)
    output, trace = Output(a, d, b, c, hash_), TraceNode(a, b, hash_)
    assert (len(request.encode()), len(output.encode()), len(trace.encode())) == (100, 52, 40)
    assert Request.decode(request.encode()) == request
    assert Output.decode(output.encode()) == output
    assert TraceNode.decode(trace.encode()) == trace


def test_records_refuse_other_bytes() -> None:
    for kind in (Request, Output, TraceNode):
        with pytest.raises(DataLength):
            kind.decode(bytes(39))
    good = Request(0, 1, 2, 3, (4,), bytes(32)).encode()
    with pytest.raises(ValueError, match="stop ids"):
        Request.decode(good[:32] + b"\x00\x00\x00\x09" + good[36:])
    with pytest.raises(ValueError, match="stop ids"):
        Request.decode(good[:40] + b"\x01" + good[41:])
    with pytest.raises(ValueError, match="stop ids"):
        Request(0, 1, 2, 3, tuple(range(9)), bytes(32)).encode()


def test_leaves_of_tables_tokens_and_handoffs() -> None:
    assert [len(x) for x in table_leaves(range(65))] == [512, 8]
    assert table_leaves([1])[0].hex() == "0000000000000001"
    assert [len(x) for x in token_leaves(range(129))] == [512, 4]
    assert handoff_row(1, 2, 3, b"\xff").hex() == "000000010000000200000003ff"
    assert handoff_token(1, 2, 3).hex() == "000000010000000200000003"
