"""A message's bytes, looked through before anything is made of them.

SAFETY: in memory, rows take what they take on the wire, but two bytes of an empty piece become fifty. So of a message,
what is not rows is bounded on its own: its head.
"""

import math

from google.protobuf.message import DecodeError

from worker import ring_pb2 as pb
from worker.errors import BadMessage
from worker.packing import BITS, PLAIN

# A piece takes 26 bytes at most, so a microbatch may be of 10,000 requests: of a model that is worth a pipeline, that
# many rows are about as much as a message may be.
HEAD_BYTES = 2**18

SPREAD = 32  # bytes in memory for each of a head; measured: 25 at most, for empty pieces

# Where the rows' bytes are: Envelope.rows, Rows.hidden, Tensor.data.
ROWS = (pb.Envelope.ROWS_FIELD_NUMBER, pb.Rows.HIDDEN_FIELD_NUMBER, pb.Tensor.DATA_FIELD_NUMBER)

VARINT, LENGTH = 0, 2  # wire types
FIXED = {1: 8, 5: 4}  # the others' bytes


def read(sender: str, data: bytes) -> pb.Envelope:
    """The message. Raises BadMessage naming the sender."""
    try:
        _look_through(data, 0, len(data), ROWS, HEAD_BYTES)
        envelope = pb.Envelope.FromString(data)
    except _TooMuch:
        raise BadMessage(sender, f"expected at most {HEAD_BYTES} bytes beside the rows, came more") from None
    except (ValueError, IndexError, DecodeError) as error:
        raise BadMessage(sender, "expected an Envelope, came other bytes") from error
    # SAFETY: what a later field replaces is in no message, so nobody counts it; its memory is held all the same.
    if (told := envelope.ByteSize()) != len(data):
        raise BadMessage(sender, f"expected each field once and short, came {len(data)} bytes for {told}")
    return envelope


def head_bytes(envelope: pb.Envelope) -> int:
    """Of its bytes, those that are no rows."""
    size: int = envelope.ByteSize()
    return size - len(envelope.rows.hidden.data)


def held_bytes(envelope: pb.Envelope) -> int:
    """What it takes in memory, at most; packed rows as they are to be unpacked."""
    hidden = envelope.rows.hidden
    rows = len(hidden.data)
    if hidden.packing != PLAIN:
        rows = max(rows, math.prod(hidden.shape[:2]) * BITS[min(hidden.dtype, len(BITS) - 1)].itemsize)
    return rows + SPREAD * head_bytes(envelope)


class _TooMuch(Exception):
    pass


def _look_through(message: bytes, at: int, end: int, path: tuple[int, ...], left: int) -> int:
    """What is left of `left` after those of the bytes `at` .. `end` - 1 that are outside the field at `path`. Raises
    _TooMuch once nothing is; ValueError, IndexError.
    """
    while at < end:
        began = at
        tag, at = _varint(message, at)
        kind = tag & 7
        if kind == LENGTH:
            length, at = _varint(message, at)
            if tag >> 3 == path[0]:
                left -= at - began
                began = at = at + length
                if len(path) > 1 and at <= end:
                    left = _look_through(message, at - length, at, path[1:], left)
            else:
                at += length
        elif kind == VARINT:
            _, at = _varint(message, at)
        elif kind in FIXED:
            at += FIXED[kind]
        else:
            raise ValueError(f"wire type {kind}")
        left -= at - began
        if left < 0:
            raise _TooMuch
    if at > end:
        raise ValueError("cut off")
    return left


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """(the number, where it ends). Raises IndexError, ValueError."""
    value = message[at]
    if value < 0x80:
        return value, at + 1
    value &= 0x7F
    for shift in range(7, 70, 7):
        at += 1
        byte = message[at]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at + 1
    raise ValueError("a number of more than ten bytes")
