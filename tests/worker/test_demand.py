"""Demands on a local chain: an honest worker posts whatever it is asked for, also after a restart, at no loss."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from contracts.client import ChainError, Status
from contracts.events import DemandAnswered
from deploy.devnet import Devnet
from tests.worker.pipeline_in_process import Tiny
from tests.worker.village import Village
from verifier.commit import Request
from verifier.demand import Demand, Wanted, read_answer
from verifier.keccak import keccak256
from verifier.referee.codec import TILE_COLUMNS, TILE_ROWS, Output, token_leaves
from verifier.trace import RequestTrace
from worker.recorder import trace_path


@pytest.fixture
def devnet() -> Iterator[Devnet]:
    with Devnet() as made:
        yield made


async def answers(village: Village, ids: list[bytes]) -> dict[bytes, DemandAnswered]:
    for _ in range(1500):
        events = await asyncio.to_thread(lambda: list(village.requester.events(0)))
        found = {event.id: event for event in events if isinstance(event, DemandAnswered)}
        if set(ids) <= set(found):
            return found
        await asyncio.sleep(0.2)
    raise AssertionError("expected an answer to every demand by now")


def test_an_honest_worker_answers_spam_and_ends_no_poorer(
    devnet: Devnet, tiny: Tiny, requests_batch: list[Request], tmp_path: Path
) -> None:
    village = Village(devnet, tmp_path, tiny[0])
    village.settle_in()

    async def story() -> None:
        await village.wake()
        job = await village.open(requests_batch)
        await village.reaches(job, Status.COMMITTED)
        model, shape = village.agents[0].model, village.agents[0].stage.shape
        layers = [(config.first_layer, config.end_layer) for config in village.configs]
        demands = village.challenger.demands
        asked = [
            Demand(job, 0, Wanted.PROMPT, 0, 0, 0, 1),
            Demand(job, 1, Wanted.OUTPUT, 2, 0, 0, 4),
            Demand(job, 0, Wanted.TENSORS, 1, 0, 0, 6),
            Demand(job, 1, Wanted.LEAVES, 2, 0, 3, 2),
            Demand(job, 1, Wanted.LEAVES, 2, 3, 0, 9),  # tiles of v
            Demand(job, 0, Wanted.LEAVES, 0, 1, 10**6, 1),  # beyond the end
        ]

        def ask(demand: Demand) -> bytes:
            return demands.demand(demand, model, demands.price_of(demand, model))

        first = [await asyncio.to_thread(ask, demand) for demand in asked[:3]]
        await answers(village, first)
        await village.sleep()
        rest = [await asyncio.to_thread(ask, demand) for demand in asked[3:]]
        await village.wake()
        found = await answers(village, [*first, *rest])

        requester = village.requester
        outputs, _ = requester.escrow.outputs(job)
        stage_roots = [requester.escrow.root(job, stage) for stage in (0, 1)]
        terms = requester.escrow.job(job)
        told = []
        for id, demand in zip([*first, *rest], asked, strict=True):
            committed = {Wanted.PROMPT: terms.requests_root, Wanted.OUTPUT: outputs}
            root = committed.get(Wanted(demand.kind), stage_roots[demand.stage])
            told.append(read_answer(demand, model, layers[demand.stage], root, terms.requests, found[id].openings))
        assert list(told[0].leaves) == token_leaves(requests_batch[0].prompt)
        tokens = village.agents[1].folder(job).load_state().tokens[2]
        assert list(told[1].leaves) == token_leaves(tokens) and Output.decode(told[1].record).count == len(tokens)
        trace = RequestTrace.load(trace_path(village.agents[1].folder(job).path, 2), shape)
        across = -(-shape.hidden // 256)
        rows = trace.arrays[trace.keys[0]][3 // across :]
        assert told[3].leaves[0] == rows[0, 3 % across * 256 :][:256].tobytes()
        assert told[4].leaves[0] == trace.arrays[trace.keys[3]][:TILE_ROWS, :TILE_COLUMNS].tobytes()
        assert told[5].leaves == ()

        # Every answer was worth its gas, the worker's locks are as they were, and nothing can be asked twice.
        gas: dict[str, int] = {}
        for event in found.values():
            receipt = requester.transport.web3.eth.get_transaction_receipt(event.transaction)  # type: ignore[arg-type]
            gas[receipt["from"]] = gas.get(receipt["from"], 0) + receipt["gasUsed"]
        for agent in village.agents:
            assert demands.credit(agent.account) >= gas[agent.account] * terms.gas_rate > 0
            assert not agent.answerer.open_demands
        assert requester.escrow.status(job) == Status.COMMITTED
        assert demands.state_of(first[0]) == keccak256(b"plumb.demand.ended")
        with pytest.raises(ChainError, match="DemandExists"):
            await asyncio.to_thread(ask, asked[0])
        await village.sleep()

    asyncio.run(story())
