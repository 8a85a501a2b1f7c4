"""Whole games on a development node, quickly: one question a transaction, events from receipts, a second a block.

The referee of the games: it makes the moves that players ask for, plays copier, stranger and repeater around them, and
holds the contracts to what they must refuse. What it finds wrong is an `Unfair`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, Protocol, cast

from web3.types import TxReceipt

from bench._market import CHALLENGER, STRANGER, WORKERS
from bench._node import Node, Unlocked
from contracts.abi import decode_event, event_topics
from contracts.client import ChainError, challenge_id
from contracts.doors import DisputesDoor
from contracts.events import EVENTS, Credited, Event, GameEnded
from contracts.play import Followed, GameLog
from deploy.devnet import Devnet
from deploy.keys import dev_account
from verifier.game import Game, HandoffProof, Move, Phase, Proof, Segment, remaining_seconds
from verifier.referee.codec import Model, Opening

COPIER = 6
SIGNERS_FROM = 10  # a worker's signer is the development account so many behind its own
TRIES = 3  # of a party whose move is refused, before it gives up
NOBODY = 255
NAMELESS = {"OutOfGas", "Reverted", "Unknown", "Rpc", "Panic", "Error", "NoContract"}  # ways to fail without saying why

Answer = Move | Proof | HandoffProof


class Unfair(AssertionError):
    """The contracts took what they must refuse, refused what they must take, or said no reason."""


class Player(Protocol):
    """One side. Says None when it has nothing to say; opponents' lists are in `posted`."""

    def answer(self, game: Game, posted: bytes, steps: bytes) -> Answer | None: ...


@dataclass(frozen=True)
class Manners:
    """What happens around the moves of a game."""

    copied: bool = False  # the commitment is front-run, the challenge and every move sent by a copier too
    strange: bool = False  # a stranger makes the mover's move before it does
    disordered: bool = False  # who moves first sends a move of another phase, and its own last one
    repeated: bool = False  # every move is sent again, into the state it was for and into the one after it
    hasty: bool = False  # the flag is called before its time, in the last second or the one before
    last_second: bool = False  # every move is made in its last second
    late: bool = False  # who lets its time pass makes its move a second after
    settled: bool = False  # flags and moves go on when the game is over
    by_signer: bool = False  # the worker moves with its signing key

    @classmethod
    def drawn(cls, random: Random) -> "Manners":
        """Each fault in one game of six."""
        return cls(**{name: random.random() < 1 / 6 for name in cls.__dataclass_fields__})


@dataclass(frozen=True)
class Silence:
    """Who stops moving, and before which of the game's moves."""

    worker: bool
    from_move: int


@dataclass
class Ended:
    """How a game ended. moves: transactions that counted, behind the commitment; silenced: a `Silence` came to pass;

    last: the state that was proved wrong, deflected or left unanswered; None where a show ended it at once.
    """

    convicted: int
    reason: int
    moves: int
    silenced: bool = False
    last: Game | None = None


@dataclass
class _Live:
    """A game that is being played."""

    id: bytes
    players: tuple[Player, Player]  # challenger, worker
    honest: tuple[bool, bool]
    manners: Manners
    silence: Silence | None
    moves: int = 1
    silenced: bool = False
    tries: int = TRIES
    met: Game | None = None  # the state before the last call that counted
    last: tuple[int, Game, Answer] | None = None
    own: dict[bool, Answer] = field(default_factory=dict)  # the last answer of each side


class Arena:
    """Plays games about the jobs of one deployment. Challenger and workers must be funded, and a bond deposited."""

    def __init__(self, devnet: Devnet, disputes: str) -> None:
        """disputes: the contract's address."""
        self._node = Node(devnet.url)
        self._url, self._disputes = devnet.url, disputes
        self._doors: dict[int, DisputesDoor] = {}
        self._transports: dict[int, Unlocked] = {}
        self._topics = event_topics("Disputes")
        self._log, self._credited = GameLog(), dict[bytes, dict[str, int]]()
        self._salt, self._kept = 0, ""
        self._node.ask("anvil_setBlockTimestampInterval", 1)

    def close(self) -> None:
        self._node.close()

    def door(self, index: int) -> DisputesDoor:
        """Disputes, for development account `index`."""
        if index not in self._doors:
            self._doors[index] = DisputesDoor(self._transport(index), self._disputes)
        return self._doors[index]

    def _transport(self, index: int) -> Unlocked:
        if index not in self._transports:
            self._transports[index] = Unlocked(self._url, dev_account(index), self._node, self._heard)
        return self._transports[index]

    def keep(self) -> None:
        """Remembers the chain as it is, for `put_back`."""
        self._kept = self._node.ask("evm_snapshot")

    def put_back(self) -> None:
        """Makes the chain what it was at `keep`.

        Rationale: the node hashes its whole state for every block; thousands of games that ended would slow it down.
        """
        self._kept = self._node.put_back(self._kept)

    # ---- opening

    def commit(self, segment: Segment, copied: bool = False) -> bytes:
        """The challenger's commitment to a fresh salt, which is returned; copied: somebody sends it first."""
        self._salt += 1
        salt = self._salt.to_bytes(32, "big")
        id = challenge_id(dev_account(CHALLENGER).address, segment, salt)
        if copied:
            self.door(COPIER).commit(id)
            self.refused("CommitmentExists", self.door(CHALLENGER).commit, id)
        else:
            self.door(CHALLENGER).commit(id)
        return salt

    def challenge(
        self, segment: Segment, model: Model, evidence: Sequence[Opening], steps: bytes, manners: Manners = Manners()
    ) -> bytes:
        """Commits and opens a game. Returns its id; raises ChainError if the challenge is refused."""
        salt = self.commit(segment, manners.copied)
        if manners.copied:
            copy = (segment, salt, model, evidence, steps)
            self.refused("UnknownCommitment", self.door(COPIER).challenge, *copy)
        return self.door(CHALLENGER).challenge(segment, salt, model, evidence, steps)

    def prepare(self, segment: Segment, model: Model, premises: Sequence[Opening]) -> None:
        """What a LINK wants before it is shown. Raises ChainError if it is refused."""
        if premises:
            self.door(CHALLENGER).prepare(segment, model, premises)

    def show(self, segment: Segment, model: Model, evidence: Sequence[Opening], manners: Manners = Manners()) -> bytes:
        """Commits and shows. Returns the game's id; raises ChainError if what is shown is refused."""
        salt = self.commit(segment, manners.copied)
        if manners.copied:
            self.refused("UnknownCommitment", self.door(COPIER).show, segment, salt, model, evidence)
        return self.door(CHALLENGER).show(segment, salt, model, evidence)

    # ---- playing

    def play(
        self,
        id: bytes,
        challenger: Player,
        worker: Player,
        honest: tuple[bool, bool],
        manners: Manners = Manners(),
        silence: Silence | None = None,
    ) -> Ended:
        """To the end. honest: whether challenger and worker are: their moves must be taken. Raises Unfair."""
        live = _Live(id, (challenger, worker), honest, manners, silence)
        opened = self._log.games.get(id)
        while id in self._log.games:
            self._turn(live)
        end = self._log.ended[id]
        if opened is not None:
            self._check_money(opened.game, end, live)
        if manners.settled and live.last is not None:
            index, game, answer = live.last
            self.refused("WrongState", self._send, index, id, game, answer)
            self.refused("WrongState", self.door(STRANGER).flag, id, game)
        self._log.forget(id)
        return Ended(end.convicted, end.reason, live.moves, live.silenced, live.met)

    def _turn(self, live: _Live) -> None:
        seen, manners = self._log.games[live.id], live.manners
        game, works = seen.game, seen.game.worker_turn
        live.met = game
        index = self._account(game, manners)
        if live.last is not None and manners.repeated:
            before, state, answer = live.last
            self.refused("WrongState", self._send, before, live.id, state, answer)
            self.refused("NotYourTurn", self._send, before, live.id, game, answer)
        posted = self.door(STRANGER).posted
        answer_ = live.players[works].answer(game, posted(seen.last), posted(seen.first))
        silent = live.silence is not None and live.silence.worker == works and live.moves >= live.silence.from_move
        if answer_ is None or silent or live.tries == 0:
            live.silenced |= silent
            self._run_out(live, index, game, answer_)
            return
        self._around(live, index, game, answer_)
        deadline = _deadline(game)
        if manners.hasty and self.at(deadline - 1):
            self.refused("FlagNotFallen", self.door(STRANGER).flag, live.id, game)
        if manners.last_second:
            self.at(deadline)
        try:
            self._send(index, live.id, game, answer_)
        except ChainError as error:
            self._named(error)
            if live.honest[works]:
                raise Unfair(f"an honest move was refused: {error}") from error
            live.tries -= 1
            return
        live.moves += 1
        live.last = (index, game, answer_)
        live.own[works] = answer_

    def _around(self, live: _Live, mover: int, game: Game, answer: Answer) -> None:
        """Others make the mover's move before it does, and it makes others itself."""
        others = [STRANGER] * live.manners.strange + [COPIER] * live.manners.copied
        other = CHALLENGER if game.worker_turn else WORKERS[game.segment.stage]
        for index in [*others, *[other] * live.manners.strange]:
            self.refused("NotYourTurn", self._send, index, live.id, game, answer)
        # A block takes a second at least, and the move itself must still be in time.
        if live.manners.disordered and _deadline(game) - self._now() > 2:
            self.refused("WrongPhase", self._send, mover, live.id, game, _of_another_phase(game))
            if (earlier := live.own.get(game.worker_turn)) is not None:
                self.refused_by_name(self._send, mover, live.id, game, earlier)

    def _run_out(self, live: _Live, index: int, game: Game, answer: Answer | None) -> None:
        """The mover's time passes; anybody calls the flag."""
        deadline = _deadline(game)
        if live.manners.hasty and self.at(deadline):
            self.refused("FlagNotFallen", self.door(STRANGER).flag, live.id, game)
        self.at(deadline + 1)
        if live.manners.late and answer is not None:
            self.refused("FlagFallen", self._send, index, live.id, game, answer)
        other = CHALLENGER if game.worker_turn else WORKERS[game.segment.stage]
        self.door(STRANGER if live.manners.strange else other).flag(live.id, game)
        live.moves += 1

    def _send(self, index: int, id: bytes, game: Game, answer: Answer) -> None:
        door = self.door(index)
        match answer:
            case Move():
                door.descend(id, game, answer)
            case Proof():
                door.prove(id, game, answer)
            case HandoffProof():
                door.deflect(id, game, answer)

    def _account(self, game: Game, manners: Manners) -> int:
        if not game.worker_turn:
            return CHALLENGER
        return WORKERS[game.segment.stage] + SIGNERS_FROM * manners.by_signer

    def attempt(self, index: int, data: bytes) -> tuple[str, int]:
        """Sends a call's bytes to Disputes: the name of its refusal, "" if it was taken, and the gas that it cost."""
        transport = self._transport(index)
        try:
            transport.send_raw(self._disputes, data, "Disputes")
        except ChainError as error:
            return error.name, transport.receipts[-1].gas
        return "", transport.receipts[-1].gas

    def gas(self, index: int) -> int:
        """What development account `index` has spent here."""
        return sum(receipt.gas for receipt in self._transport(index).receipts)

    def seen(self, id: bytes) -> Followed:
        """A game in play."""
        return self._log.games[id]

    # ---- checking

    def refused(self, name: str, call: Callable[..., Any], *arguments: Any) -> None:
        """`call` of the arguments must be refused by that error. Raises Unfair."""
        try:
            call(*arguments)
        except ChainError as error:
            if error.name != name:
                raise Unfair(f"expected {name}, got {error}") from error
            return
        raise Unfair(f"expected {name}, and it was taken")

    def refused_by_name(self, call: Callable[..., Any], *arguments: Any) -> str:
        """`call` of the arguments must be refused for a reason that has a name, which is returned. Raises Unfair."""
        try:
            call(*arguments)
        except ChainError as error:
            return self._named(error)
        raise Unfair("expected a refusal, and it was taken")

    def _named(self, error: ChainError) -> str:
        if error.name in NAMELESS:
            raise Unfair(f"expected a named error, got {error}") from error
        return error.name

    def _check_money(self, game: Game, end: GameEnded, live: _Live) -> None:
        """The bond goes back whole to a challenger that won; else the worker's moves are paid from it, and no more."""
        least, account = (game.bond, game.challenger) if end.convicted != NOBODY else (1, game.worker)
        if not least <= (paid := self._credited.pop(live.id, {})).get(account, 0) <= game.bond or len(paid) != 1:
            raise Unfair(f"a bond of {game.bond} was paid out as {paid}")

    # ---- the node

    def _heard(self, receipt: TxReceipt) -> None:
        for place, log in enumerate(cast(list[dict[str, Any]], receipt["logs"])):
            topics = [bytes.fromhex(topic[2:]) for topic in log["topics"]]
            entry = self._topics.get(topics[0])
            if entry is None or log["address"].lower() != self._disputes.lower():
                continue
            where = {"contract": "Disputes", "block": receipt["blockNumber"], "log_index": place}
            where["transaction"] = bytes(receipt["transactionHash"])
            data = bytes.fromhex(log["data"][2:])
            event: Event = decode_event(entry, EVENTS[entry["name"]], topics, data, **where)
            self._log.feed([event])
            if isinstance(event, Credited):
                account = self._credited.setdefault(event.id, {})
                account[event.account] = account.get(event.account, 0) + event.amount

    def _now(self) -> int:
        """The last block's time, unix seconds."""
        return int(self._node.ask("eth_getBlockByNumber", "latest", False)["timestamp"], 16)

    def at(self, timestamp: int) -> bool:
        """Gives the next block that time, unix seconds; False if it is later already."""
        if self._now() >= timestamp:
            return False
        self._node.ask("evm_setNextBlockTimestamp", timestamp)
        return True


def _deadline(game: Game) -> int:
    """The last second in which the mover is in time."""
    return game.turn_started + remaining_seconds(game, game.turn_started)


def _of_another_phase(game: Game) -> Answer:
    if game.phase == Phase.HANDOFF:
        return Move(bytes(128), (), 0, bytes(32), bytes(32))
    return HandoffProof(bytes(32), 1, 0, bytes(44), (), bytes(65))
