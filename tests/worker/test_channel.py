"""Mutual TLS with pinned certificates, and what a receiver refuses."""

import asyncio
import base64
import hashlib
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import torch
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from worker import lanes, tls
from worker import ring_pb2 as pb
from worker.batch import Batch, Piece
from worker.channel import Peer, pack_tensor, unpack_rows, unpack_tokens
from worker.envelope import held_bytes
from worker.errors import BadMessage, ConfigError, UnpinnedCertificate
from worker.grpc_channel import Link, Ring
from worker.lanes import WINDOW

JOB = bytes(32)
LIMIT = 2**20


class Party:
    def __init__(self, folder: Path, name: str) -> None:
        tls.create(folder / f"{name}.pem", folder / f"{name}.key")
        self.certificate = (folder / f"{name}.pem").read_bytes()
        self.key = (folder / f"{name}.key").read_bytes()
        self.peer = Peer(name, name, self.certificate)


def message(sequence: int, reason: str = "") -> pb.Envelope:
    return pb.Envelope(job=JOB, attempt=1, sequence=sequence, abort=pb.Abort(reason=reason))


def talk(
    tmp_path: Path,
    act: Callable[[Link, list[pb.Envelope]], Awaitable[None]],
    *,
    pinned_at_client: str = "server",
    admitted: str = "client",
    limit: int = LIMIT,
    compress: bool = False,
    ring_class: type[Ring] = Ring,
) -> None:
    """Runs `act` between a link of "client" and a ring of "server"."""
    tmp_path.mkdir(exist_ok=True)
    parties = {name: Party(tmp_path, name) for name in ("client", "server", "stranger")}

    async def work() -> None:
        got: list[pb.Envelope] = []

        async def handler(peer: Peer, envelope: pb.Envelope) -> None:
            assert peer.name == admitted
            got.append(envelope)

        server = parties["server"]
        ring = ring_class(server.certificate, server.key, handler, limit)
        port = await ring.start("127.0.0.1:0")
        ring.admit(parties[admitted].peer)
        client = parties["client"]
        target = Peer("server", "server", parties[pinned_at_client].certificate)
        link = Link(target, f"127.0.0.1:{port}", client.certificate, client.key, LIMIT, compress)
        try:
            await act(link, got)
        finally:
            await link.close()
            await ring.stop()

    asyncio.run(work())


async def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    for _ in range(int(seconds / 0.02)):
        if condition():
            return
        await asyncio.sleep(0.02)
    raise AssertionError("waited in vain")


def test_messages_arrive_in_order_and_are_acknowledged(tmp_path: Path) -> None:
    async def act(link: Link, got: list[pb.Envelope]) -> None:
        for i in range(WINDOW + 200):
            await link.send(message(i))
        await until(lambda: len(got) == WINDOW + 200)
        assert [envelope.sequence for envelope in got] == list(range(WINDOW + 200))
        await until(lambda: not link._unacknowledged)

    talk(tmp_path, act)


def test_what_is_unacknowledged_is_bounded_by_its_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A receiver that is cut off makes the sender wait, whatever the messages weigh; then all of them arrive."""
    text = "x" * 500
    size = held_bytes(message(0, text))
    monkeypatch.setattr(lanes, "WINDOW_BYTES", 5 * size + 300)
    taken = asyncio.Event()

    async def act(link: Link, got: list[pb.Envelope]) -> None:
        address, link.address = link.address, "127.0.0.1:1"  # nobody is there

        async def send() -> None:
            for i in range(20):
                await link.send(message(i, text))
            taken.set()

        sending = asyncio.create_task(send())
        await until(lambda: len(link._unacknowledged) == 5)
        await asyncio.sleep(0.1)
        assert len(link._unacknowledged) == 5 and not taken.is_set()
        link.address = address
        await sending
        await until(lambda: len(got) == 20)
        assert [envelope.sequence for envelope in got] == list(range(20))
        await until(lambda: not link._unacknowledged)
        assert not link._windows._held

    talk(tmp_path, act)


def test_an_address_that_is_taken_is_named(tmp_path: Path) -> None:
    server = Party(tmp_path, "server")

    async def handler(peer: Peer, envelope: pb.Envelope) -> None:
        raise AssertionError("nobody sends")

    async def work() -> None:
        first, second = (Ring(server.certificate, server.key, handler, LIMIT) for _ in range(2))
        address = f"127.0.0.1:{await first.start('127.0.0.1:0')}"
        try:
            with pytest.raises(ConfigError, match=f"grpc: {address} cannot be listened on"):
                await second.start(address)
        finally:
            await first.stop()

    asyncio.run(work())


def test_several_predecessors_are_admitted_at_once(tmp_path: Path) -> None:
    """Two pinned roots of one subject hid each other: only the first could connect."""
    names = ("one", "two", "three")
    senders = [Party(tmp_path, name) for name in names]
    server = Party(tmp_path, "server")

    async def work() -> None:
        got: list[str] = []

        async def handler(peer: Peer, envelope: pb.Envelope) -> None:
            got.append(peer.name)

        ring = Ring(server.certificate, server.key, handler, LIMIT)
        port = await ring.start("127.0.0.1:0")
        links = []
        for sender in senders:
            ring.admit(sender.peer)
            links.append(Link(server.peer, f"127.0.0.1:{port}", sender.certificate, sender.key, LIMIT))
            await links[-1].send(message(0))
        try:
            await until(lambda: sorted(got) == sorted(names))
        finally:
            for link in links:
                await link.close()
            await ring.stop()

    asyncio.run(work())


@pytest.mark.parametrize(("pinned", "admitted"), [("stranger", "client"), ("server", "stranger")])
def test_who_shows_another_certificate_gets_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, pinned: str, admitted: str
) -> None:
    """Nor does the handler hear of it (`talk`): the handshake fails, and whoever sends is told so again and again."""

    async def act(link: Link, got: list[pb.Envelope]) -> None:
        await link.send(message(0))
        await until(lambda: caplog.text.count("UNAVAILABLE") > 2)
        assert got == [] and len(link._unacknowledged) == 1
        assert "one of us shows a certificate not pinned" in caplog.text

    with caplog.at_level(logging.INFO, "plumb.worker.grpc_channel"):
        talk(tmp_path, act, pinned_at_client=pinned, admitted=admitted)


def test_a_message_without_a_job_is_refused_and_its_sender_dropped(tmp_path: Path) -> None:
    async def act(link: Link, got: list[pb.Envelope]) -> None:
        await link.send(pb.Envelope(job=b"short", attempt=1, abort=pb.Abort()))
        await until(lambda: link.refusal is not None)
        assert link.refusal == "expected a job of 32 bytes, an attempt from 1 and a body" and got == []
        with pytest.raises(BadMessage, match="server: refused our messages: expected a job of 32 bytes"):
            await link.send(message(0))
        link.drop(b"short", 2)  # a new attempt, of whatever job, tries again
        await link.send(message(0))
        await until(lambda: len(got) == 1)

    talk(tmp_path, act)


@pytest.mark.parametrize("length", [2_000, 3 * 2**20], ids=["by us", "by gRPC"])
def test_a_message_too_large_for_its_receiver_is_refused_and_other_jobs_are_served(tmp_path: Path, length: int) -> None:
    async def act(link: Link, got: list[pb.Envelope]) -> None:
        link._limit = 4 * 2**20  # the peer's is another
        rows = pb.Rows(hidden=pb.Tensor(data=bytes(length)))
        await link.send(pb.Envelope(job=JOB, attempt=1, rows=rows))
        await until(lambda: JOB in link._refused)
        reason = link._refused[JOB][1]
        assert "expected at most 1000 bytes" in reason or "larger than max" in reason
        with pytest.raises(BadMessage, match="server: refused our messages: "):
            await link.send(message(1))
        other = pb.Envelope(job=bytes([1] * 32), attempt=1, abort=pb.Abort())
        await link.send(other)
        await until(lambda: got == [other])

    talk(tmp_path, act, limit=1000)


def test_what_was_not_acknowledged_is_sent_again_to_a_restarted_peer(tmp_path: Path) -> None:
    parties = {name: Party(tmp_path, name) for name in ("client", "server")}

    async def work() -> None:
        got: list[int] = []

        async def handler(peer: Peer, envelope: pb.Envelope) -> None:
            got.append(envelope.sequence)

        def ring() -> Ring:
            made = Ring(parties["server"].certificate, parties["server"].key, handler, LIMIT)
            made.admit(parties["client"].peer)
            return made

        first = ring()
        port = await first.start("127.0.0.1:0")
        link = Link(
            parties["server"].peer, f"127.0.0.1:{port}", parties["client"].certificate, parties["client"].key, LIMIT
        )
        await link.send(message(0))
        await until(lambda: got == [0])
        await first.stop()
        await link.send(message(1))
        second = ring()
        await second.start(f"127.0.0.1:{port}")
        await until(lambda: got[-1] == 1, 10)
        await link.close()
        await second.stop()

    asyncio.run(work())


def rows(**changes: object) -> pb.Rows:
    made = pb.Rows(pieces=[pb.Piece(request=0, first=2, count=2)], hidden=pack_tensor(torch.ones(2, 8), 2))
    for name, value in changes.items():
        if name == "pieces":
            del made.pieces[:]
            made.pieces.extend(value)
        else:
            setattr(made.hidden, name, value) if name != "shape" else made.hidden.shape.__setitem__(slice(None), value)
    return made


def test_rows_survive_the_wire() -> None:
    for dtype, code in ((torch.bfloat16, 0), (torch.float16, 1), (torch.float32, 2)):
        hidden = torch.randn(3, 8).to(dtype)
        sent = pb.Rows(pieces=[pb.Piece(request=4, first=0, count=3)], hidden=pack_tensor(hidden, code))
        batch, came = unpack_rows("p", pb.Rows.FromString(sent.SerializeToString()), 8, code)
        assert batch == Batch((Piece(4, 0, 3),)) and torch.equal(came, hidden) and came.dtype == dtype


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"pieces": []}, "at least one piece"),
        ({"pieces": [pb.Piece(request=0, count=1), pb.Piece(request=0, count=1)]}, "twice"),
        ({"pieces": [pb.Piece(request=0, count=2), pb.Piece(request=1, count=0)]}, "no rows"),
        ({"dtype": 1}, "expected dtype 2, came 1"),
        ({"shape": [2, 9]}, "expected shape"),
        ({"shape": [2, 8, *[1] * 100_000]}, r"came \[2, 8, 1\]$"),
        ({"pieces": [pb.Piece()] * 3}, "3 pieces came with 64 bytes"),
        ({"data": b"123"}, "expected 64 bytes, came 3"),
    ],
)
def test_malformed_rows_name_their_sender(changes: dict[str, object], what: str) -> None:
    with pytest.raises(BadMessage, match=f"^stage 1: .*{what}"):
        unpack_rows("stage 1", rows(**changes), 8, 2)


def test_a_token_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises(BadMessage, match="below 10, came 10"):
        unpack_tokens("stage 2", pb.Tokens(tokens=[pb.Token(token=10)]), 10, 1)
    with pytest.raises(BadMessage, match="expected at most 3, came 4"):
        unpack_tokens("stage 2", pb.Tokens(tokens=[pb.Token(token=1)] * 4), 10, 3)


def test_a_certificate_is_pinned_by_its_fingerprint(tmp_path: Path) -> None:
    one, other = Party(tmp_path, "one"), Party(tmp_path, "other")
    assert tls.fingerprint(tls.pinned(one.certificate, tls.fingerprint(one.certificate), "x")) == tls.fingerprint(
        one.certificate
    )
    with pytest.raises(UnpinnedCertificate, match="stage 3"):
        tls.pinned(other.certificate, tls.fingerprint(one.certificate), "stage 3")
    with pytest.raises(ValueError, match="expected one certificate, came 2"):
        tls.pinned(one.certificate + other.certificate, tls.fingerprint(one.certificate), "x")
    bare = x509.load_pem_x509_certificate(one.certificate).public_bytes(Encoding.DER)
    garbled = bare.replace(b".worker.plumb", b"\xffworker.plumb")  # a name of no UTF-8
    text = b"-----BEGIN CERTIFICATE-----\n" + base64.encodebytes(garbled) + b"-----END CERTIFICATE-----\n"
    with pytest.raises(ValueError, match="not a PEM certificate"):
        tls.pinned(text, hashlib.sha256(garbled).digest(), "x")
    with pytest.raises(FileExistsError):
        tls.create(tmp_path / "one.pem", tmp_path / "one.key")
    assert (tmp_path / "one.key").stat().st_mode & 0o77 == 0
