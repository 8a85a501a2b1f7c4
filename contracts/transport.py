"""The road to one chain: patient JSON-RPC, calls, signed transactions, logs. Knows no contract by name."""

import threading
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

from eth_account.signers.local import LocalAccount
from eth_typing import ChecksumAddress, HexStr
from hexbytes import HexBytes
from web3 import Web3
from web3.exceptions import ContractLogicError, TimeExhausted, TransactionNotFound, Web3RPCError
from web3.types import LogReceipt, TxParams, TxReceipt, Wei

from contracts.abi import Function, decode_error
from contracts.errors import AnswerTooLarge, ChainError, ReceiptTimeout
from contracts.providers import PatientSocket, open_provider

_NONCE_ATTEMPTS = 5


@dataclass(frozen=True)
class Receipt:
    """What one transaction cost. method: "Escrow.open"."""

    method: str
    sender: str
    gas: int
    calldata_bytes: int
    block: int
    tx: bytes


class _Nonces:
    """One lock an account and chain in this process:

    between asking for the nonce and the node's answer to the transaction nobody else may send.
    """

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._locks: dict[tuple[int, str], threading.Lock] = {}

    def lock(self, chain_id: int, account: str) -> threading.Lock:
        with self._guard:
            return self._locks.setdefault((chain_id, account), threading.Lock())


_NONCES = _Nonces()


class Transport:
    def __init__(
        self, url: str, key: LocalAccount | None, patience_seconds: float = 30.0, receipt_seconds: float = 300.0
    ) -> None:
        """url: http(s):// or ws(s)://. Nothing is sent before the first question. Raises RpcUrlError.

        `receipt_seconds`: how long a transaction may wait for its block.
        """
        self.url = url
        self.key = key
        self.receipt_seconds = receipt_seconds
        provider = open_provider(url, patience_seconds)
        self.web3 = Web3(provider)
        if isinstance(provider, PatientSocket):  # Rationale: web3's caches keep a provider long after its last use
            weakref.finalize(self, provider.close).atexit = False
        self.receipts: list[Receipt] = []
        self._chain_id: int | None = None

    @property
    def chain_id(self) -> int:
        if self._chain_id is None:
            self._chain_id = self.web3.eth.chain_id
        return self._chain_id

    def call(
        self, to: str, function: Function, arguments: Sequence[Any], hints: Sequence[Any], block: int | None = None
    ) -> Any:
        """Reads. One output comes bare, several as a tuple.

        Raises ChainError: the contract refused, or there is no contract at `to`.
        """
        transaction: TxParams = {"to": cast(ChecksumAddress, to), "data": HexBytes(function.encode(arguments))}
        if self.key is not None:
            transaction["from"] = self.key.address
        try:
            answer = bytes(self.web3.eth.call(transaction, "latest" if block is None else block))
        except (ContractLogicError, Web3RPCError) as error:
            raise explain(error, function.label) from error
        if not answer and function.outputs:
            raise ChainError("NoContract", {"address": to}, function.label)
        values = function.decode(answer, hints)
        return values[0] if len(values) == 1 else values

    def send(self, to: str, function: Function, arguments: Sequence[Any], gas: int | None = None) -> TxReceipt:
        """Signs, sends and waits for the block. `gas` overrules the estimate (a transaction that must land even if it
        reverts).

        Raises ChainError (refused by the contract), ReceiptTimeout, ChainUnreachable.
        """
        return self.send_raw(to, function.encode(arguments), function.label, gas)

    def send_raw(self, to: str | None, data: bytes, label: str, gas: int | None = None) -> TxReceipt:
        """As send, for bytes; `to` None creates a contract."""
        if self.key is None:
            raise PermissionError(f"{label}: this Chain was opened without a key and can only read")
        key = self.key
        transaction: TxParams = {"from": key.address, "data": HexBytes(data), "value": Wei(0), "chainId": self.chain_id}
        if to is not None:
            transaction["to"] = cast(ChecksumAddress, to)
        transaction["gas"] = self._estimate(transaction, label) if gas is None else gas
        with _NONCES.lock(self.chain_id, key.address):
            sent = self._submit(transaction, key, label)
        receipt = self._wait(sent, label)
        self.receipts.append(
            Receipt(
                label,
                key.address,
                receipt["gasUsed"],
                len(data),
                receipt["blockNumber"],
                bytes(receipt["transactionHash"]),
            )
        )
        if receipt["status"] != 1:
            raise self._why(transaction, receipt, label)
        return receipt

    def logs(self, addresses: Sequence[str], from_block: int, to_block: int, step: int) -> Iterator[LogReceipt]:
        """Logs of `addresses` in order, both ends included, `step` blocks a question; fewer where the node, or we,
        can't take so many. Raises ChainError where a single block is refused.
        """
        first = from_block
        while first <= to_block:
            last = min(first + step - 1, to_block)
            try:
                found = self.web3.eth.get_logs(
                    {
                        "address": [cast(ChecksumAddress, item) for item in addresses],
                        "fromBlock": first,
                        "toBlock": last,
                    }
                )
            except (AnswerTooLarge, Web3RPCError) as error:
                if last == first:
                    if isinstance(error, AnswerTooLarge):
                        raise
                    raise explain(error, "eth_getLogs") from error
                step = (last - first + 1) // 2
                continue
            yield from sorted(found, key=lambda log: (log["blockNumber"], log["logIndex"]))
            first = last + 1

    def _estimate(self, transaction: TxParams, label: str) -> int:
        """A fifth above the node's estimate: the state may move before the block; never above what one block holds."""
        try:
            estimate = self.web3.eth.estimate_gas(transaction)
        except (ContractLogicError, Web3RPCError) as error:
            raise explain(error, label) from error
        limit = self.web3.eth.get_block("latest")["gasLimit"]
        return min(estimate * 6 // 5, limit)

    def _submit(self, transaction: TxParams, key: LocalAccount, label: str) -> HexBytes:
        base = self.web3.eth.get_block("latest").get("baseFeePerGas", Wei(0))
        tip = self.web3.eth.max_priority_fee
        transaction["maxPriorityFeePerGas"] = tip
        transaction["maxFeePerGas"] = Wei(2 * base + tip)  # survives six full blocks in a row
        refusal: Web3RPCError | None = None
        for _ in range(_NONCE_ATTEMPTS):
            transaction["nonce"] = self.web3.eth.get_transaction_count(key.address, "pending")
            signed = key.sign_transaction(cast(dict[str, Any], transaction))
            try:
                return self.web3.eth.send_raw_transaction(signed.raw_transaction)
            except Web3RPCError as error:
                if self._known(signed.hash):
                    return signed.hash
                refusal = error
                if not _about_nonce(error):
                    break
        assert refusal is not None
        raise explain(refusal, label) from refusal

    def _known(self, transaction: HexBytes) -> bool:
        try:
            self.web3.eth.get_transaction(transaction)
        except TransactionNotFound:
            return False
        return True

    def _wait(self, transaction: HexBytes, label: str) -> TxReceipt:
        try:
            return self.web3.eth.wait_for_transaction_receipt(transaction, self.receipt_seconds, poll_latency=0.05)
        except TimeExhausted:
            raise ReceiptTimeout(label, transaction.to_0x_hex(), self.receipt_seconds) from None

    def _why(self, transaction: TxParams, receipt: TxReceipt, label: str) -> ChainError:
        """Asks the node to repeat a reverted transaction as a call, for its revert data."""
        again: TxParams = {"from": transaction["from"], "data": transaction["data"], "gas": transaction["gas"]}
        if "to" in transaction:
            again["to"] = transaction["to"]
        try:
            self.web3.eth.call(again, receipt["blockNumber"])
        except (ContractLogicError, Web3RPCError) as error:
            return explain(error, label)
        if receipt["gasUsed"] == transaction["gas"]:
            return ChainError("OutOfGas", {"gas": receipt["gasUsed"]}, label)
        return ChainError("Reverted", {"transaction": bytes(receipt["transactionHash"])}, label)


def explain(error: Exception, label: str) -> ChainError:
    """The node's error -> ChainError; without revert data the node's own words stand under `Rpc`."""
    data = getattr(error, "data", None)
    if data is None:
        response = getattr(error, "rpc_response", None) or {}
        data = response.get("error", {}).get("data") if isinstance(response, dict) else None
    if isinstance(data, dict):
        data = data.get("data")
    if isinstance(data, str) and data.startswith("0x") and len(data) >= 10:
        return decode_error(bytes(HexBytes(HexStr(data))), label)
    return ChainError("Rpc", {"message": getattr(error, "message", None) or str(error)}, label)


def _about_nonce(error: Web3RPCError) -> bool:
    text = str(error).lower()
    return "nonce" in text or "underpriced" in text
