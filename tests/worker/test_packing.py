"""Rows packed without loss: what comes out is what went in, and nothing that a peer sends makes more than it may."""

import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.worker.test_channel import JOB, LIMIT, message, talk, until
from worker import grpc_channel
from worker import ring_pb2 as pb
from worker.channel import pack_tensor, packed, unpack_rows, unpacked
from worker.errors import BadMessage
from worker.grpc_channel import Link, Ring
from worker.packing import BITS, PACKED, PLAIN, pack, unpack

DTYPES = {0: torch.bfloat16, 1: torch.float16, 2: torch.float32}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 2, 255, 4096])
def test_any_bits_come_back(dtype: int, count: int) -> None:
    random = np.random.default_rng(count)
    for data in (
        random.bytes(count * BITS[dtype].itemsize),  # NaNs and all
        bytes(count * BITS[dtype].itemsize),
        pack_tensor(torch.randn(count).to(DTYPES[dtype]), dtype).data,
    ):
        assert unpack(pack(data, dtype), count, dtype) == data


@pytest.mark.parametrize(("dtype", "least"), [(0, 1.45), (1, 1.15), (2, 1.18)])
def test_noise_of_one_scale_is_packed_to_near_its_entropy(dtype: int, least: float) -> None:
    data = pack_tensor(torch.randn(64, 1024).to(DTYPES[dtype]), dtype).data
    assert len(data) / len(pack(data, dtype)) > least


def stream(data: bytes) -> bytes:
    coder = zlib.compressobj(9, zlib.DEFLATED, -15)
    return coder.compress(data) + coder.flush()


GOOD = pack(bytes(range(16)), 0)  # 8 elements: 8 lower bytes, then the stream


@pytest.mark.parametrize(
    "wrong",
    [
        b"",
        GOOD[:8],
        GOOD[:-1],
        GOOD + b"\0",
        bytes(8) + b"\xff" * 8,
        bytes(8) + stream(bytes(7)),
        bytes(8) + stream(bytes(9)),
        bytes(8) + stream(bytes(2**28)),  # 260 KB that stand for 256 MB
    ],
)
def test_what_is_no_packing_of_so_many_is_refused(wrong: bytes) -> None:
    with pytest.raises(ValueError, match="expected"):
        unpack(wrong, 8, 0)


def test_no_elements_are_none() -> None:
    with pytest.raises(ValueError, match="expected 0 elements"):
        unpack(bytes(8), 0, 0)


def rows_message(sequence: int = 0, rows: int = 16, **changes: Any) -> pb.Envelope:
    hidden = pack_tensor(torch.randn(rows, 256).to(torch.bfloat16), 0)
    sent = pb.Rows(pieces=[pb.Piece(request=0, first=0, count=rows)], hidden=hidden, ended=[3], times=pb.Times(busy=5))
    for name, value in changes.items():
        setattr(sent.hidden, name, value) if name != "shape" else sent.hidden.shape.__setitem__(slice(None), value)
    return pb.Envelope(job=JOB, attempt=1, sequence=sequence, rows=sent)


def test_a_message_is_the_same_behind_its_packing() -> None:
    plain = rows_message()
    small = packed(plain)
    assert small.rows.hidden.packing == PACKED and small.ByteSize() < 0.75 * plain.ByteSize()
    assert unpacked("p", small, LIMIT) == plain


def test_what_packing_makes_no_smaller_stays_as_it_is() -> None:
    noise = rows_message(data=np.random.default_rng(0).bytes(16 * 256 * 2))
    assert packed(noise) is noise


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"packing": 2}, "expected packing 1"),
        ({"packing": 1, "dtype": 3}, "dtype 3"),
        ({"packing": 1, "shape": [2**31, 2**31]}, "a matrix, at most 1048576 bytes unpacked"),
        ({"packing": 1, "shape": []}, "expected a matrix"),
        ({"packing": 1, "shape": [2**32 - 1] * 40_000}, "came shape [4294967295, 4294967295, 4294967295]"),
        ({"packing": 1, "shape": [1, 1]}, "expected a deflate stream of 1 bytes"),
        ({"packing": 1, "shape": [0, 256]}, "expected 0 elements"),
        ({"packing": 1, "data": bytes(16 * 256) + stream(bytes(2**26))}, "expected a deflate stream of 4096 bytes"),
    ],
)
def test_a_peer_that_packs_wrongly_is_dropped_and_learns_why(
    tmp_path: Path, changes: dict[str, Any], what: str
) -> None:
    if what.startswith("expected a deflate stream of 1 "):
        changes = changes | {"data": bytes(1) + stream(bytes(9))}

    async def act(link: Link, got: list[pb.Envelope]) -> None:
        await link.send(rows_message(**changes))
        await until(lambda: JOB in link._refused)
        assert what in link._refused[JOB][1] and got == []

    talk(tmp_path, act)


def test_rows_are_packed_on_the_wire_if_both_ends_want_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def watched(sender: str, envelope: pb.Envelope, limit: int) -> pb.Envelope:
        seen.append(envelope.rows.hidden.packing)
        return unpacked(sender, envelope, limit)

    monkeypatch.setattr(grpc_channel, "unpacked", watched)
    sent = [message(0), *(rows_message(i) for i in range(1, 9))]

    async def act(link: Link, got: list[pb.Envelope]) -> None:
        await link.send(sent[0])
        await until(lambda: link._packing or not link._compress)
        for envelope in sent[1:]:
            await link.send(envelope)
        await until(lambda: len(got) == len(sent))
        assert got == sent and all(m.rows.hidden.packing == PLAIN for m in got)
        assert unpack_rows("p", got[-1].rows, 256, 0)[0].rows == 16
        await until(lambda: not link._unacknowledged)
        assert not link._windows._held

    talk(tmp_path / "both", act, compress=True)
    assert seen == [PACKED] * 8
    talk(tmp_path / "neither", act)
    assert len(seen) == 8


def test_a_receiver_that_does_not_know_packing_gets_plain_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(sender: str, envelope: pb.Envelope, limit: int) -> pb.Envelope:
        raise BadMessage(sender, "packed")

    monkeypatch.setattr(grpc_channel, "unpacked", never)

    async def act(link: Link, got: list[pb.Envelope]) -> None:
        for i in range(4):
            await link.send(rows_message(i))
            await until(lambda i=i: len(got) == i + 1)  # type: ignore[misc]
        assert link.refusal is None and not link._packing

    class Silent:
        """A call's context in which nothing is told of packing."""

        def __init__(self, context: Any) -> None:
            self._context = context

        def __getattr__(self, name: str) -> Any:
            return getattr(self._context, name)

        async def send_initial_metadata(self, _: Any) -> None:
            await self._context.send_initial_metadata((("plumb-other", "1"),))

    class Older(Ring):
        async def Flow(self, request_iterator: Any, context: Any) -> Any:
            async for ack in super().Flow(request_iterator, Silent(context)):
                yield ack

    talk(tmp_path, act, compress=True, ring_class=Older)
