"""Every event of the five contracts as a frozen dataclass.

Addresses are checksummed; amounts are base units of the token.
"""

from dataclasses import dataclass
from typing import Any

from contracts.records import Job, Stage
from verifier.demand import Demanded
from verifier.game import Game
from verifier.referee.codec import Model, Opening


@dataclass(frozen=True, kw_only=True)
class Event:
    """`block` and `log_index` order all events; `transaction` is the hash, `contract` who spoke ("Escrow")."""

    contract: str
    block: int
    log_index: int
    transaction: bytes


@dataclass(frozen=True, kw_only=True)
class ModelRegistered(Event):
    id: bytes
    model: Model


@dataclass(frozen=True, kw_only=True)
class WorkerRegistered(Event):
    account: str
    signer: str
    tls: bytes
    url: str


@dataclass(frozen=True, kw_only=True)
class StakeAdded(Event):
    account: str
    amount: int


@dataclass(frozen=True, kw_only=True)
class WithdrawalRequested(Event):
    account: str
    amount: int
    available_at: int


@dataclass(frozen=True, kw_only=True)
class StakeWithdrawn(Event):
    account: str
    amount: int


@dataclass(frozen=True, kw_only=True)
class PipelineCreated(Event):
    id: bytes
    model: bytes
    stages: tuple[Stage, ...]
    nonce: int


@dataclass(frozen=True, kw_only=True)
class StakeLocked(Event):
    account: str
    amount: int


@dataclass(frozen=True, kw_only=True)
class StakeUnlocked(Event):
    account: str
    amount: int


@dataclass(frozen=True, kw_only=True)
class StakeSlashed(Event):
    account: str
    amount: int


@dataclass(frozen=True, kw_only=True)
class JobOpened(Event):
    id: bytes
    requester: str
    pipeline: bytes
    job: Job


@dataclass(frozen=True, kw_only=True)
class StageAccepted(Event):
    id: bytes
    stage: int
    worker: str


@dataclass(frozen=True, kw_only=True)
class JobAccepted(Event):
    id: bytes


@dataclass(frozen=True, kw_only=True)
class JobMoved(Event):
    """The job goes on with another pipeline."""

    id: bytes
    pipeline: bytes


@dataclass(frozen=True, kw_only=True)
class StageCommitted(Event):
    id: bytes
    stage: int
    root: bytes


@dataclass(frozen=True, kw_only=True)
class JobCommitted(Event):
    id: bytes
    outputs: bytes
    tokens: int
    window_end: int


@dataclass(frozen=True, kw_only=True)
class StageConvicted(Event):
    id: bytes
    stage: int
    challenger: str


@dataclass(frozen=True, kw_only=True)
class JobVoided(Event):
    """From now on `refund` gives the requester its price back."""

    id: bytes


@dataclass(frozen=True, kw_only=True)
class JobPaid(Event):
    id: bytes
    price: int
    returned: int


@dataclass(frozen=True, kw_only=True)
class JobRefunded(Event):
    id: bytes
    refund: int
    no_show_fee: int


@dataclass(frozen=True, kw_only=True)
class JobReleased(Event):
    id: bytes


@dataclass(frozen=True, kw_only=True)
class StageSlashed(Event):
    id: bytes
    stage: int
    to_stages: int
    to_gas: int
    burned: int
    to_challenger: int


@dataclass(frozen=True, kw_only=True)
class Credited(Event):
    """By Escrow: pay, refunds, fees, rewards; by Disputes: bonds that came back and moves that were paid for; by
    Demands: answers that were paid for, and what a lapsed demand returned.
    """

    account: str
    amount: int
    id: bytes


@dataclass(frozen=True, kw_only=True)
class Withdrawn(Event):
    account: str
    amount: int


@dataclass(frozen=True, kw_only=True)
class ChallengeCommitted(Event):
    id: bytes
    sender: str


@dataclass(frozen=True, kw_only=True)
class GameMoved(Event):
    """`game` is the state after the move; what was posted is `list`, or lies at byte `place` of the transaction's
    calldata: DisputesDoor.posted.
    """

    id: bytes
    job: bytes
    mover: str
    game: Game
    list: bytes
    place: int


@dataclass(frozen=True, kw_only=True)
class GameEnded(Event):
    """convicted = 255: the challenger lost. reason: 1 proved, 2 flag, 3 shown, 4 deflected."""

    id: bytes
    job: bytes
    stage: int
    convicted: int
    reason: int


@dataclass(frozen=True, kw_only=True)
class DemandOpened(Event):
    id: bytes
    job: bytes
    demanded: Demanded


@dataclass(frozen=True, kw_only=True)
class DemandAnswered(Event):
    """openings: the record and, unless the range lies beyond the tree's end, the leaves (verifier.demand)."""

    id: bytes
    job: bytes
    openings: tuple[Opening, ...]


@dataclass(frozen=True, kw_only=True)
class DemandLapsed(Event):
    """The stage let its time pass, and is convicted."""

    id: bytes
    job: bytes
    stage: int
    demander: str


def _all(base: type[Event]) -> dict[str, type[Any]]:
    return {cls.__name__: cls for cls in base.__subclasses__()}


EVENTS: dict[str, type[Any]] = _all(Event)
