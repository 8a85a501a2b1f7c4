"""A neighbour that sends what it may not, over the real wire: the stage that gets it gives the reason, by name, that
job's attempt ends, and another job of the same pair of stages is served meanwhile.
"""

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import grpc
import pytest

from contracts.client import Status
from deploy.devnet import Devnet
from tests.worker.pipeline_in_process import Greedy, Tiny, within
from tests.worker.test_channel import Party, until
from tests.worker.village import Village
from verifier.commit import Request, make_outputs, outputs_root
from worker import ring_pb2 as pb
from worker import ring_pb2_grpc
from worker.agent import Agent, build_worker
from worker.channel import Peer, Sender
from worker.config import WorkerConfig
from worker.grpc_channel import GrpcChannel
from worker.tls import PEER_NAME

GOOD = Request((5, 6, 7, 8, 9), 12)
BENT = Request((11, 12, 13), 8)

Bend = Callable[[pb.Envelope], None]


class Bender:
    """A sender that changes one message of one job, in its first attempt."""

    def __init__(self, sender: Sender, bender: "BendingChannel") -> None:
        self._sender = sender
        self._bender = bender

    async def send(self, envelope: pb.Envelope) -> None:
        bent = pb.Envelope.FromString(envelope.SerializeToString())
        if bent.job == self._bender.job and bent.WhichOneof("body") == self._bender.body:
            self._bender.bend(bent)
        await self._sender.send(bent)

    def drop(self, job: bytes, attempt: int) -> None:
        self._sender.drop(job, attempt)


class BendingChannel(GrpcChannel):
    job = b""
    body = "rows"
    bend: Bend = staticmethod(lambda envelope: None)

    def to(self, peer: Peer, address: str) -> Bender:  # type: ignore[override]
        return Bender(super().to(peer, address), self)


def shape(envelope: pb.Envelope) -> None:
    envelope.rows.hidden.shape[1] += 1


def dtype(envelope: pb.Envelope) -> None:
    envelope.rows.hidden.dtype = 1


def length(envelope: pb.Envelope) -> None:
    envelope.rows.hidden.data = envelope.rows.hidden.data[:-1]


def sequence(envelope: pb.Envelope) -> None:
    envelope.sequence += 5 * (envelope.sequence > 0)  # the first would look like one behind a restart


def place(envelope: pb.Envelope) -> None:
    envelope.rows.pieces[0].first += 1


def signature(envelope: pb.Envelope) -> None:
    envelope.finish.signature = bytes(65)


def root(envelope: pb.Envelope) -> None:
    envelope.finish.root = bytes(32)


def token(envelope: pb.Envelope) -> None:
    for told in envelope.tokens.tokens:
        told.token = 211


CASES: list[tuple[int, str, Bend, str]] = [
    (0, "rows", shape, "rows: expected shape [3, 64], came [3, 65]"),
    (0, "rows", dtype, "rows: expected dtype 2, came 1"),
    (0, "rows", length, "rows: expected 768 bytes, came 767"),
    (0, "rows", sequence, "expected message "),
    (0, "rows", place, "request 0: expected position 0, came 1"),
    (1, "tokens", token, "tokens: expected an id below 211, came 211"),
    (0, "finish", signature, "its hand-off is not signed with its key"),
    (0, "finish", root, "signed hand-off 0x" + "00" * 32),
]


@pytest.fixture
def village(tiny: Tiny, tmp_path: Path) -> Iterator[Village]:
    def build(index: int, config: WorkerConfig) -> Agent:
        serving = replace(config.serving, attempts=1)
        return build_worker(replace(config, serving=serving), channel_class=BendingChannel)

    folder, _ = tiny
    with Devnet() as devnet:
        made = Village(devnet, tmp_path, folder, build=build)
        made.settle_in()
        yield made


async def reason(village: Village, id: bytes) -> str:
    """Of the stages that failed, whoever knows more."""
    for _ in range(600):
        states = [(await village.get(stage, f"/jobs/{id.hex()}")).json() for stage in (0, 1)]
        # A stage that has not heard of the job yet tells no phase.
        told = [str(state["reason"]) for state in states if state.get("phase") == "failed"]
        if told:
            return max(told, key=len)
        await asyncio.sleep(0.1)
    raise AssertionError(f"expected a failure, came {states}")


def test_each_is_refused_with_its_reason_and_another_job_is_served(
    village: Village, tiny: Tiny, greedy: Greedy
) -> None:
    _, model = tiny
    expected = outputs_root(make_outputs([greedy(model, GOOD)], [GOOD]))

    async def story() -> None:
        await village.wake()
        for sender, body, bend, why in CASES:
            channel = village.agents[sender].channel
            assert isinstance(channel, BendingChannel)
            job = village.job([BENT])
            channel.job, channel.body, channel.bend = (
                village.requester.escrow.job_id(village.requester.account, job),
                body,
                bend,
            )
            id = await asyncio.to_thread(village.requester.escrow.open, job)
            assert id == channel.job
            assert (await village.send(id, [BENT])).status_code == 200
            served = await village.open([GOOD])
            told = await reason(village, id)
            assert why in told and f"stage {sender} (0x" in told, told
            await village.reaches(served, Status.COMMITTED)
            assert village.requester.escrow.outputs(served)[0] == expected
            assert (await village.get(0, f"/jobs/{served.hex()}")).json()["attempt"] == 1
        await village.sleep()

    asyncio.run(within(1200, story()))


def test_strangers_get_nothing_and_the_job_is_served(
    village: Village, tiny: Tiny, greedy: Greedy, tmp_path: Path
) -> None:
    """By a certificate that nobody pinned; by one that is pinned to another stage; of a job that there is not."""
    _, model = tiny

    async def story() -> None:
        await village.wake()
        stranger = Party(tmp_path, "stranger")
        second = village.agents[1]
        identities = {"stranger": (stranger.certificate, stranger.key), "ours": (second.certificate, second._key)}
        id = await village.open([GOOD])
        await village.reaches(id, Status.ACCEPTED)

        async def call(who: str, envelope: pb.Envelope) -> pb.Ack:
            certificate, key = identities[who]
            credentials = grpc.ssl_channel_credentials(second.certificate, key, certificate)
            options = [("grpc.ssl_target_name_override", PEER_NAME)]
            async with grpc.aio.secure_channel(village.configs[1].grpc, credentials, options=options) as channel:
                async for ack in ring_pb2_grpc.RingStub(channel).Flow(iter([envelope])):
                    return ack
            raise AssertionError("expected an answer")

        finish = pb.Envelope(job=id, attempt=1, finish=pb.Finish())
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call("stranger", finish)
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE

        second.channel.admit(Peer("stage 1", second.account, second.certificate))  # as of another job
        ack = await call("ours", finish)
        assert f"sent a message of job {id.hex()[:8]}, whose stage 0 (0x" in ack.refusal
        ack = await call("ours", pb.Envelope(job=bytes(32), attempt=1, finish=pb.Finish()))
        assert ack.refusal == f"job 0x{'00' * 32} is not at this worker"

        await village.reaches(id, Status.COMMITTED)
        expected = outputs_root(make_outputs([greedy(model, GOOD)], [GOOD]))
        assert village.requester.escrow.outputs(id)[0] == expected
        assert (await village.get(0, f"/jobs/{id.hex()}")).json()["attempt"] == 1
        await village.sleep()

    asyncio.run(within(900, story()))


def test_who_registers_anothers_certificate_takes_nothing_from_it(village: Village, tiny: Tiny, greedy: Greedy) -> None:
    """It stands on chain for everybody to copy; what comes by it is the job's predecessor's all the same."""
    _, model = tiny

    async def story() -> None:
        await village.wake()
        first, second = village.agents
        id = await village.open([GOOD])
        await until(lambda: (stage := second._engagements.get(id)) is not None and stage.run is not None)
        second.channel.admit(Peer("stage 0 of another job", "0xcopies", first.certificate))
        first.channel.admit(Peer("stage 3 of another job", "0xcopies", second.certificate))
        await village.reaches(id, Status.COMMITTED)
        expected = outputs_root(make_outputs([greedy(model, GOOD)], [GOOD]))
        assert village.requester.escrow.outputs(id)[0] == expected
        assert (await village.get(0, f"/jobs/{id.hex()}")).json()["attempt"] == 1
        again = await village.open([GOOD])
        await village.reaches(again, Status.COMMITTED)
        await village.sleep()

    asyncio.run(within(900, story()))


def test_who_shows_another_certificate_than_the_chain_names_is_not_talked_to(
    village: Village, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The job waits, with the reason; another, of a pipeline without that stage, would not."""
    other = Party(tmp_path, "other")

    async def story() -> None:
        await village.wake()
        village.agents[1].certificate, right = other.certificate, village.agents[1].certificate
        id = await village.open([GOOD])
        await until(lambda: "expected the certificate with SHA-256" in caplog.text)
        assert "stage 1 (0x" in caplog.text
        assert village.requester.escrow.status(id) is Status.ACCEPTED
        village.agents[1].certificate = right
        await village.reaches(id, Status.COMMITTED)
        await village.sleep()

    asyncio.run(within(900, story()))
