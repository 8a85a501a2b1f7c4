"""Ids and EIP-712 signatures (docs/protocol.md, "Ids"). Pure."""

from typing import Any

from eth_abi.abi import encode
from eth_account import Account
from eth_account.messages import SignableMessage, encode_typed_data
from eth_account.signers.local import LocalAccount
from eth_utils.address import to_checksum_address
from eth_utils.crypto import keccak

from contracts.abi import encode_struct, struct, to_abi, type_of
from contracts.records import Job, Stage
from verifier.demand import Demand
from verifier.game import Game, Segment
from verifier.referee.codec import Model

CURVE_ORDER = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141  # secp256k1's

_DOMAIN = [
    {"name": "name", "type": "string"},
    {"name": "version", "type": "string"},
    {"name": "chainId", "type": "uint256"},
    {"name": "verifyingContract", "type": "address"},
]
_TYPES: dict[str, list[tuple[str, str]]] = {
    "Join": [("pipeline", "bytes32")],
    "Accept": [("job", "bytes32"), ("stage", "uint8"), ("model", "bytes32")],
    "Move": [("job", "bytes32"), ("from", "bytes32"), ("pipeline", "bytes32"), ("until", "uint64")],
    "Commit": [
        ("job", "bytes32"),
        ("pipeline", "bytes32"),
        ("stage", "uint8"),
        ("model", "bytes32"),
        ("root", "bytes32"),
        ("outputs", "bytes32"),
        ("tokens", "uint64"),
    ],
    "Handoff": [("job", "bytes32"), ("stage", "uint8"), ("root", "bytes32"), ("leaves", "uint32")],
}


# ---- ids


def model_id(model: Model) -> bytes:
    return keccak(encode_struct("Model", model))


def pipeline_id(
    chain_id: int, workers: str, model: bytes, stages: list[Stage] | tuple[Stage, ...], nonce: int
) -> bytes:
    stage = struct("Stage")
    types = ["uint256", "address", "bytes32", type_of(stage) + "[]", "uint64"]
    return keccak(encode(types, [chain_id, workers, model, [to_abi(stage, item) for item in stages], nonce]))


def job_id(chain_id: int, escrow: str, requester: str, job: Job) -> bytes:
    types = ["uint256", "address", "address", type_of(struct("Job"))]
    return keccak(encode(types, [chain_id, escrow, requester, to_abi(struct("Job"), job)]))


def challenge_id(challenger: str, segment: Segment, salt: bytes) -> bytes:
    """The commitment that precedes a challenge, and the game's id."""
    types = ["address", type_of(struct("Segment")), "bytes32"]
    return keccak(encode(types, [challenger, to_abi(struct("Segment"), segment), salt]))


def demand_id(demand: Demand) -> bytes:
    """One a job and range."""
    return keccak(encode_struct("Demand", demand))


def game_hash(game: Game) -> bytes:
    """What Disputes stores of a game."""
    return keccak(game.encode())


# ---- signatures


def typed_message(chain_id: int, contract: str, name: str, values: dict[str, Any]) -> SignableMessage:
    """EIP-712 message `name` under domain ("Plumb", "1", chain_id, contract)."""
    return encode_typed_data(
        full_message={
            "domain": {"name": "Plumb", "version": "1", "chainId": chain_id, "verifyingContract": contract},
            "types": {"EIP712Domain": _DOMAIN, name: [{"name": n, "type": t} for n, t in _TYPES[name]]},
            "primaryType": name,
            "message": values,
        }
    )


def join_message(chain_id: int, workers: str, pipeline: bytes) -> SignableMessage:
    return typed_message(chain_id, workers, "Join", {"pipeline": pipeline})


def accept_message(chain_id: int, escrow: str, job: bytes, stage: int, model: bytes) -> SignableMessage:
    return typed_message(chain_id, escrow, "Accept", {"job": job, "stage": stage, "model": model})


def move_message(chain_id: int, escrow: str, job: bytes, before: bytes, pipeline: bytes, until: int) -> SignableMessage:
    """before: the pipeline that the job leaves, `from` in the message."""
    values = {"job": job, "from": before, "pipeline": pipeline, "until": until}
    return typed_message(chain_id, escrow, "Move", values)


def commit_message(
    chain_id: int,
    escrow: str,
    job: bytes,
    pipeline: bytes,
    stage: int,
    model: bytes,
    root: bytes,
    outputs: bytes,
    tokens: int,
) -> SignableMessage:
    """pipeline: the job's at that time."""
    values = {"job": job, "pipeline": pipeline, "stage": stage, "model": model}
    return typed_message(chain_id, escrow, "Commit", values | {"root": root, "outputs": outputs, "tokens": tokens})


def handoff_message(chain_id: int, escrow: str, job: bytes, stage: int, root: bytes, leaves: int) -> SignableMessage:
    return typed_message(chain_id, escrow, "Handoff", {"job": job, "stage": stage, "root": root, "leaves": leaves})


def sign(account: LocalAccount, message: SignableMessage) -> bytes:
    """65 bytes r | s | v, v = 27 or 28, low s: what OpenZeppelin's ECDSA takes."""
    return bytes(account.sign_message(message).signature)


def recover(message: SignableMessage, signature: bytes) -> str | None:
    """The checksummed signer; None if the bytes are no signature at all.

    SAFETY: what the chain takes and nothing else. eth-account takes other forms too, with which nobody could show there
    what a neighbour had signed.
    """
    if len(signature) != 65 or signature[64] not in (27, 28):
        return None
    if int.from_bytes(signature[32:64], "big") > CURVE_ORDER // 2:
        return None
    try:
        return to_checksum_address(Account.recover_message(message, signature=signature))
    except Exception:  # eth-keys and coincurve each raise their own types on a point off the curve
        return None
