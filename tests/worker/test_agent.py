"""Jobs from opening to pay on a local chain, workers as agents in this process."""

import asyncio
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest

from contracts.client import Status
from deploy.devnet import Devnet
from tests.worker.pipeline_in_process import Greedy, Tiny, within
from tests.worker.village import WINDOW_SECONDS, Village
from verifier.commit import Request, make_outputs, outputs_root
from verifier.trace import RequestTrace
from worker import ring_pb2 as pb
from worker.agent import Agent
from worker.channel import Peer
from worker.errors import BadMessage, Refused
from worker.grpc_channel import Link
from worker.job import JobFolder, Phase
from worker.notary import Notary
from worker.recorder import trace_path


@pytest.fixture
def village(tiny: Tiny, tmp_path: Path) -> Iterator[Village]:
    folder, _ = tiny
    with Devnet() as devnet:
        made = Village(devnet, tmp_path, folder)
        made.settle_in()
        yield made


def test_a_job_is_served_committed_settled_and_paid(
    village: Village, tiny: Tiny, requests_batch: list[Request], greedy: Greedy
) -> None:
    _, model = tiny
    expected = [greedy(model, request) for request in requests_batch]

    async def story() -> None:
        await village.wake()
        with pytest.raises(Refused, match="expected workers for all 3 layers of the model, the last one's end is 2"):
            await village.join(1)
        id = await village.open(requests_batch)
        await village.reaches(id, Status.COMMITTED)
        root, tokens = village.requester.escrow.outputs(id)
        assert root == outputs_root(make_outputs(expected, requests_batch))
        assert tokens == sum(map(len, expected))

        answer = await village.get(1, f"/jobs/{id.hex()}/outputs")
        assert [output["tokens"] for output in answer.json()["outputs"]] == expected
        trace = (await village.get(0, f"/jobs/{id.hex()}/trace")).json()
        assert trace["root"] == village.requester.escrow.root(id, 0).hex()
        answer = await village.get(0, f"/jobs/{id.hex()}/trace/2/0.q?first=3&count=5")
        stored = RequestTrace.load(trace_path(village.agents[0].folder(id).path, 2), village.agents[0].stage.shape)
        assert answer.headers["X-Plumb-Rows"] == "5"
        assert np.array_equal(np.frombuffer(answer.content, "<u4").reshape(5, 64), stored.arrays["0.q"][3:8])

        asks = village.agents[0]  # as it would, were nothing coming of its predecessor
        assert await asks.peers.is_well(1, (await asks.engagement(id)).stages[1], id, asks.config.serving)

        # A restart in the window: traces and state come back from disk, and the job is settled all the same.
        await village.sleep()
        await village.wake()
        assert (await village.get(1, f"/jobs/{id.hex()}/trace")).json()["requests"][2]["positions"] == 26
        village.devnet.pass_seconds(WINDOW_SECONDS + 2)
        await village.reaches(id, Status.PAID)
        accounts = [agent.account for agent in village.agents]
        for _ in range(3000):
            if not any(village.requester.escrow.credit(account) for account in accounts):
                break
            await asyncio.sleep(0.1)
        assert [village.requester.escrow.credit(account) for account in accounts] == [0, 0]
        assert all(village.requester.token.balance(account) > 0 for account in accounts)
        while not all(agent.folder(id).load_state().phase is Phase.CLOSED for agent in village.agents):
            await asyncio.sleep(0.1)
        await check_forgotten(village, id, expected)
        await village.sleep()

    asyncio.run(within(900, story()))


async def check_forgotten(village: Village, id: bytes, expected: list[list[int]], seconds: float = 120.0) -> None:
    """A worker that kept something of every job it ever served would end without memory, or without disk."""
    first = village.agents[0]
    end = time.monotonic() + seconds
    while kept := remembered(village, id):
        assert time.monotonic() < end, f"expected everything of the job to be forgotten, kept is {kept}"
        await asyncio.sleep(0.1)
    answer = await village.get(1, f"/jobs/{id.hex()}/outputs")
    assert [output["tokens"] for output in answer.json()["outputs"]] == expected
    answer = await village.get(0, f"/jobs/{id.hex()}/trace/2/0.q")
    assert (answer.status_code, answer.json()) == (409, {"error": "the job is over, and its traces are gone"})
    # A stage that was away for long says its Finish again: no fault of the neighbour that all other jobs need.
    peer = Peer("stage 1", village.agents[1].account, village.agents[1].certificate)
    await first._receive(peer, pb.Envelope(job=id, attempt=1, sequence=99, finish=pb.Finish()))
    with pytest.raises(BadMessage, match="is not at this worker"):
        await first._receive(peer, pb.Envelope(job=bytes(32), attempt=1, finish=pb.Finish()))


def remembered(village: Village, id: bytes) -> list[str]:
    """What the workers have of a job, by name: in memory, and of traces on disk."""
    kept = []
    for i, agent in enumerate(village.agents):
        link = agent.channel.to(*village_neighbour(village, 1 - i))
        assert isinstance(link, Link)
        places = {
            "engagements": id in agent._engagements,
            "signers": id in agent.notary._signers,
            "messages": any(envelope.job == id for envelope, _ in link._unacknowledged),
            "refusals": id in link._refused,
            "traces": any(agent.folder(id).path.glob("*.safetensors")),
        }
        kept += [f"{name} of worker {i}" for name, there in places.items() if there]
    return kept


def village_neighbour(village: Village, index: int) -> tuple[Peer, str]:
    agent = village.agents[index]
    return Peer(f"stage {index}", agent.account, agent.certificate), village.configs[index].grpc


@pytest.mark.parametrize("faulty", ["_forget", "forget", "drop_traces"])
def test_a_worker_that_forgets_nothing_is_found_out(
    village: Village, requests_batch: list[Request], monkeypatch: pytest.MonkeyPatch, faulty: str
) -> None:
    """By the check above, which would else prove nothing."""

    async def never(self: Agent, id: bytes) -> None:
        pass

    what = {
        "_forget": (Agent, never, "engagements of worker 0"),
        "forget": (Notary, lambda self, job: None, "signers of worker 0"),
        "drop_traces": (JobFolder, lambda self: None, "traces of worker 0"),
    }[faulty]
    monkeypatch.setattr(what[0], faulty, what[1])

    async def story() -> None:
        await village.wake()
        id = await village.open(requests_batch[:1])
        await village.reaches(id, Status.COMMITTED)
        village.devnet.pass_seconds(WINDOW_SECONDS + 2)
        await village.reaches(id, Status.PAID)
        while not all(agent.folder(id).over for agent in village.agents):
            await asyncio.sleep(0.1)
        with pytest.raises(AssertionError, match=what[2]):
            await check_forgotten(village, id, [], seconds=3.0)
        await village.sleep()

    asyncio.run(within(900, story()))


def test_what_can_not_be_served_is_refused_before_acceptance(village: Village, requests_batch: list[Request]) -> None:
    async def story() -> None:
        await village.wake()
        good = requests_batch[0]

        other = await asyncio.to_thread(lambda: village.requester.escrow.open(village.job([good])))
        for requests, reason in (
            ([replace(good, prompt=(1, 2))], "prompt tokens"),
            ([replace(good, prompt=(*good.prompt[:-1], 9999))], "ids below 211"),
            ([good, good], "expected 1 requests, came 2"),
            ([replace(good, prompt=tuple(reversed(good.prompt)))], "expected requests with root"),
            ([replace(good, top_k=1)], "greedy"),
            ([replace(good, temperature=1, top_p=0)], "top_p of 1 .. 65536"),
            ([replace(good, prompt=good.prompt * 40)], "within 128 positions"),
        ):
            answer = await village.send(other, requests)
            assert answer.status_code == 409 and reason in answer.json()["error"], answer.text

        told = {"prompt": list(good.prompt), "limit": good.limit}
        async with httpx.AsyncClient(trust_env=False, timeout=30) as client:
            for body, reason in (
                ("[" * 50_000, "expected JSON"),
                ({"requests": [told], "more": 1}, "nothing else"),
                ({"requests": []}, "an entry or more"),
                ({"requests": [{**told, "limit": 1 << 32}]}, "requests[0]: limit: expected a whole number below"),
                ({"requests": [{**told, "colour": 1}]}, "requests[0]: expected prompt, limit and at most"),
            ):
                content = body if isinstance(body, str) else json.dumps(body)
                answer = await client.put(f"{village.configs[0].url}/jobs/{other.hex()}", content=content)
                assert answer.status_code == 409 and reason in answer.json()["error"], answer.text

            # What strangers send is read only for a job that is open, and no more of it than the job's terms allow.
            for job, status, reason in ((other, 413, "a body of at most"), (bytes(32), 404, "is not at this worker")):
                answer = await client.put(f"{village.configs[0].url}/jobs/{job.hex()}", content=" " * 2**20)
                assert answer.status_code == status and reason in answer.json()["error"], answer.text

        terms = village.job([good], token_price=0)
        cheap = await asyncio.to_thread(lambda: village.requester.escrow.open(terms))
        answer = await village.send(cheap, [good])
        assert answer.status_code == 409 and "token price: expected at least 1, came 0" in answer.json()["error"]
        assert not village.agents[0].folder(cheap).has_requests()  # nothing of it is kept
        assert village.requester.escrow.status(cheap) is Status.OPEN

        assert (await village.get(0, "/jobs/" + "00" * 32)).status_code == 404
        assert (await village.get(0, "/jobs/xyz")).status_code == 409
        await village.sleep()

    asyncio.run(within(900, story()))
