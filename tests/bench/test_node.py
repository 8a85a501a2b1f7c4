"""A transaction that a busy node mines late is waited for, and for no longer than is said."""

from collections.abc import Iterator
from threading import Timer
from typing import Any

import pytest

from bench._node import NOT_YET, Node, NodeError
from deploy.devnet import Devnet
from deploy.keys import dev_account

SENDER, RECEIVER = dev_account(0).address, dev_account(1).address


class Busy(Node):
    """Takes transactions and gives up waiting at once, as anvil does after half a minute."""

    def ask(self, method: str, *parameters: Any) -> Any:
        if method != "eth_sendTransactionSync":
            return super().ask(method, *parameters)
        super().ask("eth_sendTransaction", *parameters)
        raise NodeError(method, {"message": NOT_YET})


@pytest.fixture
def devnet() -> Iterator[Devnet]:
    with Devnet(accounts=2) as devnet:
        yield devnet


@pytest.fixture
def node(devnet: Devnet) -> Iterator[Node]:
    node = Busy(devnet.url)
    node.ask("evm_setAutomine", False)
    yield node
    node.close()


def payment(value: int) -> dict[str, Any]:
    return {"from": SENDER, "to": RECEIVER, "value": hex(value), "gas": hex(50_000)}


def test_a_transaction_that_is_mined_late_has_its_own_receipt(devnet: Devnet, node: Node) -> None:
    miner = Node(devnet.url)
    found = []
    for value in (1, 2):
        timer = Timer(0.2, miner.ask, ("evm_mine",))
        timer.start()
        found.append(node.receipt(payment(value)))
        timer.join()
    miner.close()
    sent = [int(node.ask("eth_getTransactionByHash", each["transactionHash"])["value"], 16) for each in found]
    assert sent == [1, 2] and [int(each["status"], 16) for each in found] == [1, 1]


def test_one_that_is_never_mined_is_given_up(node: Node) -> None:
    with pytest.raises(NodeError, match=NOT_YET):
        node.receipt(payment(1), patience=0.2)


def test_another_error_is_told_as_it_is(node: Node) -> None:
    with pytest.raises(NodeError, match="Insufficient funds"):
        node.receipt(payment(1 << 200))


def test_a_chain_that_was_put_back_mines_what_is_sent(devnet: Devnet) -> None:
    """A race that a busy node lost about once in twenty times, so it is tried often."""
    node = Node(devnet.url)
    kept = node.ask("evm_snapshot")
    for _ in range(100):
        for _ in range(5):
            node.receipt(payment(1))
        kept = node.put_back(kept)
        assert int(node.receipt(payment(1))["status"], 16) == 1
        assert int(node.ask("eth_getTransactionCount", SENDER, "latest"), 16) == 1
    node.close()
