"""The road to one chain: patient JSON-RPC, calls, signed transactions, logs. Knows no contract by name."""

import contextlib
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

from eth_account.signers.local import LocalAccount
from eth_account.typed_transactions.typed_transaction import TypedTransaction
from eth_typing import ChecksumAddress, HexStr
from eth_utils.address import to_checksum_address
from hexbytes import HexBytes
from web3 import Web3
from web3.exceptions import BlockNotFound, ContractLogicError, TransactionNotFound, Web3RPCError
from web3.types import LogReceipt, TxParams, TxReceipt, Wei

from contracts.abi import Function, decode_error
from contracts.council import open_council
from contracts.errors import AnswerTooLarge, ChainError, NonceTaken, ReceiptTimeout
from contracts.providers import PatientSocket, open_provider

_NONCE_ATTEMPTS = 5
_RECEIPT_WAIT_SECONDS = 0.05
_LONGEST_RECEIPT_WAIT_SECONDS = 0.5
_NONCE_LOOKS = 5
_RAISE = 5, 4  # of both fees at a replacement; nodes ask for a tenth more, at least
_REPLACEMENTS = 10  # of one transaction: nine times its first price


@dataclass(frozen=True)
class Receipt:
    """What one transaction cost. method: "Escrow.open"."""

    method: str
    sender: str
    gas: int
    calldata_bytes: int
    floor_gas: int
    block: int
    tx: bytes


def floor_gas(data: bytes) -> int:
    """What a transaction with this calldata costs at least, whatever it does (EIP-7623)."""
    return 21_000 + 40 * len(data) - 30 * data.count(0)


@dataclass(frozen=True)
class Signed:
    """A signed transaction, ready to be sent. label: "Disputes.commit"."""

    label: str
    nonce: int
    hash: bytes
    raw: bytes


class Journal(Protocol):
    """Keeps an account's transactions across crashes: each is recorded before it is sent."""

    def record(self, signed: Signed) -> None:
        """Returns once it cannot be lost any more."""

    def unsettled(self) -> list[Signed]:
        """Those whose fate is not known, by nonce, replacements behind what they replace."""

    def settle(self, nonce: int, mined: bytes | None, block: int | None = None) -> None:
        """The hash with this nonce that is in a block, and in which; None: none of ours will ever be in one."""

    def reopen(self, block: int) -> None:
        """The chain was reorganised: what was mined in `block` or later is not settled any more."""


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
        self,
        url: str | Sequence[str],
        key: LocalAccount | None,
        patience_seconds: float = 30.0,
        receipt_seconds: float = 300.0,
        stuck_seconds: float = 30.0,
    ) -> None:
        """url: http(s):// or ws(s)://; several of one chain are asked as contracts/council.py says. Nothing is sent
        before the first question. Raises RpcUrlError.

        `receipt_seconds`: how long a transaction may wait for its block; `stuck_seconds`: how long at one price.
        """
        urls = (url,) if isinstance(url, str) else tuple(url)
        self.url = ", ".join(urls)
        self.key = key
        self.receipt_seconds = receipt_seconds
        self.stuck_seconds = stuck_seconds
        self.journal: Journal | None = None
        provider = open_provider(urls[0], patience_seconds) if len(urls) == 1 else open_council(urls, patience_seconds)
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
        receipt = self._follow([sent], transaction, key)
        self.receipts.append(
            Receipt(
                label,
                key.address,
                receipt["gasUsed"],
                len(data),
                floor_gas(data),
                receipt["blockNumber"],
                bytes(receipt["transactionHash"]),
            )
        )
        if receipt["status"] != 1:
            raise self._why(transaction, receipt, label)
        return receipt

    def resume(self) -> list[Signed]:
        """Sends what the journal has not settled once more, the same bytes, and waits until each is in a block or never
        can be. Returns what it found. To be called before anything is decided anew, while nobody else sends.

        Raises ReceiptTimeout, ChainUnreachable.
        """
        found = self.journal.unsettled() if self.journal and self.key else []
        by_nonce: dict[int, list[Signed]] = {}
        for signed in found:
            by_nonce.setdefault(signed.nonce, []).append(signed)
        started, waiting = time.monotonic(), list[tuple[list[Signed], TxParams]]()
        for sent in by_nonce.values():
            assert self.key is not None
            newest, fields = sent[-1], _fields(sent[-1].raw)
            try:
                self._broadcast(newest)
            except Web3RPCError as error:
                # A node takes no second transaction of a nonce at the same price, and none of a nonce that is used: its
                # blocks say what became of ours. Anything else it will never take.
                if not _about_nonce(error) and not any(self._known(HexBytes(each.hash)) for each in sent):
                    self._settle(newest.nonce, None)
                    continue
            # Nobody knows how long it has waited, and clocks run meanwhile.
            if self._is_outbid(fields) and not any(self._receipt(each) for each in sent):
                sent.append(self._replace(fields, self.key, newest.label))
            waiting.append((sent, fields))
        for sent, fields in waiting:
            assert self.key is not None
            with contextlib.suppress(NonceTaken):
                self._follow(sent, fields, self.key, started)
        return found

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

    def calldata(self, transaction: bytes) -> bytes:
        """What a transaction was sent with. Raises ChainError where the node has none of that hash (any more)."""
        try:
            return bytes(self.web3.eth.get_transaction(HexBytes(transaction))["input"])
        except TransactionNotFound as error:
            raise ChainError("NoTransaction", {"hash": transaction}, "eth_getTransactionByHash") from error

    def block_hash(self, block: int) -> bytes | None:
        """None for a block that the chain does not have (any more)."""
        try:
            return bytes(self.web3.eth.get_block(block)["hash"])
        except BlockNotFound:
            return None

    def _estimate(self, transaction: TxParams, label: str) -> int:
        """A fifth above the node's estimate: the state may move before the block; never above what one block holds."""
        try:
            estimate = self.web3.eth.estimate_gas(transaction)
        except (ContractLogicError, Web3RPCError) as error:
            raise explain(error, label) from error
        limit = self.web3.eth.get_block("latest")["gasLimit"]
        return min(estimate * 6 // 5, limit)

    def _submit(self, transaction: TxParams, key: LocalAccount, label: str) -> Signed:
        base = self.web3.eth.get_block("latest").get("baseFeePerGas", Wei(0))
        tip = self.web3.eth.max_priority_fee
        transaction["maxPriorityFeePerGas"] = tip
        transaction["maxFeePerGas"] = Wei(2 * base + tip)  # survives six full blocks in a row
        refusal: Web3RPCError | None = None
        for _ in range(_NONCE_ATTEMPTS):
            transaction["nonce"] = self.web3.eth.get_transaction_count(key.address, "pending")
            signed = self._sign(transaction, key, label)
            try:
                self._broadcast(signed)
                return signed
            except Web3RPCError as error:
                if self._known(HexBytes(signed.hash)):
                    return signed
                self._settle(signed.nonce, None)
                refusal = error
                if not _about_nonce(error):
                    break
        assert refusal is not None
        raise explain(refusal, label) from refusal

    def _sign(self, transaction: TxParams, key: LocalAccount, label: str) -> Signed:
        """SAFETY: recorded before anybody else can see it."""
        made = key.sign_transaction(cast(dict[str, Any], transaction))
        signed = Signed(label, transaction["nonce"], bytes(made.hash), bytes(made.raw_transaction))
        if self.journal is not None:
            self.journal.record(signed)
        return signed

    def _broadcast(self, signed: Signed) -> None:
        self.web3.eth.send_raw_transaction(HexBytes(signed.raw))

    def _settle(self, nonce: int, mined: bytes | None, block: int | None = None) -> None:
        if self.journal is not None:
            self.journal.settle(nonce, mined, block)

    def _known(self, transaction: HexBytes) -> bool:
        try:
            self.web3.eth.get_transaction(transaction)
        except TransactionNotFound:
            return False
        return True

    def _follow(
        self, sent: list[Signed], transaction: TxParams, key: LocalAccount, priced: float | None = None
    ) -> TxReceipt:
        """Waits until one of `sent`, all of one nonce, is in a block, and raises the price of one that is stuck.

        priced: monotonic time of the last raise; None: now. Raises ReceiptTimeout; NonceTaken where somebody else who
        holds the key was faster.
        """
        label, nonce = sent[0].label, sent[0].nonce
        started = time.monotonic()
        priced = started if priced is None else priced
        pause, missed = _RECEIPT_WAIT_SECONDS, 0
        while True:
            receipt = next(filter(None, (self._receipt(each) for each in reversed(sent))), None)
            if receipt is not None:
                self._settle(nonce, bytes(receipt["transactionHash"]), receipt["blockNumber"])
                return receipt
            missed = missed + 1 if self.web3.eth.get_transaction_count(key.address) > nonce else 0
            if missed > _NONCE_LOOKS:  # not at once: the block may have come between the two questions
                self._settle(nonce, None)
                raise NonceTaken(label, nonce)
            now = time.monotonic()
            if now - started > self.receipt_seconds:
                raise ReceiptTimeout(label, "0x" + sent[-1].hash.hex(), self.receipt_seconds)
            if now - priced > self.stuck_seconds and len(sent) <= _REPLACEMENTS:
                sent.append(self._replace(transaction, key, label))
                priced = now
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_RECEIPT_WAIT_SECONDS)

    def _is_outbid(self, transaction: TxParams) -> bool:
        """Whether a block such as the latest would not take it."""
        return int(transaction["maxFeePerGas"]) < self.web3.eth.get_block("latest").get("baseFeePerGas", Wei(0))

    def _receipt(self, signed: Signed) -> TxReceipt | None:
        try:
            return self.web3.eth.get_transaction_receipt(HexBytes(signed.hash))
        except TransactionNotFound:
            return None

    def _replace(self, transaction: TxParams, key: LocalAccount, label: str) -> Signed:
        """The same transaction at a higher price, in the place of the one that is stuck."""
        base = self.web3.eth.get_block("latest").get("baseFeePerGas", Wei(0))
        up, down = _RAISE
        tip = max(int(transaction["maxPriorityFeePerGas"]), 1) * up // down + 1
        most = max(int(transaction["maxFeePerGas"]) * up // down + 1, 2 * base + tip)
        transaction["maxPriorityFeePerGas"], transaction["maxFeePerGas"] = Wei(tip), Wei(most)
        signed = self._sign(transaction, key, label)
        with contextlib.suppress(Web3RPCError):  # its nonce may be used by now; `_follow` looks at all of them
            self._broadcast(signed)
        return signed

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


def _fields(raw: bytes) -> TxParams:
    """A transaction of ours as it was before it was signed."""
    told = TypedTransaction.from_bytes(HexBytes(raw)).as_dict()
    names = ("chainId", "nonce", "maxPriorityFeePerGas", "maxFeePerGas", "gas", "to", "value", "data")
    fields = {name: told[name] for name in names}
    fields["to"] = to_checksum_address(told["to"]) if told["to"] else b""
    return cast(TxParams, fields)


def _about_nonce(error: Web3RPCError) -> bool:
    text = str(error).lower()
    return any(word in text for word in ("nonce", "underpriced", "already known", "already imported"))
