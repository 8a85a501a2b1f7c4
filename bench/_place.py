"""Watchtowers that come and go on a local chain, and the worker that defends itself against them."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench._liar import Liar, Lie
from bench._town import FUNDS, Served, Town, until
from challenger.agent import Agent
from challenger.config import Config
from challenger.demander import DemandLog
from challenger.judge import Judge
from challenger.store import JobState, Store
from contracts.client import ChainError
from contracts.play import GameLog, Player
from deploy.devnet import Devnet
from verifier.canonical import Case
from verifier.commit import OutputsTree, RequestsTree
from verifier.demand import Demand, Wanted, answer_tokens, answer_trace
from verifier.game import Game
from verifier.referee.codec import Model, Opening

WORKER = 2  # the account of stage 1


class Place:
    """A chain with a town on it, and watchtowers that come and go."""

    def __init__(self, devnet: Devnet, town: Town, folder: Path, home: Path) -> None:
        self.devnet, self.town, self.home = devnet, town, home
        self.judge = Judge(folder)
        self.folder = folder
        self.count = 0

    def config(self, name: str, **changes: Any) -> Config:
        """For a watchtower that sees nothing of what was before."""
        data = self.home / name
        data.mkdir(exist_ok=True)
        head = self.town.requester.block_number()
        config = Config(
            "http://unused", data, data, data, (self.folder,), data, poll_seconds=0.01, from_block=head + 1, downloads=2
        )
        return replace(config, **changes)

    def agent(self, config: Config, account: int = 4, agent_class: type[Agent] = Agent) -> Agent:
        chain = self.town.chain(account)
        if chain.token.balance(chain.account) < FUNDS:
            chain.token.mint(chain.account, FUNDS)
        return agent_class(config, chain, {self.judge.id: self.judge}, Store(config.database_url))

    def judged(self, agent: Agent, job: bytes) -> str:
        """The state of an audited job, and its receipt."""

        def done() -> bool:
            agent.tick()
            row = agent.store.job(job.hex())
            return row is not None and row.state != JobState.WATCHED

        until(done)
        row = agent.store.job(job.hex())
        assert row is not None
        return row.state

    def events(self, kind: type[Any], job: bytes, config: Config) -> list[Any]:
        found = self.town.requester.events(config.from_block)
        return [event for event in found if isinstance(event, kind) and getattr(event, "job", job) == job]


def answer(served: Served, demand: Demand, model: Model) -> tuple[Opening, ...]:
    """What a stage that committed to `served` can post, true or not."""
    r = demand.request
    if demand.kind == Wanted.PROMPT:
        record = RequestsTree(served.requests).record_opening(r)
        return answer_tokens(demand, record, served.requests[r].prompt)
    if demand.kind == Wanted.OUTPUT:
        return answer_tokens(demand, OutputsTree(served.outputs).record_opening(r), served.outputs[r].tokens)
    return answer_trace(demand, served.trees[demand.stage].opening(r), served.traces[demand.stage][r], model)


class Poster:
    """A stage that serves nothing, and posts what is demanded."""

    def __init__(self, place: Place, served: Served, config: Config, accounts: Sequence[int] = (1, 2)) -> None:
        """accounts: of stages that post, by stage."""
        self.place, self.served, self.log, self.from_block = place, served, DemandLog(), config.from_block
        self.chains = [place.town.chain(account) for account in accounts]
        self.posted: list[Demand] = []

    def post(self) -> None:
        self.log.feed(self.place.town.requester.events(self.from_block))
        for job in self.log.jobs.values():
            for id in job.open:
                held = job.demanded[id]
                if held.demand.stage >= len(self.chains):
                    continue
                openings = answer(self.served, held.demand, self.place.judge.model)
                self.chains[held.demand.stage].demands.answer(id, held, self.place.judge.model, openings)
                self.posted.append(held.demand)


class Defence:
    """The convicted worker's side: denies everything, consistently."""

    def __init__(self, place: Place, served: Served, config: Config) -> None:
        self.place, self.served, self.log = place, served, GameLog()
        self.from_block = config.from_block
        self.player = Player(place.town.chain(WORKER), self.case, side_is_worker=True)
        self._cases: dict[Any, Case] = {}

    def case(self, game: Game) -> Case:
        if game.segment not in self._cases:
            judge, trace = self.place.judge, self.served.traces[game.segment.stage][game.segment.request]
            truth = Case(judge.model, judge.weights, judge.profile, game.segment, trace, game.token, game.sampling)
            self._cases[game.segment] = Liar(truth, [Lie(7, 3, delta=1 << 20)], wrong=False, follows=True)
        return self._cases[game.segment]

    def play(self) -> None:
        self.log.feed(self.place.town.requester.events(self.from_block))
        for followed in list(self.log.games.values()):
            try:
                self.player.step(followed, self.place.town.requester.block_timestamp())
            except ChainError as error:  # even a liar has a last move, and it is refused
                assert error.name == "NotWrong", error
