"""What became of a job, from the chain alone: its state and why, its price, every transaction with its gas."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

from contracts.abi import functions
from contracts.client import Chain, Job, Status
from contracts.events import (
    ChallengeCommitted,
    DemandLapsed,
    Event,
    GameEnded,
    GameMoved,
    JobCommitted,
    JobOpened,
    JobPaid,
    JobRefunded,
    JobVoided,
    StageAccepted,
    StageCommitted,
    StageConvicted,
)
from requester.client import RequesterError, max_price

_PROOFS = {1: "one exact step", 2: "its clock", 3: "a shown record", 4: "its own signed hand-off"}  # GameEnded.reason


def story_of(chain: Chain, id: bytes, from_block: int = 0) -> list[Event]:
    """The job's events, and those of the games over it. Raises RequesterError for a job that was never opened."""
    events = list(chain.events(from_block))
    if not any(isinstance(event, JobOpened) and event.id == id for event in events):
        raise RequesterError(f"no job 0x{id.hex()} on this chain since block {from_block}")
    games = {event.id for event in events if isinstance(event, GameMoved | GameEnded) and event.job == id}
    return [
        event
        for event in events
        if id in (getattr(event, "id", None), getattr(event, "job", None))
        or (isinstance(event, ChallengeCommitted) and event.id in games)
    ]


def make_receipt(chain: Chain, id: bytes, story: Sequence[Event], model_name: str, tokenizer: bytes) -> dict[str, Any]:
    """Everything about a job that its owner may want to keep or show. tokenizer: its SHA-256."""
    job, status = chain.escrow.job(id), chain.escrow.status(id)
    outputs_root, tokens = chain.escrow.outputs(id)
    return {
        "job": id.hex(),
        "chain": chain.chain_id,
        "model": {"name": model_name, "id": job.model.hex()},
        "tokenizer_sha256": tokenizer.hex(),
        "pipeline": {
            "id": job.pipeline.hex(),
            "stages": [asdict(stage) for stage in chain.workers.pipeline_stages(job.pipeline)],
        },
        "requests": {"count": job.requests, "root": job.requests_root.hex()},
        "outputs_root": outputs_root.hex(),
        "tokens": {"prompt": job.prompt_tokens, "output": tokens, "max_output": job.max_tokens},
        "price": str(_price(job, status, tokens)),
        "escrowed": str(max_price(job)),
        "status": status.name.lower(),
        "why": why(status, story, chain.block_timestamp(), job),
        "transactions": [
            {"method": spent.method, "sender": spent.sender, "gas": spent.gas, "block": spent.block, "hash": spent.hash}
            for spent in transactions(chain, story)
        ],
    }


@dataclass(frozen=True)
class Spent:
    """One transaction. method: "Escrow.open"; hash: hex."""

    method: str
    sender: str
    gas: int
    calldata_bytes: int
    block: int
    hash: str


def transactions(chain: Chain, story: Sequence[Event]) -> list[Spent]:
    """The transactions behind these events, in order."""
    spent = []
    for tx in dict.fromkeys(event.transaction for event in story):
        receipt = chain.transport.web3.eth.get_transaction_receipt(tx)  # type: ignore[arg-type]
        data = bytes(chain.transport.web3.eth.get_transaction(tx)["input"])  # type: ignore[arg-type]
        method = _methods().get(data[:4], f"0x{data[:4].hex()}")  # of an account that is a contract: its own
        spent.append(Spent(method, receipt["from"], receipt["gasUsed"], len(data), receipt["blockNumber"], tx.hex()))
    return spent


@cache
def _methods() -> dict[bytes, str]:
    return {
        item.selector: item.label for name in ("Escrow", "Disputes", "Demands") for item in functions(name).values()
    }


def why(status: Status, story: Sequence[Event], now: int, job: Job) -> str:
    """One sentence on how the job stands."""
    for event in story:
        if isinstance(event, StageConvicted):
            ends = [end for end in story if isinstance(end, GameEnded) and end.convicted == event.stage]
            silent = any(isinstance(lapse, DemandLapsed) and lapse.stage == event.stage for lapse in story)
            proof = _PROOFS.get(ends[0].reason, "a game") if ends else "its silence" if silent else "a game"
            return f"stage {event.stage} was convicted by {proof}; `plumb request collect` refunds the price in full"
    match status:
        case Status.OPEN if now <= job.accept_by:
            accepted = sum(isinstance(event, StageAccepted) for event in story)
            return f"waiting for all stages to accept: {accepted} did; until {job.accept_by}"
        case Status.OPEN:
            return "not every stage accepted in time; `plumb request collect` refunds it"
        case Status.ACCEPTED if now <= job.commit_by:
            committed = sum(isinstance(event, StageCommitted) for event in story)
            return f"being served: {committed} stages have committed; until {job.commit_by}"
        case Status.ACCEPTED:
            return "no full commitment in time; `plumb request collect` refunds it"
        case Status.COMMITTED:
            end = max((event.window_end for event in story if isinstance(event, JobCommitted)), default=now)
            open_games = len(games_open(story))
            if open_games:
                return f"committed, and challenged: {open_games} games are open"
            if now <= end:
                return f"committed; anybody may challenge it for {end - now} s more"
            return "the window is over; `plumb request collect` pays it"
        case _:
            return _ended(story)


def games_open(story: Sequence[Event]) -> set[bytes]:
    """Games over the job without an end."""
    ended = {event.id for event in story if isinstance(event, GameEnded)}
    return {event.id for event in story if isinstance(event, GameMoved)} - ended


def _ended(story: Sequence[Event]) -> str:
    for event in story:
        if isinstance(event, JobPaid):
            return f"the window passed without a conviction: {event.price} paid, {event.returned} returned"
        if isinstance(event, JobRefunded):
            return f"not served in time: {event.refund} refunded, {event.no_show_fee} no-show fee"
        if isinstance(event, JobVoided):
            return "void: `plumb request collect` refunds the price in full"
    return "unknown to this chain"


def _price(job: Job, status: Status, tokens: int) -> int:
    return job.prompt_price * job.prompt_tokens + job.token_price * tokens if status == Status.PAID else 0
