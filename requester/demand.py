"""Outputs that a pipeline committed to and does not hand over: demanded on chain, posted or lost (docs/protocol.md,
"Demands").
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from contracts.client import Chain, ChainError, demand_id
from contracts.events import DemandAnswered, DemandLapsed, DemandOpened, ModelRegistered
from requester.client import RequesterError
from verifier.commit import Output, OutputsTree, Request
from verifier.demand import Demand, Demanded, Wanted
from verifier.referee import codec
from verifier.referee.codec import TOKENS_A_LEAF, Model, Opening
from verifier.referee.errors import DataLength

POLL_SECONDS = 1.0
UNLIMITED = 2**256 - 1


def registered_model(chain: Chain, id: bytes, from_block: int) -> Model:
    """The model as it was registered at or after a block. Raises RequesterError."""
    for event in chain.events(from_block):
        if isinstance(event, ModelRegistered) and event.id == id:
            return event.model
    raise RequesterError(f"model 0x{id.hex()} was not registered since block {from_block}")


def posted_outputs(chain: Chain, id: bytes, from_block: int) -> tuple[Output, ...] | None:
    """The job's outputs, if answers to demands, whoever's, hold all of them; checked against the root on chain."""
    demanded, answers, _ = _read(chain, id, from_block)
    committed, _ = chain.escrow.outputs(id)
    found = [_output(r, demanded, answers) for r in range(chain.escrow.job(id).requests)]
    outputs = tuple(output for output in found if output is not None)
    if len(outputs) < len(found) or OutputsTree(outputs).root != committed:
        return None
    return outputs


class OutputsDemander:
    """Has all outputs of one job posted that were not yet. `say` hears what happens."""

    def __init__(self, chain: Chain, id: bytes, requests: Sequence[Request], model: Model, from_block: int) -> None:
        """from_block: at or before the job's commitment."""
        self.chain, self.id, self.requests, self.model, self.from_block = chain, id, requests, model, from_block

    def run(self, budget: int, say: Callable[[str], None]) -> tuple[Output, ...]:
        """The outputs. budget: most that may be spent, base units.

        Raises RequesterError if it does not suffice, or when the stage lost by its clock: then the price returns.
        """
        self.ask(budget, say)
        while True:
            outputs = posted_outputs(self.chain, self.id, self.from_block)
            if outputs is not None:
                return outputs
            demanded, answers, lapsed = _read(self.chain, self.id, self.from_block)
            if lapsed:
                raise RequesterError(
                    f"stage {min(lapsed.values())} did not post the outputs in time and is convicted: "
                    "`plumb request collect` draws the price and what the demands returned"
                )
            waiting = {key: held for key, held in demanded.items() if key not in answers}
            if not waiting:
                raise RequesterError("what was posted does not make up the outputs that were committed to")
            now = self.chain.block_timestamp()
            for key, held in waiting.items():
                if held.deadline < now:
                    self._lapse(key, held)
            time.sleep(POLL_SECONDS)

    def ask(self, budget: int, say: Callable[[str], None]) -> None:
        """Demands what nobody has demanded yet. Raises RequesterError before the budget is overstepped."""
        chain, account = self.chain, self.chain.account
        last = len(chain.workers.pipeline_stages(chain.escrow.job(self.id).pipeline)) - 1
        known, _, _ = _read(chain, self.id, self.from_block)
        for r, request in enumerate(self.requests):
            leaves = -(-request.limit // TOKENS_A_LEAF)
            demand = Demand(self.id, last, Wanted.OUTPUT, r, 0, 0, leaves)
            if demand_id(demand) in known:
                continue
            price = chain.demands.price_of(demand, self.model)
            if price > budget:
                raise RequesterError(f"request {r}: the demand costs {price} base units, {budget} are left to spend")
            if chain.token.allowance(account, chain.demands.address) < price:
                chain.token.approve(chain.demands.address, UNLIMITED)
            chain.demands.demand(demand, self.model, price)
            budget -= price
            say(f"request {r}: demanded its output for {price} base units")

    def _lapse(self, key: bytes, held: Demanded) -> None:
        try:
            self.chain.demands.lapse(key, held)
        except ChainError as error:
            if error.name != "WrongState":  # somebody else's call came first
                raise


def _read(
    chain: Chain, id: bytes, from_block: int
) -> tuple[dict[bytes, Demanded], dict[bytes, tuple[Opening, ...]], dict[bytes, int]]:
    """Demands for outputs of the job, their answers, and the stages that lost by one."""
    demanded: dict[bytes, Demanded] = {}
    answers: dict[bytes, tuple[Opening, ...]] = {}
    lapsed: dict[bytes, int] = {}
    for event in chain.events(from_block):
        if not isinstance(event, DemandOpened | DemandAnswered | DemandLapsed) or event.job != id:
            continue
        if isinstance(event, DemandOpened):
            if event.demanded.demand.kind == Wanted.OUTPUT:
                demanded[event.id] = event.demanded
        elif event.id in demanded and isinstance(event, DemandAnswered):
            answers[event.id] = event.openings
        elif event.id in demanded and isinstance(event, DemandLapsed):
            lapsed[event.id] = event.stage
    return demanded, answers, lapsed


def _output(r: int, demanded: dict[bytes, Demanded], answers: dict[bytes, tuple[Opening, ...]]) -> Output | None:
    """One request's output, where answers hold all its tokens."""
    leaves: dict[int, bytes] = {}
    record = b""
    for key, openings in answers.items():
        demand = demanded[key].demand
        if demand.request == r:
            record = openings[0].data
            parts = codec.slices(openings[1].data, 4 * TOKENS_A_LEAF) if len(openings) > 1 else []
            leaves.update(enumerate(parts, demand.first))
    try:
        told = codec.Output.decode(record)
    except DataLength:
        return None
    count = -(-told.count // TOKENS_A_LEAF)
    if not set(range(count)) <= set(leaves):
        return None
    data = b"".join(leaves[i] for i in range(count))
    tokens = tuple(int.from_bytes(data[i : i + 4], "big") for i in range(0, len(data), 4))
    return Output(told.start, told.count, told.code, tokens)
