"""Moves that nobody mines at their price while clocks run: a watchtower that starts again outbids itself at once."""

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from bench._place import Defence, Place
from bench._town import FUNDS, serve, until
from challenger.agent import Agent
from challenger.config import Config
from challenger.store import GameState, JobState, Store
from contracts.client import Chain
from contracts.events import GameEnded, GameMoved
from contracts.transport import Signed, Transport
from deploy.keys import dev_account
from tests.contracts.door import Answer, Door
from verifier.keccak import keccak256

DEAR_WEI = 500 * 10**9  # a base fee far above what was offered before
BLOCK_SECONDS = 1.0  # between blocks, of which each costs a clock a second: a hundred of them end it


class Killed(BaseException):
    """SIGKILL, as far as Python can act it: nothing catches it."""


def ask(place: Place, method: str, *parameters: object) -> object:
    return place.devnet._rpc(method, list(parameters))


def mine_dear(place: Place) -> None:
    ask(place, "anvil_setNextBlockBaseFeePerGas", hex(DEAR_WEI))
    place.devnet.mine()


@contextmanager
def dear_blocks(place: Place) -> Iterator[None]:
    """A chain on which everybody pays more."""
    over = threading.Event()

    def mine() -> None:
        while not over.wait(BLOCK_SECONDS):
            mine_dear(place)

    thread = threading.Thread(target=mine)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


class Keeper:
    """A node that keeps in its pool what no block takes at its price, as nodes on live chains do."""

    def __init__(self) -> None:
        self._kept: set[str] = set()

    def __call__(self, method: str, params: list[Any], ask: Callable[[], Answer]) -> Answer | None:
        if method == "eth_sendRawTransaction":
            hash = "0x" + keccak256(bytes.fromhex(params[0][2:])).hex()
            if hash in self._kept:
                return {"jsonrpc": "2.0", "id": 1, "error": {"code": -32000, "message": "already known"}}
            self._kept.add(hash)
        told = ask()
        if method == "eth_getTransactionByHash" and told["result"] is None and params[0] in self._kept:
            return {**told, "result": {"hash": params[0]}}
        return told


@pytest.mark.parametrize("pool", ["keeps them", "forgets them"])
def test_moves_that_were_stuck_at_a_crash_are_made_before_the_clocks_end_and_never_twice(
    place: Place, pool: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, spoilt = place.config(pool), serve(place.town.weights, spoil=True)
    keeper = Door(place.devnet.url, Keeper() if pool == "keeps them" else lambda method, params, ask: ask())

    def start() -> Agent:
        chain = Chain(keeper.url, place.town.addresses, dev_account(4), patience_seconds=2, receipt_seconds=60)
        chain.transport.stuck_seconds = float("inf")  # no price is raised only because time has passed
        return Agent(config, chain, {place.judge.id: place.judge}, Store(config.database_url))

    agent, defence = start(), Defence(place, spoilt, config)
    agent.chain.token.mint(agent.chain.account, FUNDS)
    jobs = [place.town.commit(spoilt) for _ in range(2)]
    for job in jobs:
        assert place.judged(agent, job) == JobState.SUSPECT
    until(lambda: played(place, agent, defence) and turns(agent) == [False, False])
    moved = [told(place, config, job) for job in jobs]

    real = Transport._broadcast

    def broadcast(self: Transport, signed: Signed) -> None:
        real(self, signed)
        raise Killed

    ask(place, "evm_setAutomine", False)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(Transport, "_broadcast", broadcast)
            with pytest.raises(Killed):
                agent.tick()
        agent.store.close()
        mine_dear(place)
        agent = start()
        sent = [move.nonce for move in agent.store.moves() if move.state == "sent"]
        assert len(sent) == len(set(sent)) == 2 and [told(place, config, job) for job in jobs] == moved
        with dear_blocks(place):
            agent.tick()
            if pool == "forgets them":
                agent.tick()
    finally:
        ask(place, "evm_setAutomine", True)
    assert [told(place, config, job) for job in jobs] == [count + 1 for count in moved]
    until(lambda: played(place, agent, defence) and states(agent, jobs) == [GameState.WON] * 2)
    for job in jobs:
        (end,) = place.events(GameEnded, job, config)
        assert (end.convicted, end.reason) == (1, 1)
        games = [event.game for event in place.events(GameMoved, job, config)]
        assert len({(game.challenger_moves, game.worker_moves) for game in games}) == len(games)
    mined = Counter(move.nonce for move in agent.store.moves() if move.state == "mined")
    assert set(mined.values()) == {1} and set(sent) <= set(mined)
    agent.store.close()
    keeper.close()


def played(place: Place, agent: Agent, defence: Defence) -> bool:
    """A round of both sides."""
    agent.tick()
    place.devnet.mine()
    defence.play()
    return True


def turns(agent: Agent) -> list[bool]:
    """Whether it is the worker's turn, of each open game."""
    agent.reader.read()
    return [followed.game.worker_turn for followed in agent.log.games.values()]


def told(place: Place, config: Config, job: bytes) -> int:
    """What the chain tells of a job's games."""
    return len(place.events(GameMoved, job, config)) + len(place.events(GameEnded, job, config))


def states(agent: Agent, jobs: list[bytes]) -> list[str]:
    return [row.state for job in jobs for row in agent.store.games_of(job.hex())]
