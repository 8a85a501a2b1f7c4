"""The demo's scenarios in one process: the same players and the same verdict on the chain's events, on a chain whose
clock is moved on whenever everybody merely waits.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from challenger.agent import Agent as Watchtower
from challenger.config import Config
from challenger.judge import Judge
from challenger.store import LIVE, JobState, Store
from contracts.client import Chain
from contracts.events import Event, GameEnded, GameMoved, JobAccepted, JobCommitted, StageCommitted
from deploy.demo.outcome import events_of, is_final, outcome
from deploy.demo.players import ROLES, FalseAccuser, Role, SilentResponder
from deploy.demo.run import Result
from deploy.demo.scenarios import Scenario
from deploy.devnet import Devnet
from deploy.keys import dev_account
from tests.worker.village import CLOCK_SECONDS, STAKE, WINDOW_SECONDS, Village
from verifier.audit import JUDGED, RIGHT, Audit, Auditor, Choice, Span, Stage, Verdict
from verifier.commit import Request
from verifier.program import Kind
from verifier.sketch import Sketch
from verifier.tolerance import Profile
from verifier.weights import Weights
from worker.agent import Agent, build_worker
from worker.config import WorkerConfig

STAGES = 3
SERVING_SECONDS = 620  # beyond the jobs' commitBy
BLOCK_SECONDS = 1.0
PATIENCE_SECONDS = 1.5  # without an event, after which a party that is not going to move is taken to be done
SCENARIO_SECONDS = 600.0
WATCHTOWER, ACCUSER = 12, 11  # development accounts
NOTHING: frozenset[Kind] = frozenset()
REQUESTS = (
    Request((9, 8, 7, 6, 5, 4, 3), 4),
    Request((200,), 5),
    Request(tuple(range(30, 50)), 3),
)


class BlindAuditor(Auditor):
    """An auditor that passes over some kinds of pieces."""

    def __init__(self, auditor: Auditor, off: frozenset[Kind]) -> None:
        super().__init__(auditor.weights, auditor.profile, auditor.reference.precision)
        self.off = off

    def sweep(
        self, layer: int, spans: Sequence[Span], kinds: Sequence[Kind] = JUDGED, sketch: Sketch | None = None
    ) -> Iterator[Audit]:
        return super().sweep(layer, spans, [kind for kind in kinds if kind not in self.off], sketch)

    def link(
        self, stage: Stage, request: int, layer: int, receiver: Stage | None = None, rows: slice | None = None
    ) -> Audit | None:
        return None if Kind.LINK in self.off else super().link(stage, request, layer, receiver, rows)

    def embed(self, stage: Stage, request: int, tokens: Sequence[int], rows: slice | None = None) -> Audit:
        audit = super().embed(stage, request, tokens, rows)
        if Kind.EMBED in self.off:
            audit.ratios.fill(RIGHT)
        return audit

    def greedy(self, choices: Sequence[Choice]) -> list[Verdict]:
        return [] if Kind.TOKEN in self.off else super().greedy(choices)


class Watch:
    """A watchtower that looks around in a thread of its own."""

    def __init__(self, agent: Watchtower) -> None:
        self.agent = agent
        self._fault: BaseException | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchtower")
        self._thread.start()

    def done_with(self, job: bytes) -> bool:
        """Whether a job is judged and none of its games is in play."""
        row = self.agent.store.job(job.hex())
        judged = row is not None and row.state != JobState.WATCHED
        return judged and not any(game.state in LIVE for game in self.agent.store.games_of(job.hex()))

    def ratio(self, job: bytes) -> float | None:
        games = self.agent.store.games_of(job.hex())
        return float(games[0].evidence["ratio"]) if games else None

    def stop(self) -> None:
        """Raises what went wrong in its thread."""
        self._stopped.set()
        self._thread.join()
        self.agent.close()
        if self._fault is not None:
            raise self._fault

    def _run(self) -> None:
        try:
            while not self._stopped.wait(0.05):
                self.agent.tick()
        except BaseException as fault:  # raised again by `stop`, in the test's own thread
            self._fault = fault


@dataclass(frozen=True)
class Purses:
    """What the workers have at stake, and the requester's tokens."""

    stakes: tuple[int, ...]
    requester: int


@dataclass
class Played:
    result: Result
    before: Purses
    after: Purses


@dataclass
class Hamlet:
    """Three staked workers on one chain; each scenario has fresh processes, as far as one process can have them.

    roles: of the three workers. off: kinds that the watchtower does not judge.
    """

    devnet: Devnet
    model: Path
    folder: Path

    def settle_in(self) -> None:
        weights = Weights.open(self.model)
        profile = Profile.load(self.model, weights.shape)
        self.village = Village(self.devnet, self.folder, self.model, STAGES, self._build, profile)
        self.village.settle_in()

    def play(
        self,
        scenario: Scenario,
        roles: tuple[Role, ...],
        home: Path,
        off: frozenset[Kind] = NOTHING,
        requests: tuple[Request, ...] = REQUESTS,
    ) -> Played:
        """home: an empty folder."""
        self.scenario, self.roles, self.home, self.off, self.requests = scenario, roles, home, off, requests
        self._first_block = self.village.requester.block_number() + 1
        self.village.configs = [
            replace(config, data=home / f"data{index}", chain=replace(config.chain, start_block=self._first_block))
            for index, config in enumerate(self.village.configs)
        ]
        return asyncio.run(self._story())

    def _build(self, index: int, config: WorkerConfig) -> Agent:
        role = self.roles[index]
        return build_worker(config, stage_class=role.stage, responder_class=role.responder, settler_class=role.settler)

    def _watch(self, account: int, kind: type[Watchtower]) -> Watch:
        judge = Judge(self.model)
        judge.auditor = BlindAuditor(judge.auditor, self.off)
        judge.screener = BlindAuditor(judge.screener, self.off)
        data = self.home / f"watch{account}"
        data.mkdir()
        chain = self.village.chain(dev_account(account))
        chain.token.mint(chain.account, STAKE)
        here = self._first_block
        config = Config("http://unused", data, data, data, (self.model,), data, poll_seconds=0.05, from_block=here)
        return Watch(kind(config, chain, {judge.id: judge}, Store(config.database_url)))

    async def _story(self) -> Played:
        started = time.monotonic()
        await self.village.wake()
        kinds = [(WATCHTOWER, Watchtower), *([(ACCUSER, FalseAccuser)] if self.scenario.accused else [])]
        watches = [await asyncio.to_thread(self._watch, *who) for who in kinds]
        try:
            before = await asyncio.to_thread(self._purses)
            job = await self.village.open(self.requests)
            story = await self._follow(job, watches)
            ratio = watches[0].ratio(job)
        finally:
            for watch in watches:
                await asyncio.to_thread(watch.stop)
            await self.village.sleep()
        result = Result(self.scenario, outcome(story), ratio, {}, [], time.monotonic() - started)
        return Played(result, before, await asyncio.to_thread(self._purses))

    def _purses(self) -> Purses:
        chain: Chain = self.village.requester
        accounts = [dev_account(1 + index).address for index in range(STAGES)]
        stakes = [chain.workers.free_stake(account) + chain.workers.locked_stake(account) for account in accounts]
        return Purses(tuple(stakes), chain.token.balance(chain.account) + chain.escrow.credit(chain.account))

    async def _follow(self, job: bytes, watches: Sequence[Watch]) -> list[Event]:
        """The job's events, once it is over. Moves the clock on where nothing but time is missing."""
        story: list[Event] = []
        quiet_since = last_block = time.monotonic()
        end = quiet_since + SCENARIO_SECONDS
        while time.monotonic() < end:
            news = events_of(
                list(await asyncio.to_thread(lambda: list(self.village.requester.events(self._first_block)))), job
            )
            if len(news) > len(story):
                story, quiet_since = news, time.monotonic()
            if is_final(story):
                break
            seconds = self._waiting_for(job, story, watches, time.monotonic() - quiet_since)
            if seconds:
                await asyncio.to_thread(self.devnet.pass_seconds, seconds)
                quiet_since = time.monotonic()
            if time.monotonic() - max(quiet_since, last_block) > BLOCK_SECONDS:
                # A chain has blocks without transactions, and a challenge needs one after its commitment.
                await asyncio.to_thread(self.devnet.mine)
                last_block = time.monotonic()
            await asyncio.sleep(0.1)
        return story

    def _waiting_for(self, job: bytes, story: Sequence[Event], watches: Sequence[Watch], quiet_seconds: float) -> int:
        """Seconds that the chain's clock may jump; 0 where somebody is at work."""
        told = {type(event) for event in story}
        if JobCommitted not in told:
            others_committed = sum(isinstance(event, StageCommitted) for event in story) == STAGES - 1
            mute = self.scenario.role == "mute" and JobAccepted in told and others_committed
            return SERVING_SECONDS if mute and quiet_seconds > 0.2 else 0
        games = {event.id: event.game for event in story if isinstance(event, GameMoved)}
        for event in story:
            if isinstance(event, GameEnded):
                games.pop(event.id, None)
        if games:
            # Only who is not going to move: a false accuser at the end of its lies, a worker that plays dead.
            dead = any(issubclass(role.responder, SilentResponder) for role in self.roles)
            stuck = all(dead if game.worker_turn else self.scenario.accused for game in games.values())
            return 2 * CLOCK_SECONDS if stuck and quiet_seconds > PATIENCE_SECONDS else 0
        over = all(watch.done_with(job) for watch in watches)
        return WINDOW_SECONDS + 5 if over and quiet_seconds > 0.2 else 0


def line_of(scenario: Scenario) -> tuple[Role, ...]:
    """The roles of the three workers."""
    return tuple(ROLES[scenario.role if stage == scenario.stage else "honest"] for stage in range(STAGES))
