"""A watchtower that asks several nodes, one of which lies about whatever it can: it convicts all the same, and stakes
nothing on a lie.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from bench._place import Defence, Place
from bench._town import FUNDS, Served, serve, until
from challenger.agent import Agent
from challenger.store import GameState, JobState, Store
from contracts.client import Chain
from contracts.events import ChallengeCommitted, GameEnded, GameMoved
from deploy.keys import dev_account
from tests.contracts.door import Answer, Door, Twist

Ask = Callable[[], Answer]


@pytest.fixture(scope="module")
def served(place: Place) -> dict[bool, Served]:
    return {spoil: serve(place.town.weights, spoil=spoil) for spoil in (False, True)}


def straight(method: str, params: list[Any], ask: Ask) -> Answer | None:
    return ask()


def inverted(text: str) -> str:
    """Other bytes, as many."""
    return "0x" + bytes(byte ^ 0xFF for byte in bytes.fromhex(text[2:])).hex()


class Liar:
    """Tells of each question in `about` something else than the node does, and counts what it told."""

    def __init__(self, **about: Callable[[Any], Any]) -> None:
        self.about, self.told = about, Counter[str]()

    def __call__(self, method: str, params: list[Any], ask: Ask) -> Answer | None:
        answer = ask()
        if method not in self.about or answer.get("result") is None:
            return answer
        self.told[method] += 1
        return {**answer, "result": self.about[method](answer["result"])}


def other_hash(block: dict[str, Any]) -> dict[str, Any]:
    return {**block, "hash": inverted(block["hash"]), "timestamp": hex(int(block["timestamp"], 16) + 10**6)}


def other_words(logs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same events, of other jobs, games and accounts."""
    return [{**log, "topics": [log["topics"][0], *map(other_name, log["topics"][1:])]} for log in logs]


def other_name(topic: str) -> str:
    """As well formed: zeros in front of an account or a number stay."""
    kept = 26 if topic.startswith("0x" + "00" * 12) else 2
    return topic[:kept] + inverted("0x" + topic[kept:])[2:]


def failed(receipt: dict[str, Any]) -> dict[str, Any]:
    return {**receipt, "status": "0x0", "logs": []}


LIES: dict[str, dict[str, Callable[[Any], Any]]] = {
    "no events": {"eth_getLogs": lambda logs: []},
    "other events": {"eth_getLogs": other_words},
    "other blocks": {"eth_getBlockByNumber": other_hash},
    "another state": {"eth_call": lambda data: "0x" + "00" * (len(data) // 2 - 1)},
    "other receipts": {"eth_getTransactionReceipt": failed, "eth_getTransactionCount": lambda count: hex(10**6)},
    "a head far away": {"eth_blockNumber": lambda number: hex(10**9)},
}
LIES["all of it"] = {method: lie for lies in list(LIES.values()) for method, lie in lies.items()}


@pytest.mark.parametrize("lies", LIES)
def test_one_node_of_three_that_lies_changes_nothing(place: Place, served: dict[bool, Served], lies: str) -> None:
    convicts(place, served, lies, honest=2)


@pytest.mark.parametrize("lies", ["no events", "other events"])
def test_one_node_of_two_hides_no_event(place: Place, served: dict[bool, Served], lies: str) -> None:
    convicts(place, served, lies, honest=1)


def convicts(place: Place, served: dict[bool, Served], lies: str, honest: int) -> None:
    """Of two jobs the wrong one, once, with so many honest nodes beside the liar."""
    config, liar = place.config(f"{lies} beside {honest}"), Liar(**LIES[lies])
    twists: list[Twist] = [liar, *[straight] * honest]
    doors = [Door(place.devnet.url, twist) for twist in twists]
    chain = Chain([door.url for door in doors], place.town.addresses, dev_account(4), patience_seconds=10)
    before = place.town.chain(4)
    before.token.mint(before.account, FUNDS)
    agent = Agent(config, chain, {place.judge.id: place.judge}, Store(config.database_url))
    right, wrong = (place.town.commit(served[spoil]) for spoil in (False, True))
    assert place.judged(agent, wrong) == JobState.SUSPECT and place.judged(agent, right) == JobState.CLEAN
    defence = Defence(place, served[True], config)

    def won() -> bool:
        agent.tick()
        place.devnet.mine()
        defence.play()
        (row,) = agent.store.games_of(wrong.hex())
        return row.state == GameState.WON

    until(won)
    assert sum(liar.told.values()) > 0 and set(liar.told) <= set(LIES[lies])
    assert len(place.events(ChallengeCommitted, wrong, config)) == 1  # of all jobs
    (end,) = place.events(GameEnded, wrong, config)
    assert (end.convicted, end.reason) == (1, 1)
    games = [event.game for event in place.events(GameMoved, wrong, config)]
    assert len({(game.challenger_moves, game.worker_moves) for game in games}) == len(games)
    assert agent.metrics.registry.get_sample_value("plumb_reorgs_total") == 0
    assert all(move.state == "mined" for move in agent.store.moves())
    agent.store.close()
    for door in doors:
        door.close()
