"""Several nodes of one chain, some of which are down, lag or lie: real ones behind doors that misbehave."""

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from contracts.client import Chain, ChainError, ChainUnreachable, Worker
from contracts.council import Council, open_council
from contracts.errors import Disagreement
from deploy.devnet import free_port
from deploy.keys import dev_account
from tests.contracts.door import Answer, Door, Twist


def honest(method: str, params: list[Any], ask: Callable[[], Answer]) -> Answer | None:
    return ask()


def dead(method: str, params: list[Any], ask: Callable[[], Answer]) -> Answer | None:
    return None


def ahead(method: str, params: list[Any], ask: Callable[[], Answer]) -> Answer | None:
    """Claims a head far away, and that nothing ever happened."""
    if method == "eth_blockNumber":
        return {"jsonrpc": "2.0", "id": 1, "result": hex(10**9)}
    return {**ask(), "result": []} if method == "eth_getLogs" else ask()


def lying(method: str, params: list[Any], ask: Callable[[], Answer]) -> Answer | None:
    """Says of everything that is read from a contract that it is zero."""
    return {"jsonrpc": "2.0", "id": 1, "result": "0x" + "00" * 32} if method == "eth_call" else ask()


@pytest.fixture
def doors(world: Any) -> Iterator[Callable[..., list[Door]]]:
    opened: list[Door] = []

    def open_doors(*twists: Twist) -> list[Door]:
        opened.extend(Door(world.devnet.url, twist) for twist in twists)
        return opened

    yield open_doors
    for door in opened:
        door.close()


def chain(world: Any, doors: list[Door], index: int = 5) -> Chain:
    return Chain([door.url for door in doors], world.addresses, dev_account(index), patience_seconds=10)


@pytest.mark.parametrize("liar", [dead, ahead, lying])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_two_of_three_nodes_outvote_the_third(
    world: Any, doors: Callable[..., list[Door]], liar: Twist, place: int
) -> None:
    twists: list[Twist] = [honest, honest]
    twists.insert(place, liar)
    ours, truth = chain(world, doors(*twists)), world.chain(5)
    before = truth.token.balance(ours.account)
    ours.token.mint(ours.account, 7)
    ours.workers.register(Worker(ours.account, b"\x01" * 32, "http://x"))
    assert ours.token.balance(ours.account) == before + 7
    assert ours.block_number() == truth.block_number()
    assert list(ours.events(0)) == list(truth.events(0)) != []


@pytest.mark.parametrize("place", [0, 1, 2])
def test_calldata_is_what_two_of_three_nodes_say(world: Any, doors: Callable[..., list[Door]], place: int) -> None:
    def forging(method: str, params: list[Any], ask: Callable[[], Answer]) -> Answer | None:
        answer = ask()
        if method == "eth_getTransactionByHash" and answer["result"]:
            answer["result"]["input"] = "0x11"
        return answer

    twists: list[Twist] = [honest, honest]
    twists.insert(place, forging)
    ours, truth = chain(world, doors(*twists)), world.chain(5)
    sent = bytes(truth.token.mint(truth.account, 7)["transactionHash"])
    assert ours.transport.calldata(sent) == truth.transport.calldata(sent)
    assert len(truth.transport.calldata(sent)) == 68
    with pytest.raises(ChainError, match="NoTransaction"):
        ours.transport.calldata(b"\x11" * 32)


def test_one_of_two_nodes_is_enough(world: Any, doors: Callable[..., list[Door]]) -> None:
    ours = chain(world, doors(dead, honest), 6)
    ours.token.mint(ours.account, 3)
    assert ours.token.balance(ours.account) == world.chain(6).token.balance(ours.account)


@pytest.mark.parametrize("twists", [(ahead, honest), (honest, ahead), (dead, honest)])
def test_what_one_of_two_nodes_tells_of_events_counts(
    world: Any, doors: Callable[..., list[Door]], twists: tuple[Twist, Twist]
) -> None:
    """Whoever is faster may lag, or keep events back; what it left out would never be asked for again."""
    truth = world.chain(6)
    truth.token.mint(truth.account, 3)
    last = truth.block_number()
    assert list(chain(world, doors(*twists), 6).events(0, last)) == list(truth.events(0, last)) != []


def test_a_node_that_lags_is_not_waited_for_and_turns_nothing_back(
    world: Any, doors: Callable[..., list[Door]]
) -> None:
    stuck: dict[str, Answer] = {}

    def behind(method: str, params: list[Any], ask: Callable[[], Answer]) -> Answer | None:
        return stuck.setdefault(method, ask()) if method == "eth_blockNumber" else ask()

    ours = chain(world, doors(honest, behind, honest), 6)
    first = ours.block_number()
    world.devnet.mine(5)
    assert ours.block_number() == first + 5


def test_nodes_that_all_differ_are_not_believed(world: Any, doors: Callable[..., list[Door]]) -> None:
    def says(number: int) -> Twist:
        def twist(method: str, params: list[Any], ask: Callable[[], Answer]) -> Answer | None:
            answer = {"jsonrpc": "2.0", "id": 1, "result": "0x" + f"{number:064x}"}
            return answer if method == "eth_call" else ask()

        return twist

    ours = Chain([d.url for d in doors(says(1), says(2), says(3))], world.addresses, dev_account(5), patience_seconds=1)
    with pytest.raises(Disagreement, match="3 gave 3 different answers"):
        ours.token.balance(ours.account)


def test_no_node_at_all_is_told_with_every_url() -> None:
    urls = [f"http://127.0.0.1:{free_port()}" for _ in range(3)]
    with pytest.raises(ChainUnreachable) as gone:
        open_council(urls, 0.5).make_request("eth_chainId", [])  # type: ignore[arg-type]
    assert all(url in str(gone.value) for url in urls)


def test_a_silent_node_is_left_alone_for_a_while() -> None:
    asked: list[int] = []
    gone = threading.Event()

    def silent(method: Any, params: Any) -> Any:
        asked.append(1)
        gone.wait(30)
        raise ChainUnreachable("x", 1, 0.0, "silent")

    def good(method: Any, params: Any) -> Any:
        return {"jsonrpc": "2.0", "id": 1, "result": "0x1"}

    council = Council(["a", "b", "c"], [silent, good, good], 5.0)
    started = time.monotonic()
    assert council.make_request("eth_chainId", [])["result"] == "0x1"  # type: ignore[arg-type]
    assert time.monotonic() - started < 5
    gone.set()
