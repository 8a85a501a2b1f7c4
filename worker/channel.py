"""Messages between neighbours: what carries them, and how they are made and read.

A Channel is one worker's end of the wire. gRPC's is worker/grpc_channel.py; whatever keeps the promises below may take
its place, as a sidecar that finds its way through NATs.
"""

import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from worker import ring_pb2 as pb
from worker.batch import Batch, Piece, Token
from worker.errors import BadMessage
from worker.packing import PACKED, PLAIN, pack, unpack
from worker.stage import BITS, from_bits, to_bits


@dataclass(frozen=True)
class Peer:
    """A neighbour as the chain knows it. `name` is what errors call it: stage and account."""

    name: str
    account: str
    certificate: bytes  # PEM, checked against the chain


Handler = Callable[[Peer, pb.Envelope], Awaitable[None]]
"""Takes each message; returns once there is room for the next. Raises BadMessage to refuse it to its sender."""


class Sender(Protocol):
    """To one neighbour.

    INVARIANT: its messages arrive in the order of sending, each at least once until it is dropped: a connection that is
    lost is made again, and what was not acknowledged sent again. Receivers know what they had by its sequence number.
    Order is each job's own: one whose messages are not taken keeps no other's waiting.
    """

    async def send(self, envelope: pb.Envelope) -> None:
        """Returns once the message is queued; waits while too much of its job is unacknowledged. Raises BadMessage if
        the peer refused this attempt of the job, or us; ValueError if the message is too large.
        """

    def drop(self, job: bytes, attempt: int) -> None:
        """Attempts before `attempt` are over: forgets their messages and refusals."""


class Channel(Protocol):
    """SAFETY: the handler hears only of peers that were admitted, each under its own name, by its certificate."""

    async def start(self, address: str) -> int:
        """Listens on host:port (port 0: any); returns the port. Raises ConfigError if the address can't be had."""

    def admit(self, peer: Peer) -> None:
        """From now on `peer` may send to us."""

    def to(self, peer: Peer, address: str) -> Sender:
        """One an account, shared by all jobs that go there; connects at once, and stays connected. Who comes with
        another address or certificate has moved: what waits for it goes there, and nobody looks for it elsewhere.
        """

    async def close(self) -> None: ...


# ------------------------------------------------------------------------------------------------------------- messages


def pack_tensor(rows: torch.Tensor, dtype: int) -> pb.Tensor:
    return pb.Tensor(dtype=dtype, shape=list(rows.shape), data=to_bits(rows).tobytes())


def unpack_rows(sender: str, rows: pb.Rows, hidden: int, dtype: int) -> tuple[Batch, torch.Tensor]:
    """The microbatch and its layer inputs, [rows, hidden]. Raises BadMessage naming the sender.

    SAFETY: what takes two bytes here takes a hundred once it is made. Pieces are made of no more than have a row.
    """
    tensor = rows.hidden
    if tensor.dtype != dtype:
        raise BadMessage(sender, f"rows: expected dtype {dtype}, came {tensor.dtype}")
    kind = np.dtype(BITS[dtype]).newbyteorder("<")
    if len(rows.pieces) * hidden * kind.itemsize > max(len(tensor.data), hidden * kind.itemsize):
        raise BadMessage(sender, f"rows: {len(rows.pieces)} pieces came with {len(tensor.data)} bytes of rows")
    pieces = (Piece(p.request, p.first, p.count, p.donor if p.HasField("donor") else None) for p in rows.pieces)
    batch = Batch(tuple(pieces))
    if not batch.pieces:
        raise BadMessage(sender, "rows: expected at least one piece, came none")
    if len({piece.request for piece in batch.pieces}) != len(batch.pieces):
        raise BadMessage(sender, "rows: a request occurs twice in a microbatch")
    if any(piece.count == 0 for piece in batch.pieces):
        raise BadMessage(sender, "rows: a piece of no rows")
    shape = list(tensor.shape[:3])
    if shape != [batch.rows, hidden]:
        raise BadMessage(sender, f"rows: expected shape {[batch.rows, hidden]}, came {shape}")
    if len(tensor.data) != batch.rows * hidden * kind.itemsize:
        raise BadMessage(sender, f"rows: expected {batch.rows * hidden * kind.itemsize} bytes, came {len(tensor.data)}")
    bits = np.frombuffer(tensor.data, kind).astype(BITS[dtype]).reshape(batch.rows, hidden)
    return batch, from_bits(bits, (torch.bfloat16, torch.float16, torch.float32)[dtype])


def unpack_tokens(sender: str, tokens: pb.Tokens, vocabulary: int, most: int) -> list[Token]:
    """most: tokens of one microbatch. Raises BadMessage naming the sender."""
    if len(tokens.tokens) > most:
        raise BadMessage(sender, f"tokens: expected at most {most}, came {len(tokens.tokens)}")
    for token in tokens.tokens:
        if token.token >= vocabulary:
            raise BadMessage(sender, f"tokens: expected an id below {vocabulary}, came {token.token}")
    return [Token(t.request, t.index, t.token) for t in tokens.tokens]


def packed(envelope: pb.Envelope) -> pb.Envelope:
    """The same message with its rows packed, if that makes it smaller."""
    plain = envelope.rows.hidden
    data = pack(plain.data, plain.dtype)
    if len(data) >= len(plain.data):
        return envelope
    rows = pb.Rows(pieces=envelope.rows.pieces, ended=envelope.rows.ended, times=envelope.rows.times)
    rows.hidden.CopyFrom(pb.Tensor(dtype=plain.dtype, shape=plain.shape, data=data, packing=PACKED))
    return pb.Envelope(job=envelope.job, attempt=envelope.attempt, sequence=envelope.sequence, rows=rows)


def unpacked(sender: str, envelope: pb.Envelope, limit: int) -> pb.Envelope:
    """Undoes `packed`, in place. Raises BadMessage naming the sender; nothing larger than `limit` bytes is made."""
    tensor = envelope.rows.hidden
    if tensor.packing != PACKED or tensor.dtype >= len(BITS):
        what = f"packing {tensor.packing} of dtype {tensor.dtype}"
        raise BadMessage(sender, f"rows: expected packing {PACKED} of a dtype below {len(BITS)}, came {what}")
    # SAFETY: two numbers; the product of millions would take hours, and nothing else of this process runs meanwhile.
    shape = list(tensor.shape[:3])
    count = math.prod(shape)
    if len(shape) != 2 or count * np.dtype(BITS[tensor.dtype]).itemsize > limit:
        raise BadMessage(sender, f"rows: expected a matrix, at most {limit} bytes unpacked, came shape {shape}")
    try:
        tensor.data = unpack(tensor.data, count, tensor.dtype)
    except ValueError as error:
        raise BadMessage(sender, f"rows: {error}") from error
    tensor.packing = PLAIN
    return envelope
