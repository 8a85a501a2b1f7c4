"""A spare takes a stage's place on a local chain, workers as agents in this process; whom it may ask for what."""

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from contracts.client import Consent, Stage, Status
from contracts.events import Credited
from deploy.devnet import Devnet
from deploy.keys import dev_account
from tests.worker.pipeline_in_process import Greedy, Tiny, within
from tests.worker.village import WINDOW_SECONDS, Village
from verifier.commit import Request, make_outputs, outputs_root
from worker.job import Phase
from worker.pipeline import propose

# Three workers and, fourth, one that has the layers of the second.
SPARE = 3
REQUESTS = [Request(tuple(range(5, 12)), 60), Request((3, 4), 80)]


@pytest.fixture
def village(tiny: Tiny, tmp_path: Path) -> Iterator[Village]:
    folder, _ = tiny
    with Devnet() as devnet:
        made = Village(devnet, tmp_path, folder, 3)
        made.settle_in()
        made.configs.append(made._enrol(SPARE, 1, 2))
        made.configs = [
            replace(
                config,
                serving=replace(config.serving, beat_seconds=0.2, silence_seconds=3.0, max_rows=4),
                policy=replace(config.policy, replaceable=True),
            )
            for config in made.configs
        ]
        yield made


async def relief(village: Village) -> bytes:
    members = [dev_account(1 + i).address for i in (0, SPARE, 2)]
    return await asyncio.to_thread(propose, village.requester, members, (), 8)


async def die(village: Village, index: int) -> None:
    """As by SIGKILL: nobody is told anything."""
    agent = village.agents[index]
    for engagement in agent._engagements.values():
        if engagement.run is not None and engagement.run._task is not None:
            engagement.run._task.cancel()
    await agent.channel.close()
    agent.server.should_exit = True
    await village.tasks[index]


def test_a_spare_serves_and_is_paid_in_a_dead_stages_place(village: Village, tiny: Tiny, greedy: Greedy) -> None:
    _, model = tiny
    expected = [greedy(model, request) for request in REQUESTS]

    async def story() -> None:
        await village.wake()
        other = await relief(village)
        id = await village.open(REQUESTS)
        await village.reaches(id, Status.ACCEPTED)
        while sum(map(len, (await village.get(2, f"/jobs/{id.hex()}/tokens")).json()["tokens"])) < 20:
            await asyncio.sleep(0.05)
        while not village.agents[SPARE]._spares[id].watching:
            await asyncio.sleep(0.05)
        await die(village, 1)
        await village.reaches(id, Status.COMMITTED)
        escrow, workers = village.requester.escrow, village.requester.workers
        assert escrow.job(id).pipeline == other
        assert escrow.outputs(id)[0] == outputs_root(make_outputs(expected, REQUESTS))
        state = village.agents[SPARE].folder(id).load_state()
        assert state.phase is Phase.FINISHED and state.stage == 1 and state.attempt > 1000
        assert workers.locked_stake(dev_account(2).address) == 0
        assert workers.locked_stake(dev_account(1 + SPARE).address) == escrow.job(id).lock
        village.devnet.pass_seconds(WINDOW_SECONDS + 2)
        await village.reaches(id, Status.PAID)
        events = list(village.requester.events(0))
        paid = {event.account for event in events if isinstance(event, Credited)}
        assert dev_account(1 + SPARE).address in paid and dev_account(2).address not in paid
        for index in (0, 2, SPARE):
            village.agents[index].server.should_exit = True
        await asyncio.gather(*village.tasks)

    asyncio.run(within(900, story()))


def test_consent_is_given_for_nothing_else(village: Village) -> None:
    """To nobody's replacement in a ring that moves, to no stranger's pipeline, to none before the acceptance."""

    async def story() -> None:
        await village.wake()
        other = await relief(village)
        twice = [dev_account(1 + i).address for i in (0, 1, 2)]
        same = await asyncio.to_thread(propose, village.requester, twice, (), 9)
        id = await village.open(REQUESTS)

        async def ask(index: int, job: bytes, pipeline: bytes) -> httpx.Response:
            async with httpx.AsyncClient(trust_env=False, timeout=30) as client:
                return await client.post(f"{village.configs[index].url}/jobs/{job.hex()}/move/{pipeline.hex()}")

        await village.reaches(id, Status.ACCEPTED)
        while not any((await village.get(2, f"/jobs/{id.hex()}/tokens")).json()["tokens"]):
            await asyncio.sleep(0.05)
        for index, job, pipeline, status, reason in (
            (0, id, other, 409, "expected a ring that stands still"),
            (0, id, same, 409, "differs from the job's in one worker"),
            (0, id, bytes(32), 409, "differs from the job's in one worker"),
            (0, bytes(32), other, 404, "is not at this worker"),
        ):
            answer = await ask(index, job, pipeline)
            assert answer.status_code == status and reason in answer.json()["error"], answer.text
        answer = await ask(1, id, other)  # its own place it may give up in advance
        assert answer.status_code == 200, answer.text
        consent = Consent(answer.json()["until"], bytes.fromhex(answer.json()["signature"]))
        chain = village.agents[1].chain
        signer = chain.recover_move(id, village.pipeline, other, consent.until, consent.signature)
        assert signer == dev_account(2).address

        agent = village.agents[1]
        agent.config = replace(agent.config, policy=replace(agent.config.policy, replaceable=False))
        answer = await ask(1, id, other)
        assert answer.status_code == 409 and "this worker signs no moves" in answer.json()["error"]
        await village.reaches(id, Status.COMMITTED)
        answer = await ask(0, id, other)
        assert answer.status_code == 409 and "expected a job that is being served" in answer.json()["error"]
        stages: tuple[Stage, ...] = chain.workers.pipeline_stages(chain.escrow.job(id).pipeline)
        assert [stage.worker for stage in stages] == twice
        await village.sleep()

    asyncio.run(within(900, story()))
