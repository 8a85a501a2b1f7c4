"""The road to the chain:

what is sent is counted, what is refused is named, and a silent node is asked again, but not for ever.
"""

import dataclasses
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import pairwise
from typing import Any

import pytest

from contracts import abi
from contracts.client import Chain, ChainError, ChainUnreachable
from contracts.errors import NonceTaken
from contracts.transport import Signed, Transport, _fields
from deploy.devnet import free_port
from deploy.keys import dev_account

# ---- sending


def test_receipts_say_what_was_paid(world: Any) -> None:
    chain = world.chain(5)
    receipt = chain.token.mint(chain.account, 1)
    [kept] = chain.receipts
    assert (kept.method, kept.sender, kept.gas, kept.block) == (
        "Token.mint",
        chain.account,
        receipt["gasUsed"],
        receipt["blockNumber"],
    )
    assert kept.calldata_bytes == 4 + 2 * 32


def test_threads_and_chains_may_share_one_key(world: Any) -> None:
    start = world.chain(6).token.balance(dev_account(6).address)

    def mint() -> None:
        chain = world.chain(6)
        for _ in range(3):
            chain.token.mint(chain.account, 1)

    threads = [threading.Thread(target=mint) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert world.chain(6).token.balance(dev_account(6).address) == start + 12


def test_errors_of_the_token_are_named_too(world: Any) -> None:
    chain = world.chain(7)
    with pytest.raises(ChainError) as poor:
        chain.token.transfer(dev_account(1).address, 6)
    assert poor.value.args_by_name == {"sender": chain.account, "balance": 0, "needed": 6}
    assert str(poor.value).startswith("Token.transfer: ERC20InsufficientBalance(sender=0x")


def test_a_transaction_that_reverts_in_its_block_is_explained_and_counted(world: Any) -> None:
    chain = world.chain(7)
    transfer = abi.functions("Token")["transfer"]
    with pytest.raises(ChainError, match="ERC20InsufficientBalance"):
        chain.transport.send(chain.token.address, transfer, (dev_account(1).address, 6), gas=100_000)
    assert [receipt.method for receipt in chain.receipts] == ["Token.transfer"]


def test_an_address_without_a_contract_is_named(world: Any) -> None:
    empty = dataclasses.replace(world.addresses, escrow=dev_account(9).address)
    with pytest.raises(ChainError, match="NoContract"):
        Chain(world.devnet.url, empty).escrow.status(bytes(32))


# ---- a transaction and its nonce


class Notebook:
    """A Journal in memory that says what was done in which order."""

    def __init__(self) -> None:
        self.sent: list[Signed] = []
        self.told: list[tuple[int, bool]] = []

    def record(self, signed: Signed) -> None:
        self.sent.append(signed)

    def unsettled(self) -> list[Signed]:
        settled = {nonce for nonce, _ in self.told}
        return [signed for signed in self.sent if signed.nonce not in settled]

    def settle(self, nonce: int, mined: bytes | None, block: int | None = None) -> None:
        self.told.append((nonce, mined is not None))

    def reopen(self, block: int) -> None:
        self.told.clear()


def ask(world: Any, method: str, *params: Any) -> Any:
    return world.devnet._rpc(method, list(params))


def test_a_transaction_that_was_recorded_but_never_sent_is_sent_once(world: Any, monkeypatch: Any) -> None:
    chain, notebook = world.chain(8), Notebook()
    chain.transport.journal = notebook
    real = Transport._broadcast

    class Killed(BaseException):
        pass

    before = chain.token.balance(chain.account)
    for after in (False, True):  # killed before the node heard of it, and after

        def broadcast(self: Transport, signed: Signed, after: bool = after) -> None:
            if after:
                real(self, signed)
            raise Killed

        monkeypatch.setattr(Transport, "_broadcast", broadcast)
        with pytest.raises(Killed):
            chain.token.mint(chain.account, 5)
        monkeypatch.setattr(Transport, "_broadcast", real)
        again = world.chain(8)
        again.transport.journal = notebook
        (found,) = again.transport.resume()
        assert found.label == "Token.mint" and again.transport.resume() == []
    assert chain.token.balance(chain.account) == before + 10
    assert [mined for _, mined in notebook.told] == [True, True]


def test_a_stuck_transaction_is_replaced_at_a_higher_price(world: Any) -> None:
    chain, notebook = world.chain(9), Notebook()
    chain.transport.journal, chain.transport.stuck_seconds = notebook, 0.3
    before = chain.token.balance(chain.account)
    ask(world, "evm_setAutomine", False)
    try:
        thread = threading.Thread(target=chain.token.mint, args=(chain.account, 4))
        thread.start()
        while len(notebook.sent) < 3:
            time.sleep(0.05)
        world.devnet.mine()
        thread.join(60)
    finally:
        ask(world, "evm_setAutomine", True)
    assert chain.token.balance(chain.account) == before + 4
    assert len({signed.nonce for signed in notebook.sent}) == 1 and len({s.hash for s in notebook.sent}) >= 3
    prices = [_fields(signed.raw)["maxFeePerGas"] for signed in notebook.sent]
    assert all(10 * int(after) > 11 * int(before) for before, after in pairwise(prices))


def test_two_processes_with_one_key_lose_no_transaction(world: Any, monkeypatch: Any) -> None:
    """Between the question for the nonce and the transaction somebody else who holds the key is faster."""
    ours, theirs = world.chain(11), world.chain(11)
    real = Transport._broadcast
    raced: list[Signed] = []

    def broadcast(self: Transport, signed: Signed) -> None:
        if self is ours.transport and not raced:
            raced.append(signed)
            rival = dataclasses.replace(signed)
            fields: Any = {**_fields(signed.raw), "maxFeePerGas": 10**11, "maxPriorityFeePerGas": 10**10}
            made = dev_account(11).sign_transaction(fields)
            real(theirs.transport, dataclasses.replace(rival, raw=bytes(made.raw_transaction)))
        real(self, signed)

    monkeypatch.setattr(Transport, "_broadcast", broadcast)
    before = ours.token.balance(ours.account)
    notebook = Notebook()
    ours.transport.journal = notebook
    ours.token.mint(ours.account, 6)
    assert ours.token.balance(ours.account) == before + 12 and len(raced) == 1
    assert [mined for _, mined in notebook.told] == [False, True]


def test_a_nonce_that_was_taken_in_the_pool_is_told(world: Any) -> None:
    chain, notebook = world.chain(12), Notebook()
    chain.transport.journal = notebook
    ask(world, "evm_setAutomine", False)
    told: list[Exception] = []

    def send() -> None:
        try:
            chain.token.mint(chain.account, 4)
        except NonceTaken as error:
            told.append(error)

    try:
        thread = threading.Thread(target=send)
        thread.start()
        while not notebook.sent:
            time.sleep(0.05)
        time.sleep(0.2)
        fields: Any = {
            **_fields(notebook.sent[0].raw),
            "maxFeePerGas": 10**11,
            "maxPriorityFeePerGas": 10**10,
            "value": 1,
        }
        fields |= {"to": dev_account(1).address, "data": b""}
        ask(world, "eth_sendRawTransaction", dev_account(12).sign_transaction(fields).raw_transaction.to_0x_hex())
        world.devnet.mine()
        thread.join(60)
    finally:
        ask(world, "evm_setAutomine", True)
    assert len(told) == 1 and "expected nonce" in str(told[0])
    assert notebook.told == [(notebook.sent[0].nonce, False)]


# ---- an unreachable or stammering node


def test_an_unreachable_chain_is_told_with_its_url_and_attempts() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    started = time.monotonic()
    with pytest.raises(ChainUnreachable, match=rf"{url} after \d+ attempts") as gone:
        _ = Transport(url, None, patience_seconds=0.5).chain_id
    assert gone.value.attempts >= 3
    assert time.monotonic() - started < 5


class Stammering(BaseHTTPRequestHandler):
    """Busy twice, then no JSON, then an answer."""

    asked = 0

    def do_POST(self) -> None:
        kind = type(self)
        kind.asked += 1
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        body = json.dumps({"jsonrpc": "2.0", "id": request["id"], "result": "0x2a"}).encode()
        self.send_response(503 if kind.asked <= 2 else 200)
        if kind.asked == 3:
            body = b"<html>"
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_a_busy_node_is_asked_again() -> None:
    server = HTTPServer(("127.0.0.1", 0), Stammering)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        assert Transport(f"http://127.0.0.1:{server.server_port}", None, patience_seconds=5).chain_id == 42
        assert Stammering.asked == 4
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
