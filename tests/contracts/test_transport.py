"""The road to the chain:

what is sent is counted, what is refused is named, and a silent node is asked again, but not for ever.
"""

import dataclasses
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from contracts import abi
from contracts.client import Chain, ChainError, ChainUnreachable
from contracts.transport import Transport
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
