"""Puts the seven contracts on a chain."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import rlp
from eth_abi.abi import encode
from eth_account.signers.local import LocalAccount
from eth_utils.address import to_canonical_address, to_checksum_address
from eth_utils.crypto import keccak

from contracts.abi import type_of
from contracts.build import Artifact, artifacts
from contracts.client import Addresses
from contracts.transport import Transport

LIVE_WITHDRAWAL_SECONDS = 86_400  # docs/protocol.md, "Constants"


class DeploymentError(Exception):
    """A contract came to lie elsewhere than predicted: somebody else used the deployer's key meanwhile."""


def predict(deployer: str, nonce: int) -> str:
    """Where the deployer's transaction `nonce` creates its contract."""
    return to_checksum_address(keccak(rlp.encode([to_canonical_address(deployer), nonce]))[12:])


def deploy(
    rpc_url: str,
    key: LocalAccount,
    withdrawal_seconds: int = LIVE_WITHDRAWAL_SECONDS,
    token: str | None = None,
    patience_seconds: float = 30.0,
) -> Addresses:
    """Deploys and returns the addresses. `token`: the ERC-20 to use; by default a development token that anybody may
    mint.

    Workers must know Escrow, Escrow Disputes and Demands, and each is immutable: the later addresses are predicted from
    the deployer's nonce.
    """
    transport = Transport(rpc_url, key, patience_seconds)
    built = artifacts()
    first = transport.web3.eth.get_transaction_count(key.address)
    order = (() if token else ("Token",)) + ("Referee", "Models", "Workers", "Escrow", "Disputes", "Demands")
    at = {name: predict(key.address, first + place) for place, name in enumerate(order)}
    if token:
        at["Token"] = to_checksum_address(token)
    arguments: dict[str, Sequence[Any]] = {
        "Token": (),
        "Referee": (),
        "Models": (),
        "Workers": (at["Token"], at["Models"], at["Escrow"], withdrawal_seconds),
        "Escrow": (at["Token"], at["Workers"], at["Disputes"], at["Demands"]),
        "Disputes": (at["Token"], at["Escrow"], at["Workers"], at["Referee"]),
        "Demands": (at["Token"], at["Escrow"], at["Workers"]),
    }
    for name in order:
        receipt = transport.send_raw(None, creation_code(built[name], arguments[name]), f"{name}.constructor")
        if receipt["contractAddress"] != at[name]:
            raise DeploymentError(f"{name}: expected at {at[name]}, came to lie at {receipt['contractAddress']}")
    return Addresses(**{name.lower(): address for name, address in at.items()})


def deploy_once(rpc_url: str, key: LocalAccount, file: Path, withdrawal_seconds: int) -> bool:
    """Deploys and writes the addresses to `file`, unless every address that it names holds code on this chain.

    Returns whether it deployed. Raises AddressesError for a file of another form.
    """
    if file.exists():
        eth = Transport(rpc_url, key).web3.eth
        if all(eth.get_code(to_checksum_address(address)) for address in asdict(Addresses.load(file)).values()):
            return False
    deploy(rpc_url, key, withdrawal_seconds).save(file)
    return True


def creation_code(artifact: Artifact, arguments: Sequence[Any]) -> bytes:
    """Bytecode and encoded constructor arguments."""
    constructor: dict[str, Any] = next(
        (entry for entry in artifact.abi if entry["type"] == "constructor"), {"inputs": []}
    )
    types = [type_of(parameter) for parameter in constructor["inputs"]]
    if len(types) != len(arguments):
        raise DeploymentError(f"{artifact.name}: the constructor takes {len(types)} arguments, got {len(arguments)}")
    return artifact.bytecode + encode(types, arguments)
