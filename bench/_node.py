"""A development node asked over one connection, and a road to the chain on which every transaction is one question."""

import json
import time
from collections.abc import Callable
from http.client import HTTPConnection
from typing import Any, cast
from urllib.parse import urlsplit

from eth_account.signers.local import LocalAccount
from hexbytes import HexBytes
from web3.types import TxReceipt

from contracts.abi import decode_error
from contracts.client import ChainError
from contracts.transport import Receipt, Transport, floor_gas

MOVE_GAS_LIMIT = 10_000_000  # what 100 KB of calldata cost before anything is looked at, twice
NOT_YET = "Transaction confirmation timeout"  # what a busy node says of a transaction that it took but has not mined
PATIENCE_SECONDS, POLL_SECONDS, SETTLE_SECONDS = 120.0, 0.05, 0.5


class NodeError(Exception):
    """The node answered with an error."""

    def __init__(self, method: str, error: dict[str, Any]) -> None:
        self.message = str(error.get("message"))
        super().__init__(f"{method}: {self.message}")
        told = error.get("data")
        self.data = bytes.fromhex(told[2:]) if isinstance(told, str) else b""


class Unlocked(Transport):
    """Sends from an account that the node itself holds, with a fixed gas limit; `heard` gets every receipt."""

    def __init__(self, url: str, key: LocalAccount, node: "Node", heard: Callable[[TxReceipt], None]) -> None:
        super().__init__(url, key)
        self._node, self._heard = node, heard

    def send_raw(self, to: str | None, data: bytes, label: str, gas: int | None = None) -> TxReceipt:
        limit = gas or MOVE_GAS_LIMIT
        sender = cast(LocalAccount, self.key).address
        transaction = {"from": sender, "to": to, "data": "0x" + data.hex(), "gas": hex(limit)}
        told = self._node.receipt(transaction)
        receipt = cast(
            TxReceipt,
            {
                "gasUsed": int(told["gasUsed"], 16),
                "status": int(told["status"], 16),
                "blockNumber": int(told["blockNumber"], 16),
                "transactionHash": HexBytes(told["transactionHash"]),
                "logs": told["logs"],
            },
        )
        used, block = receipt["gasUsed"], receipt["blockNumber"]
        self.receipts.append(
            Receipt(label, sender, used, len(data), floor_gas(data), block, bytes(receipt["transactionHash"]))
        )
        if receipt["status"] != 1:
            raise self._reason(transaction, told["blockNumber"], label)
        self._heard(receipt)
        return receipt

    def _reason(self, transaction: dict[str, Any], block: str, label: str) -> ChainError:
        """What the contract said, by the same call on the state that the refusal left as it was."""
        try:
            self._node.ask("eth_call", transaction, block)
        except NodeError as error:
            data = error.data
            return decode_error(data, label) if data else ChainError("Reverted", {}, label)
        return ChainError("Reverted", {}, label)


class Node:
    """A development node, asked over one connection."""

    def __init__(self, url: str) -> None:
        self._http = HTTPConnection(urlsplit(url).netloc, timeout=60.0)

    def ask(self, method: str, *parameters: Any) -> Any:
        """The result. Raises NodeError for an error."""
        request = {"jsonrpc": "2.0", "id": 1, "method": method, "params": parameters}
        self._http.request("POST", "/", json.dumps(request), {"Content-Type": "application/json"})
        answer = json.loads(self._http.getresponse().read())
        if "error" in answer:
            raise NodeError(method, answer["error"])
        return answer["result"]

    def receipt(self, transaction: dict[str, Any], patience: float = PATIENCE_SECONDS) -> Any:
        """Sends it and waits until it is mined. Raises NodeError, also if it is not mined `patience` seconds after
        the node's own.
        """
        sender = transaction["from"]
        nonce = self.ask("eth_getTransactionCount", sender, "latest")
        try:
            return self.ask("eth_sendTransactionSync", transaction | {"nonce": nonce})
        except NodeError as error:
            if error.message != NOT_YET:
                raise
            late = error
        until = time.monotonic() + patience
        while int(self.ask("eth_getTransactionCount", sender, "latest"), 16) <= int(nonce, 16):
            if time.monotonic() > until:
                raise late
            time.sleep(POLL_SECONDS)
        return self.ask("eth_getTransactionReceipt", self._sent(sender, int(nonce, 16)))

    def _sent(self, sender: str, nonce: int) -> str:
        """The hash of a transaction that was mined a moment ago. The node's own search fails on a chain put back."""
        number = int(self.ask("eth_blockNumber"), 16)
        while True:
            for each in self.ask("eth_getBlockByNumber", hex(number), True)["transactions"]:
                if (each["from"].lower(), int(each["nonce"], 16)) == (sender.lower(), nonce):
                    return str(each["hash"])
            number -= 1

    def put_back(self, snapshot: str) -> str:
        """Makes the chain what it was. Returns the name by which the next call knows it.

        Rationale: of 50 first transactions behind a revert three were never mined. So somebody's who does not count
        are sent until one is.
        """
        self.ask("evm_revert", snapshot)
        again = str(self.ask("evm_snapshot"))
        nobody = self.ask("eth_accounts")[-1]
        for value in range(int(PATIENCE_SECONDS / SETTLE_SECONDS)):
            sent = self.ask("eth_sendTransaction", {"from": nobody, "to": nobody, "value": hex(value)})
            until = time.monotonic() + SETTLE_SECONDS
            while time.monotonic() < until:
                if self.ask("eth_getTransactionReceipt", sent) is not None:
                    return again
        raise NodeError("evm_revert", {"message": "nothing is mined any more"})

    def close(self) -> None:
        self._http.close()
