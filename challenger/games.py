"""Playing this watchtower's games: each opened, answered and closed, the one with the least time left first."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from challenger.charge import Charge, charge, segment_of
from challenger.evidence import CorruptEvidence, Dossier, Unavailable
from challenger.judge import Judge
from challenger.plan import verdict_of
from challenger.store import LIVE, GameRow, GameState
from contracts.client import ChainUnreachable, ContractsError
from contracts.play import NOBODY, Player
from verifier.audit import Verdict
from verifier.canonical import Case
from verifier.game import Game, Segment, remaining_seconds
from verifier.program import Kind

if TYPE_CHECKING:
    from challenger.agent import Agent

log = logging.getLogger("plumb.challenger.games")

HANDS = 8  # games that are advanced at a time: each move waits for its block
LONGEST_REST_SECONDS = 10.0  # clocks are running
MEND_SECONDS = 60.0  # to download a corrupt file again while a game is open
CALM = 1 << 40  # the urgency of what has no clock
UNLIMITED = 2**256 - 1


class Games:
    """Part of an Agent, which lends it store, chain, judges and evidence."""

    def __init__(self, agent: Agent) -> None:
        self.agent = agent
        self.player = Player(agent.chain, self.case_of, side_is_worker=False)
        self.rests: dict[str, tuple[float, float]] = {}  # game -> (monotonic time to wait for, length)
        self._cases: dict[tuple[Segment, int], Case] = {}
        self._hands = ThreadPoolExecutor(HANDS, "game")
        self._funding = threading.Lock()

    def play(self, now: int) -> bool:
        """Takes every game of ours one step further. Returns whether anything was sent.

        Raises ChainUnreachable: nothing can be done for any of them.
        """
        rows = sorted(self.agent.store.games(*LIVE, GameState.WON), key=self.urgency)
        due = [row for row in rows if time.monotonic() >= self.rests.get(row.id, (0.0, 0.0))[0]]
        at_work: list[Future[bool]] = [self._hands.submit(self._one, row, now) for row in due]
        failures = [failure for future in at_work if (failure := future.exception()) is not None]
        if failures:
            raise failures[0]
        return any(future.result() for future in at_work)

    def urgency(self, row: GameRow) -> int:
        """Seconds that the side to move has left; a game to be opened comes before those, one that is won behind."""
        if row.state == GameState.WON:
            return CALM
        followed = self.agent.log.games.get(bytes.fromhex(row.id))
        return remaining_seconds(followed.game, followed.game.turn_started) if followed else 0

    def _one(self, row: GameRow, now: int) -> bool:
        try:
            acted = self.advance(row, now)
            self.rests.pop(row.id, None)
            return acted
        except ChainUnreachable:
            raise
        except CorruptEvidence as error:
            log.error("game %s: %s", row.id, error)
            self._mend(row, error)
        except (ContractsError, Unavailable) as error:
            log.error("game %s: %s", row.id, error)
        except Exception:  # one game's fault must not cost the others their clocks
            log.exception("game %s", row.id)
        self._rest(row)
        return False

    def advance(self, row: GameRow, now: int) -> bool:
        """One step of one game. Returns whether anything was sent."""
        id, agent = bytes.fromhex(row.id), self.agent
        if row.state == GameState.WON:
            return self.share_out(row, now)
        ended = agent.log.ended.get(id)
        if ended is not None:
            won = ended.convicted != NOBODY
            log.info("game %s: %s", row.id, "won" if won else "lost")
            self._over(row, GameState.WON if won else GameState.LOST, ended.block)
            agent.collect()
            return True
        followed = agent.log.games.get(id)
        if followed is None:
            return self.open(row, now)
        if row.state != GameState.OPEN:
            agent.store.mark(row.id, GameState.OPEN)
        return self.player.step(followed, now)

    def open(self, row: GameRow, now: int) -> bool:
        """Commits to a challenge, or opens it a block later. Returns whether anything was sent."""
        agent, id, disputes = self.agent, bytes.fromhex(row.id), self.agent.chain.disputes
        segment = segment_of(bytes.fromhex(row.job), verdict_of(row))
        if any(disputes.state_of(id)):
            return False  # open or over already; its event comes with the next read
        job = agent.store.job(row.job)
        if job is None or (now > job.window_end and now > agent.chain.escrow.window_end(segment.job)):
            self._drop(row, "the job's window was over")
            return False
        if not disputes.commitment_of(id):
            if agent.chain.escrow.convicted(segment.job, segment.stage):
                # Once committed it is opened all the same: the oldest commitment earns the stake.
                self._drop(row, "the stage was convicted by somebody else")
                return False
            agent.tolerant(lambda: disputes.commit(id), "CommitmentExists")
            agent.store.mark(row.id, GameState.COMMITTED)
            return True
        agent.archive.doubt(segment.job)  # SAFETY: a bond is put on it now
        prepared, model = agent.charge_of(row), agent.judge_of(row).model
        self.fund(segment)
        evidence, steps = prepared.evidence, prepared.steps
        if steps:
            return self._bonded(lambda: disputes.challenge(segment, row.salt, model, evidence, steps))
        if prepared.premises:
            # Only now: it tells everybody where to look, and our commitment must be the older one.
            agent.tolerant(lambda: disputes.prepare(segment, model, prepared.premises))
        return self._bonded(lambda: disputes.show(segment, row.salt, model, evidence))

    def share_out(self, row: GameRow, now: int) -> bool:
        """After the window, has the convicted stake shared out, unless somebody did, and draws our part."""
        agent, id = self.agent, bytes.fromhex(row.job)
        job = agent.store.job(row.job)
        if job is None or now <= job.window_end or now <= agent.chain.escrow.window_end(id):
            return False
        if not agent.release(id):
            self._rest(row)
            return False
        agent.store.mark(row.id, GameState.CLOSED)
        agent.collect()
        return True

    def charge_of(self, row: GameRow) -> Charge:
        """The challenge that was planned, built again from the job's data."""
        judge, verdict = self.agent.judge_of(row), verdict_of(row)
        evidence = self.agent.evidence(bytes.fromhex(row.job), judge)
        return charge(evidence, judge, verdict, lambda: self._case(judge, evidence, verdict))

    def case_of(self, game: Game) -> Case:
        """The truth about the piece that a game is over."""
        judge, place = self.agent.judges[game.model_id], game.segment
        at = (place.request, place.layer, place.position, place.unit)
        verdict = Verdict(0.0, place.stage, Kind(place.kind), *at, game.token)
        return self._case(judge, self.agent.evidence(place.job, judge), verdict)

    def fund(self, segment: Segment) -> None:
        """Lets Disputes draw the bond."""
        chain = self.agent.chain
        bond = chain.disputes.bond_for(segment.job, segment.stage)
        with self._funding:
            if chain.token.allowance(chain.account, chain.disputes.address) < bond:
                chain.token.approve(chain.disputes.address, UNLIMITED)

    def _bonded(self, send: Callable[[], object]) -> bool:
        """Sends what takes a bond, and returns whether it was taken.

        A bond that our credit in Disputes pays costs far less gas than one that is drawn. Where two count on the same
        credit, or it is withdrawn meanwhile, the gas of one runs out: with credit they go one after the other.
        """
        agent, harmless = self.agent, "CommitmentTooRecent"
        with agent.purse:
            if agent.chain.disputes.credit(agent.chain.account):
                return agent.tolerant(send, harmless)
        return agent.tolerant(send, harmless)

    def forget(self, job: bytes) -> None:
        self._cases = {key: case for key, case in self._cases.items() if key[0].job != job}

    def _case(self, judge: Judge, evidence: Dossier, verdict: Verdict) -> Case:
        """Kept while the job's games live: vectors are computed once."""
        key = (segment_of(evidence.id, verdict), verdict.token)
        if key not in self._cases:
            self._cases[key] = self.agent.case(judge, evidence, verdict)
        return self._cases[key]

    def _over(self, row: GameRow, state: GameState, block: int, note: str = "") -> None:
        """A game ended. Its job's data stay until its end lies deep enough in the chain (Agent.tidy)."""
        self.agent.store.mark(row.id, state, note, ended=block)
        self.agent.metrics.games.labels(state).inc()
        id = bytes.fromhex(row.id)
        self.agent.log.forget(id)
        self.player.forget(id)

    def _drop(self, row: GameRow, why: str) -> None:
        log.warning("game %s: not opened: %s", row.id, why)
        self._over(row, GameState.DROPPED, self.agent.reader.head, why)

    def _mend(self, row: GameRow, error: CorruptEvidence) -> None:
        """Before anything is at stake a job is audited anew; in a game what is corrupt is downloaded once more."""
        agent, job = self.agent, bytes.fromhex(row.job)
        agent.archive.remove(error.path)
        agent.forget_evidence(job)
        if row.state != GameState.OPEN and not any(agent.chain.disputes.state_of(bytes.fromhex(row.id))):
            agent.store.watch_again(row.job, str(error))
            return
        try:
            agent.download(job, agent.judge_of(row), MEND_SECONDS)
        except (Unavailable, ContractsError) as failure:
            log.error("game %s: cannot be played without it: %s", row.id, failure)

    def _rest(self, row: GameRow) -> None:
        _, before = self.rests.get(row.id, (0.0, 0.5))
        length = min(2 * before, LONGEST_REST_SECONDS)
        self.rests[row.id] = (time.monotonic() + length, length)
