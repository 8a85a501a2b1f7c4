"""What a message takes in memory is bounded before it is made: a neighbour chooses its bytes."""

from types import SimpleNamespace

import pytest

from worker import envelope
from worker import ring_pb2 as pb
from worker.envelope import HEAD_BYTES, head_bytes, held_bytes, read
from worker.errors import BadMessage

EMPTY = b"\x0a\x00"  # a piece, or a token: fifty bytes once it is made


def field(number: int, data: bytes) -> bytes:
    """`data` as a field of a message, fewer than 2^28 bytes."""
    size = [len(data) >> shift & 0x7F | 0x80 for shift in (0, 7, 14)]
    return bytes([number << 3 | 2, *size, len(data) >> 21]) + data


HOSTILE = {
    "pieces": field(4, EMPTY * HEAD_BYTES),
    "tokens": field(5, EMPTY * HEAD_BYTES),
    "ended": field(4, field(3, bytes(HEAD_BYTES))),
    "shape": field(4, field(2, field(2, bytes(HEAD_BYTES)))),
    "bodies, one after another": b"\x22\x00\x2a\x00" * HEAD_BYTES,
    "fields that nobody knows": b"\x78\x01" * HEAD_BYTES,
    "rows, a byte each": field(4, field(2, b"\x1a\x01\x00" * HEAD_BYTES)),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_parts_without_end_are_refused_before_anything_is_made(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[bytes] = []
    monkeypatch.setattr(envelope, "pb", SimpleNamespace(Envelope=SimpleNamespace(FromString=made.append)))
    with pytest.raises(BadMessage, match=f"^stage 3: expected at most {HEAD_BYTES} bytes beside the rows, came more$"):
        read("stage 3", HOSTILE[name])
    assert not made


@pytest.mark.parametrize(
    "data",
    [
        b"\x22",
        b"\x22\x05\x0a",
        b"\x23\x24",
        b"\xff" * 11,
        b"\x0d\x00",
        b"\x09\x00",
        field(4, b"\x12\x7f"),
    ],
)
def test_bytes_that_are_no_message_are_refused_by_name(data: bytes) -> None:
    with pytest.raises(BadMessage, match=r"^stage 3: expected an Envelope, came other bytes$"):
        read("stage 3", data)


def microbatch(pieces: int, row_bytes: int) -> pb.Envelope:
    rows = pb.Rows(
        pieces=[pb.Piece(request=i, first=1000 * i, count=1, donor=0) for i in range(pieces)],
        hidden=pb.Tensor(dtype=2, shape=[pieces, 64], data=bytes(pieces * row_bytes)),
        ended=range(pieces),
        times=pb.Times(busy=1 << 62, slowest=7),
    )
    return pb.Envelope(job=bytes(32), attempt=1, sequence=1 << 60, rows=rows)


@pytest.mark.parametrize(
    "message",
    [
        microbatch(1, 20 * 2**20),
        microbatch(5000, 4096),
        pb.Envelope(
            job=bytes(32), attempt=1, tokens=pb.Tokens(tokens=[pb.Token(request=3, index=400, token=99)] * 900)
        ),
        pb.Envelope(job=bytes(32), attempt=1, finish=pb.Finish(root=bytes(32), leaves=9, signature=bytes(65))),
        pb.Envelope(job=bytes(32), attempt=1, abort=pb.Abort(reason="x" * 500)),
        pb.Envelope(job=bytes(32), attempt=1, beat=pb.Beat(held_ms=1, last=True)),
    ],
)
def test_what_stages_send_is_read(message: pb.Envelope) -> None:
    assert read("stage 3", message.SerializeToString()) == message


def test_rows_are_no_head_and_heads_weigh_what_they_become(monkeypatch: pytest.MonkeyPatch) -> None:
    message = microbatch(50, 256)
    head = len(message.SerializeToString()) - 50 * 256
    assert head_bytes(message) == head and held_bytes(message) == 50 * 256 + 32 * head
    monkeypatch.setattr(envelope, "HEAD_BYTES", head)
    read("stage 3", message.SerializeToString())
    monkeypatch.setattr(envelope, "HEAD_BYTES", head - 1)
    with pytest.raises(BadMessage, match="bytes beside the rows, came more"):
        read("stage 3", message.SerializeToString())


BEAT = pb.Envelope(job=bytes(32), attempt=1, beat=pb.Beat(held_ms=1)).SerializeToString()


@pytest.mark.parametrize(
    "data",
    [
        field(4, field(2, field(3, bytes(2**20)))) + BEAT,
        field(4, EMPTY * 1000) + BEAT,
        BEAT + field(4, field(2, field(3, bytes(2**20)) + b"\x1a\x00")),
        BEAT + field(4, field(2, field(3, bytes(2**20)))) + field(4, field(2, b"\x1a\x00")),
        field(1, bytes(1000)) + BEAT,
        BEAT + b"\x18\x80\x00",
    ],
    ids=["rows below a beat", "pieces below a beat", "data twice", "rows twice", "a job twice", "a long number"],
)
def test_what_a_later_field_replaces_is_not_taken_for_nothing(data: bytes) -> None:
    """It is in no message that is made, and takes its memory all the same."""
    with pytest.raises(BadMessage, match=f"^stage 3: expected each field once and short, came {len(data)} bytes for "):
        read("stage 3", data)
