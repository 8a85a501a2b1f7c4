"""The structs of IWorkers and IEscrow, field for field; the referee's and the game's live in verifier
(referee/codec.py, game.py).
"""

from dataclasses import dataclass
from enum import IntEnum


@dataclass(frozen=True)
class Worker:
    signer: str  # checksummed address
    tls: bytes  # SHA-256 of the DER certificate
    url: str


@dataclass(frozen=True)
class Stage:
    worker: str
    first_layer: int
    end_layer: int
    share_bps: int


class Status(IntEnum):
    NONE = 0
    OPEN = 1
    ACCEPTED = 2
    COMMITTED = 3
    PAID = 4
    VOID = 5
    REFUNDED = 6


@dataclass(frozen=True)
class Job:
    """Prices, lock and gas rate in base units of the token; times in unix seconds; window, clock, grace in seconds."""

    model: bytes
    pipeline: bytes
    requests_root: bytes
    gas_rate: int
    requests: int
    window: int
    clock: int
    grace: int
    prompt_tokens: int
    max_tokens: int
    accept_by: int
    commit_by: int
    prompt_price: int
    token_price: int
    lock: int
    nonce: int


@dataclass(frozen=True)
class Brief:
    """A part of a job, and the root of one stage."""

    model: bytes
    pipeline: bytes
    root: bytes
    gas_rate: int
    requests: int
    clock: int
    grace: int


@dataclass(frozen=True)
class Acceptance:
    stage: int
    signature: bytes


@dataclass(frozen=True)
class Consent:
    """One worker's to a job's move to another pipeline, until then, unix seconds."""

    until: int
    signature: bytes


@dataclass(frozen=True)
class Claim:
    stage: int
    root: bytes
    outputs: bytes  # zero but for the last stage
    tokens: int  # zero but for the last stage
    signature: bytes
