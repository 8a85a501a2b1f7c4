"""What an attack costs whoever makes it against what it costs whoever is attacked, on the real contracts.

Each row is one attack, played to its end between a worker or a challenger that is right and somebody who wants it to
lose money or time. Everything is measured: gas by receipts, tokens by what each account holds anywhere before and
after. All amounts are in gas, tokens at the job's rate:
  gas      of the side's own transactions
  lost     gas and tokens; below 0: it ended richer
  locked   what it could not use meanwhile, its lock for the job apart
`seconds` is how long the attack kept the attacked from its money, of a job with the clock and grace that are told;
`ratio` what the attacker lost for each gas that the attacked spent (null: it spent nothing), `burned` what nobody has.
The model is small: its games take less gas than those of `plumb bench dispute`, a demand of 64 KB takes the same.
"""

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench._arena import NOBODY, Answer, Arena, Player, Silence
from bench._court import CLOCK_SECONDS, GRACE_SECONDS
from bench._docket import DRAWN
from bench._ledger import Ledger, Row, in_gas, joined
from bench._liar import Depth, Liar, Lie, Solver, places
from bench._market import (
    CHALLENGER,
    LONG_AT,
    POSITION,
    REQUESTER,
    REQUESTS,
    SHORT,
    WORKERS,
    Batch,
    Market,
    Served,
    serve,
    write_model,
)
from contracts.events import DemandOpened
from deploy.deployment import deploy
from deploy.devnet import Devnet
from deploy.keys import dev_account
from verifier.canonical import Case
from verifier.commit import HandoffTree
from verifier.demand import Demand, Demanded, Wanted, answer_trace
from verifier.game import Game, HandoffProof, Segment, remaining_seconds
from verifier.program import Kind
from verifier.referee.codec import Tensor, handoff_row
from verifier.referee.ops import Op
from verifier.weights import Weights

FUNDS = 10**30
ACCUSED = (Kind.Q, Kind.K, Kind.V, Kind.ATTEND, Kind.MLP, Kind.TOKEN, Kind.SAMPLE)
AT_ONCE = 12  # accusations: the bond doubles with every four
QUEUED = 4  # demands of 64 KB
FULL_LEAVES = 128  # of 512 bytes: 64 KB. Rows of q are one such leaf each


def run(kinds: str = "") -> dict[str, Any]:
    """kinds: of the accused segments, separated by commas; all by default. Returns {"results": one row an attack, ..}.

    Raises ValueError for a segment that is none of these.
    """
    names = [kind.name for kind in ACCUSED]
    if unknown := set(wanted := kinds.split(",") if kinds else names) - set(names):
        raise ValueError(f"expected one of {', '.join(names)}, got {', '.join(sorted(unknown))}")
    chosen = [Kind[name] for name in wanted]
    with tempfile.TemporaryDirectory() as folder, Devnet() as devnet:
        weights = Weights.open(write_model(Path(folder)), threads=1)
        market = Market(devnet.url, deploy(devnet.url, dev_account(0), withdrawal_seconds=60), weights)
        market.settle_in()
        challenger = market.chain(CHALLENGER)
        challenger.disputes.deposit(FUNDS // 2)
        challenger.token.approve(market.addresses.demands, FUNDS)
        scene = Scene(devnet, market)
        rows = [row | {"ratio": _ratio(row)} for row in scene.attacks(chosen)]
        lock = challenger.escrow.job(scene.last_job).lock
        scene.close()
    terms = {"clock_seconds": CLOCK_SECONDS, "grace_seconds": GRACE_SECONDS, "lock": in_gas(lock)}
    return {"results": rows, "terms": terms}


class Scene:
    """A chain on which one attack is played after the other, each on a job of its own."""

    def __init__(self, devnet: Devnet, market: Market) -> None:
        self._devnet, self._market = devnet, market
        self._arena = Arena(devnet, market.addresses.disputes)
        self._ledger = Ledger(market, self._arena)
        self._served = serve(market.weights)
        self.last_job = bytes(32)

    def close(self) -> None:
        self._arena.close()

    def attacks(self, kinds: Sequence[Kind]) -> Iterator[Row]:
        for kind in kinds:
            yield self._accusation(kind)
        yield self._accusations_at_once()
        yield self._silent_challenger()
        yield from (self._silent_worker(at_once) for at_once in (True, False))
        yield from (self._demand(leaves) for leaves in (1, FULL_LEAVES))
        yield self._demands_at_once()
        yield self._demand_unanswered("silence of a worker that is asked for one leaf", (WORKERS[0],), (CHALLENGER,))
        yield self._self_challenge()
        everybody_else = (WORKERS[1], REQUESTER)
        yield self._demand_unanswered("self-conviction: by a friend's demand", (WORKERS[0], CHALLENGER), everybody_else)
        yield self._kept_busy()
        yield self._framed()

    # ---- accusations of who is right

    def _accusation(self, kind: Kind) -> Row:
        """The instruction about which the worker spends most; the challenger takes all its time."""
        batch, segment, case = self._piece(kind, guilty=False)
        rows = []
        for step in range(len(case.instructions)):
            mark = self._ledger.mark()
            id = self._challenge(batch, segment, liar := _liar(case, step, wrong=True))
            bond, opened = self._arena.seen(id).game.bond, self._now()
            end = self._arena.play(id, Dawdler(self._arena, Solver(liar)), Solver(case), (False, True))
            assert end.convicted == NOBODY
            name = f"false accusation: {kind.name} {Op(case.instructions[step].op).name}"
            rows.append(
                self._ledger.row(mark, name, (CHALLENGER,), (WORKERS[segment.stage],), self._now() - opened, bond)
            )
        return max(rows, key=lambda row: int(row["attacked"]["gas"]))

    def _accusations_at_once(self) -> Row:
        batch, segment, case = self._piece(Kind.MLP, guilty=False)
        liar, mark, opened = _liar(case, len(case.instructions) - 2, wrong=True), self._ledger.mark(), self._now()
        ids = [self._challenge(batch, segment, liar) for _ in range(AT_ONCE)]
        bonds = sum(self._arena.seen(id).game.bond for id in ids)
        for id in ids:
            end = self._arena.play(id, Solver(liar), Solver(case), (False, True))
            assert end.convicted == NOBODY
        name = f"{AT_ONCE} false accusations at once: MLP LINEAR"
        return self._ledger.row(mark, name, (CHALLENGER,), (WORKERS[segment.stage],), self._now() - opened, bonds)

    def _silent_challenger(self) -> Row:
        batch, segment, case = self._piece(Kind.MLP, guilty=False)
        mark = self._ledger.mark()
        id = self._challenge(batch, segment, liar := _liar(case, 0, wrong=True))
        bond, opened = self._arena.seen(id).game.bond, self._now()
        silence = Silence(worker=False, from_move=2)
        self._arena.play(id, Solver(liar), Solver(case), (False, True), silence=silence)
        name = "silence of a challenger, from its first move on"
        return self._ledger.row(mark, name, (CHALLENGER,), (WORKERS[segment.stage],), self._now() - opened, bond)

    # ---- workers that are wrong

    def _silent_worker(self, at_once: bool) -> Row:
        batch, segment, case = self._piece(Kind.MLP, guilty=True)
        mark = self._ledger.mark()
        id = self._challenge(batch, segment, case)
        bond, opened = self._arena.seen(id).game.bond, self._now()
        worker = Dawdler(self._arena, Solver(_liar(case, len(case.instructions) - 2, wrong=False)))
        silence = Silence(worker=True, from_move=1) if at_once else None
        end = self._arena.play(id, Solver(case), worker, (True, False), silence=silence)
        assert end.convicted == segment.stage
        seconds = self._now() - opened
        self._release(batch.job, CHALLENGER)
        name = "silence of a worker in a game, " + ("at once" if at_once else "after every move that it had")
        return self._ledger.row(mark, name, (WORKERS[segment.stage],), (CHALLENGER,), seconds, attacked_locked=bond)

    def _self_challenge(self) -> Row:
        batch, segment, case = self._piece(Kind.Q, guilty=True)
        mark = self._ledger.mark()
        id = self._challenge(batch, segment, case)
        bond, opened = self._arena.seen(id).game.bond, self._now()
        liar = _liar(case, len(case.instructions) - 1, wrong=False)
        assert self._arena.play(id, Solver(case), Solver(liar), (True, False)).convicted == segment.stage
        seconds = self._now() - opened
        self._release(batch.job, CHALLENGER)
        sides = (WORKERS[0], CHALLENGER), (WORKERS[1], REQUESTER)
        return self._ledger.row(mark, "self-conviction: by a friend's challenge", *sides, seconds, bond)

    # ---- accomplices

    def _kept_busy(self) -> Row:
        """A friend's games against a stage that cheats, so that a challenger's bond and the stage's clock grow."""
        batch, segment, case = self._piece(Kind.MLP, guilty=True)
        friend = _liar(case, 0, wrong=True)  # false at its first instruction, so it can be lost
        sides, mark = (CHALLENGER, WORKERS[0]), self._ledger.mark()
        ids = [self._challenge(batch, segment, friend) for _ in range(AT_ONCE)]
        bonds = sum(self._arena.seen(id).game.bond for id in ids)
        opened = self._ledger.row(mark, "", sides, ())

        mark = self._ledger.mark()
        real = self._challenge(batch, segment, case)
        game = self._arena.seen(real).game
        worker = Solver(_liar(case, len(case.instructions) - 1, wrong=False))
        assert self._arena.play(real, Solver(case), worker, (True, False)).convicted == segment.stage
        challenger = self._ledger.row(mark, "", (), (CHALLENGER,), attacked_locked=game.bond)

        mark, silence = self._ledger.mark(), Silence(worker=False, from_move=2)
        for id in ids:
            self._arena.play(id, Solver(friend), Solver(case), (False, False), silence=silence)
        name = f"{AT_ONCE} games of a friend's, to make a real one dear"
        ended = self._ledger.row(mark, name, sides, (), game.worker_seconds - CLOCK_SECONDS)
        return joined(opened, ended, in_gas(bonds)) | {"attacked": challenger["attacked"]}

    def _framed(self) -> Row:
        """A sender commits to another row than it handed on, and a friend accuses the receiver."""
        served = serve(self._market.weights, changes={(LONG_AT, "1.h"): (POSITION, 0)})
        batch = self._batch(guilty=True, served=served)
        segment = batch.segment(Kind.LINK, 1, 0, POSITION, 0)
        mark, opened = self._ledger.mark(), self._now()
        self._arena.prepare(segment, batch.model, batch.premises(segment))
        id = self._arena.show(segment, batch.model, batch.shown(segment))
        bond = self._arena.seen(id).game.bond
        row = handoff_row(LONG_AT, POSITION, 0, served.traces[LONG_AT][1].block_leaf("1.h", POSITION, 0))
        tree = HandoffTree([row])
        requester = self._market.chain(REQUESTER)
        signed = requester.sign_handoff(batch.job, 0, tree.root, tree.leaves, self._market.signer(0))
        shown = HandoffProof(tree.root, tree.leaves, 0, row, tree.opening(0).siblings, signed)
        end = self._arena.play(id, Shower(None), Shower(shown), (True, True))
        assert end.convicted == 0
        seconds = self._now() - opened
        self._release(batch.job, CHALLENGER)
        sides = (WORKERS[0], CHALLENGER), (WORKERS[1],)
        return self._ledger.row(mark, "a sender and a friend frame the receiver", *sides, seconds, bond)

    # ---- demands

    def _demand(self, leaves: int) -> Row:
        """In the window's last seconds, so that its answer prolongs it."""
        batch = self._batch(guilty=False)
        escrow = self._market.chain(CHALLENGER).escrow
        end = escrow.window_end(batch.job)
        self._wait_until(end - 60)
        mark = self._ledger.mark()
        held = self._asked(batch, 0, leaves)
        self._answer(batch, *held)
        size = "one leaf" if leaves == 1 else f"{leaves // 2} KB"
        seconds = escrow.window_end(batch.job) - end
        return self._ledger.row(mark, f"a demand for {size}", (CHALLENGER,), (WORKERS[0],), seconds)

    def _demands_at_once(self) -> Row:
        batch = self._batch(guilty=False)
        mark, door = self._ledger.mark(), self._market.chain(CHALLENGER).demands
        one_more = Demand(batch.job, 0, Wanted.LEAVES, 0, Tensor.Q, 0, 1)
        before = door.price_of(one_more, batch.model)
        held = [self._asked(batch, FULL_LEAVES * k, FULL_LEAVES) for k in range(QUEUED)]
        dearer = door.price_of(one_more, batch.model) // before
        opened = self._now()
        for each in held:
            self._answer(batch, *each)
        name = f"{QUEUED} demands for 64 KB at once: the next costs {dearer} times as much"
        return self._ledger.row(mark, name, (CHALLENGER,), (WORKERS[0],), self._now() - opened)

    def _demand_unanswered(self, name: str, attackers: Sequence[int], attacked: Sequence[int]) -> Row:
        batch = self._batch(guilty=True)
        mark = self._ledger.mark()
        id, demanded = self._asked(batch, 0, 1)
        self._wait_until(demanded.deadline + 1)
        self._market.chain(CHALLENGER).demands.lapse(id, demanded)
        seconds = self._now() - demanded.opened_at
        self._release(batch.job, CHALLENGER)
        return self._ledger.row(
            mark, name, attackers, attacked, seconds, attacked_locked=demanded.pay + demanded.burned
        )

    def _asked(self, batch: Batch, first: int, leaves: int) -> tuple[bytes, Demanded]:
        chain = self._market.chain(CHALLENGER)
        demand = Demand(batch.job, 0, Wanted.LEAVES, LONG_AT, Tensor.Q, first, leaves)
        id = chain.demands.demand(demand, batch.model, FUNDS)
        events = chain.events(chain.block_number())
        return id, next(event.demanded for event in events if isinstance(event, DemandOpened))

    def _answer(self, batch: Batch, id: bytes, demanded: Demanded) -> None:
        trace = batch.served.traces[LONG_AT][0]
        openings = answer_trace(demanded.demand, batch.node(0), trace, batch.model)
        self._market.chain(WORKERS[0]).demands.answer(id, demanded, batch.model, openings)

    # ---- jobs and pieces

    def _batch(self, guilty: bool, drawn: bool = False, served: Served | None = None) -> Batch:
        batch = self._market.batch(guilty, served or self._served, (SHORT, DRAWN[0]) if drawn else REQUESTS)
        self.last_job = batch.job
        return batch

    def _piece(self, kind: Kind, guilty: bool) -> tuple[Batch, Segment, Case]:
        """A job, a segment of it, and the truth about that."""
        batch = self._batch(guilty, drawn=kind == Kind.SAMPLE)
        return (batch, *batch.piece(kind, guilty))

    def _challenge(self, batch: Batch, segment: Segment, case: Case) -> bytes:
        return self._arena.challenge(segment, batch.model, batch.evidence(segment), b"".join(case.steps()))

    def _release(self, job: bytes, index: int) -> None:
        escrow = self._market.chain(index).escrow
        self._wait_until(escrow.window_end(job) + 1)
        escrow.release(job)

    # ---- time

    def _wait_until(self, timestamp: int) -> None:
        self._arena.at(timestamp)
        self._devnet.mine()

    def _now(self) -> int:
        return self._market.chain(CHALLENGER).block_timestamp()


class Dawdler:
    """Makes each move in its last second."""

    def __init__(self, arena: Arena, player: Player) -> None:
        self._arena, self._player = arena, player

    def answer(self, game: Game, posted: bytes, steps: bytes) -> Answer | None:
        answer = self._player.answer(game, posted, steps)
        if answer is not None:
            self._arena.at(game.turn_started + remaining_seconds(game, game.turn_started))
        return answer


class Shower:
    """Shows a hand-off, or nothing."""

    def __init__(self, proof: HandoffProof | None) -> None:
        self._proof = proof

    def answer(self, game: Game, posted: bytes, steps: bytes) -> Answer | None:
        return self._proof


def _liar(case: Case, step: int, wrong: bool) -> Liar:
    """One that lies about the last element and chunk of an instruction."""
    element, chunk = places(case, step)[-1]
    delta = -1 if case.instructions[step].op == Op.MAX else 1
    return Liar(case, [Lie(step, element, chunk, delta, Depth.CHUNK)], wrong)


def _ratio(row: Row) -> float | None:
    spent = row["attacked"]["gas"]
    return round(row["attacker"]["lost"] / spent, 2) if spent else None
