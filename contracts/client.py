"""The Python door to the chain: `Chain(rpc_url, addresses, key)`, then `chain.escrow.open(job)`, `chain.events(first,
last)`, `chain.sign_accept(...)`.

A Chain may be used by several threads. All it raises on purpose is in contracts/errors.py. Sending what is already
there raises the contract's error
(JobExists, AlreadyDone ...): whether that counts as done is the caller's to say.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from eth_account.messages import SignableMessage
from eth_account.signers.local import LocalAccount
from eth_utils.address import is_address, to_checksum_address

from contracts import signing
from contracts.abi import decode_event, event_topics
from contracts.doors import DemandsDoor, DisputesDoor, EscrowDoor, ModelsDoor, RefereeDoor, TokenDoor, WorkersDoor
from contracts.errors import (
    AddressesError,
    ChainError,
    ChainUnreachable,
    ContractsError,
    KeystoreError,
    ReceiptTimeout,
    RpcUrlError,
)
from contracts.events import EVENTS, Event
from contracts.keys import load_account, save_account
from contracts.providers import check_rpc_url
from contracts.records import Acceptance, Claim, Consent, Job, Stage, Status, Worker
from contracts.signing import challenge_id, demand_id, game_hash, model_id
from contracts.transport import Receipt, Transport

__all__ = [
    "Acceptance",
    "Addresses",
    "AddressesError",
    "Chain",
    "ChainError",
    "ChainUnreachable",
    "Claim",
    "Consent",
    "ContractsError",
    "Event",
    "Job",
    "KeystoreError",
    "Receipt",
    "ReceiptTimeout",
    "RpcUrlError",
    "Stage",
    "Status",
    "Worker",
    "challenge_id",
    "check_rpc_url",
    "demand_id",
    "game_hash",
    "load_account",
    "model_id",
    "save_account",
]

_LOG_BLOCKS = 2000  # the smallest range that public nodes commonly allow in one eth_getLogs


@dataclass(frozen=True)
class Addresses:
    """Where one deployment lives; checksummed."""

    token: str
    models: str
    workers: str
    escrow: str
    disputes: str
    demands: str
    referee: str

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not is_address(value):
                raise AddressesError(f"{field.name}: expected an address, got {value!r}")
            object.__setattr__(self, field.name, to_checksum_address(value))

    @staticmethod
    def load(path: Path) -> "Addresses":
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise AddressesError(f"no addresses file at {path}") from None
        except ValueError as error:
            raise AddressesError(f"{path} is no JSON: {error}") from None
        expected = {field.name for field in fields(Addresses)}
        if not isinstance(content, dict) or content.keys() != expected:
            actual = sorted(content) if isinstance(content, dict) else type(content).__name__
            raise AddressesError(f"{path}: expected the keys {sorted(expected)}, got {actual}")
        return Addresses(**content)

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")


class Chain:
    def __init__(
        self,
        rpc_url: str | Sequence[str],
        addresses: Addresses,
        key: LocalAccount | None = None,
        patience_seconds: float = 30.0,
        receipt_seconds: float = 300.0,
    ) -> None:
        """rpc_url: http(s):// or ws(s)://, else RpcUrlError; several are asked as contracts/council.py says. Without a
        key a Chain reads only.

        An unreachable node raises ChainUnreachable after `patience_seconds` of asking.
        """
        self.transport = Transport(rpc_url, key, patience_seconds, receipt_seconds)
        self.addresses = addresses
        self.key = key
        self.token = TokenDoor(self.transport, addresses.token)
        self.models = ModelsDoor(self.transport, addresses.models)
        self.workers = WorkersDoor(self.transport, addresses.workers)
        self.escrow = EscrowDoor(self.transport, addresses.escrow)
        self.disputes = DisputesDoor(self.transport, addresses.disputes)
        self.demands = DemandsDoor(self.transport, addresses.demands)
        self.referee = RefereeDoor(self.transport, addresses.referee)

    @property
    def account(self) -> str:
        return self._signer(None).address

    @property
    def chain_id(self) -> int:
        return self.transport.chain_id

    @property
    def receipts(self) -> list[Receipt]:
        """What this Chain has sent, oldest first."""
        return self.transport.receipts

    def block_number(self) -> int:
        return int(self.transport.web3.eth.block_number)

    def block_timestamp(self, block: int | None = None) -> int:
        """Unix seconds of a block, by default the latest: the clock that deadlines are measured by."""
        return int(self.transport.web3.eth.get_block("latest" if block is None else block)["timestamp"])

    def check_addresses(self) -> None:
        """Raises AddressesError where these are not the contracts of one deployment on this chain: who answers games at
        another address than its jobs' loses them by the clock.
        """
        for door, names in (
            (self.escrow, ("token", "workers", "disputes", "demands")),
            (self.workers, ("models",)),
            (self.disputes, ("referee",)),
        ):
            for name in names:
                ours = getattr(self.addresses, name)
                try:
                    known = to_checksum_address(door.neighbour(name))
                except ChainError as error:
                    raise AddressesError(f"{door.contract.lower()}: none at {door.address}: {error}") from error
                if known != ours:
                    raise AddressesError(f"{name}: expected {known}, which {door.contract} works with, got {ours}")

    def balance_wei(self, account: str) -> int:
        return int(self.transport.web3.eth.get_balance(to_checksum_address(account)))

    def events(self, from_block: int, to_block: int | None = None) -> Iterator[Event]:
        """Every event of Models, Workers, Escrow, Disputes and Demands, in order, both ends included; `to_block`
        defaults to the latest.

        SAFETY: an event of ours that Python does not know raises LookupError; a watcher must not overlook one. Near the
        head a block can still be
        replaced: a caller that needs more asks again from an earlier block.
        """
        last = self.block_number() if to_block is None else to_block
        contracts = {
            door.address: (door.contract, event_topics(door.contract))
            for door in (self.models, self.workers, self.escrow, self.disputes, self.demands)
        }
        for log in self.transport.logs(list(contracts), from_block, last, _LOG_BLOCKS):
            topics = [bytes(topic) for topic in log["topics"]]
            contract, known = contracts[to_checksum_address(log["address"])]
            entry = known.get(topics[0])
            if entry is None:
                raise LookupError(f"{log['address']} emitted an event that its ABI lacks: topic 0x{topics[0].hex()}")
            if entry["name"] not in EVENTS:
                if entry["name"] == "EIP712DomainChanged":
                    continue
                raise LookupError(f"contracts/events.py lacks {entry['name']}")
            event: Event = decode_event(
                entry,
                EVENTS[entry["name"]],
                topics,
                bytes(log["data"]),
                contract=contract,
                block=log["blockNumber"],
                log_index=log["logIndex"],
                transaction=bytes(log["transactionHash"]),
            )
            yield event

    # Signatures. `key` signs instead of the Chain's own (a worker's signer is often another key than its account).

    def sign_join(self, pipeline: bytes, key: LocalAccount | None = None) -> bytes:
        return signing.sign(self._signer(key), signing.join_message(self.chain_id, self.workers.address, pipeline))

    def sign_accept(self, job: bytes, stage: int, model: bytes, key: LocalAccount | None = None) -> bytes:
        return signing.sign(self._signer(key), self._accept(job, stage, model))

    def sign_commit(
        self,
        job: bytes,
        pipeline: bytes,
        stage: int,
        model: bytes,
        root: bytes,
        outputs: bytes = bytes(32),
        tokens: int = 0,
        key: LocalAccount | None = None,
    ) -> bytes:
        return signing.sign(self._signer(key), self._commit(job, pipeline, stage, model, root, outputs, tokens))

    def sign_move(
        self, job: bytes, before: bytes, pipeline: bytes, until: int, key: LocalAccount | None = None
    ) -> bytes:
        return signing.sign(self._signer(key), self._move(job, before, pipeline, until))

    def sign_handoff(self, job: bytes, stage: int, root: bytes, leaves: int, key: LocalAccount | None = None) -> bytes:
        return signing.sign(self._signer(key), self._handoff(job, stage, root, leaves))

    # Who signed; None if the bytes are no signature.

    def recover_join(self, pipeline: bytes, signature: bytes) -> str | None:
        return signing.recover(signing.join_message(self.chain_id, self.workers.address, pipeline), signature)

    def recover_accept(self, job: bytes, stage: int, model: bytes, signature: bytes) -> str | None:
        return signing.recover(self._accept(job, stage, model), signature)

    def recover_move(self, job: bytes, before: bytes, pipeline: bytes, until: int, signature: bytes) -> str | None:
        return signing.recover(self._move(job, before, pipeline, until), signature)

    def recover_commit(
        self,
        job: bytes,
        pipeline: bytes,
        stage: int,
        model: bytes,
        root: bytes,
        outputs: bytes,
        tokens: int,
        signature: bytes,
    ) -> str | None:
        return signing.recover(self._commit(job, pipeline, stage, model, root, outputs, tokens), signature)

    def recover_handoff(self, job: bytes, stage: int, root: bytes, leaves: int, signature: bytes) -> str | None:
        return signing.recover(self._handoff(job, stage, root, leaves), signature)

    def _accept(self, job: bytes, stage: int, model: bytes) -> SignableMessage:
        return signing.accept_message(self.chain_id, self.escrow.address, job, stage, model)

    def _move(self, job: bytes, before: bytes, pipeline: bytes, until: int) -> SignableMessage:
        return signing.move_message(self.chain_id, self.escrow.address, job, before, pipeline, until)

    def _commit(
        self, job: bytes, pipeline: bytes, stage: int, model: bytes, root: bytes, outputs: bytes, tokens: int
    ) -> SignableMessage:
        return signing.commit_message(
            self.chain_id, self.escrow.address, job, pipeline, stage, model, root, outputs, tokens
        )

    def _handoff(self, job: bytes, stage: int, root: bytes, leaves: int) -> SignableMessage:
        return signing.handoff_message(self.chain_id, self.escrow.address, job, stage, root, leaves)

    def _signer(self, key: LocalAccount | None) -> LocalAccount:
        chosen = key or self.key
        if chosen is None:
            raise PermissionError("this Chain was opened without a key: it can neither sign nor send")
        return chosen
