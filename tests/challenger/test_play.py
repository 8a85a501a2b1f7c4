"""Players against the contract's twin, without a chain: who tells the truth wins, and nothing is sent twice."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

import pytest

from bench._liar import Liar, Lie
from contracts.client import Chain, ChainError
from contracts.events import Event, GameEnded, GameMoved
from contracts.play import NOBODY, Followed, GameLog, Player
from tests.verifier import tiny
from verifier.canonical import Case
from verifier.game import Game, Move, Phase, Proof, may_flag, opening_steps
from verifier.keccak import keccak256
from verifier.program import Kind
from verifier.rules import RuleError, apply, check_opening, decide

ID, JOB = b"\x01" * 32, b"\x02" * 32
CLOCK_SECONDS, GRACE_SECONDS = 100, 10


class Rules:
    """`Disputes`, as far as one game goes, by verifier.rules; it is its own chain."""

    def __init__(self, case: Case, steps: bytes) -> None:
        check_opening(steps, len(case.instructions))
        self.disputes, self.now, self.events = self, 1000, cast(list[Event], [])
        self.game = opened(case, steps, self.now)
        self.ended: GameEnded | None = None
        self._tell(steps)

    def posted(self, moved: GameMoved) -> bytes:
        return moved.list

    def descend(self, id: bytes, game: Game, move: Move) -> None:
        self._same(game)
        try:
            self.game = apply(self.game, move, self.now)
        except RuleError as error:
            raise ChainError(type(error).__name__, {}) from error
        self._tell(move.list)

    def prove(self, id: bytes, game: Game, proof: Proof) -> None:
        self._same(game)
        try:
            convicted = decide(game, proof, self.now)
        except RuleError as error:
            raise ChainError(type(error).__name__, {}) from error
        self._end(0 if convicted else NOBODY, 1)

    def flag(self, id: bytes, game: Game) -> None:
        self._same(game)
        if not may_flag(game, self.now):
            raise ChainError("FlagNotFallen", {})
        self._end(0 if game.worker_turn else NOBODY, 2)

    def _same(self, game: Game) -> None:
        if game != self.game or self.ended:
            raise ChainError("WrongState", {})

    def _end(self, convicted: int, reason: int) -> None:
        place = {"contract": "Disputes", "block": len(self.events), "log_index": 0, "transaction": bytes(32)}
        self.ended = GameEnded(id=ID, job=JOB, stage=0, convicted=convicted, reason=reason, **cast(Any, place))
        self.events.append(self.ended)

    def _tell(self, posted: bytes) -> None:
        where = {"contract": "Disputes", "block": len(self.events), "log_index": 0, "transaction": bytes(32)}
        self.events.append(
            GameMoved(id=ID, job=JOB, mover="", game=self.game, list=posted, place=0, **cast(Any, where))
        )


def opened(case: Case, steps: bytes, now: int) -> Game:
    """The state after `challenge`."""
    zero: dict[str, Any] = dict.fromkeys(
        ("step", "level", "index", "first_chunk", "end_chunk", "worker_moves", "committed_at", "bond", "gas_rate"), 0
    )
    return Game(
        segment=tiny.segment(Kind.MLP, case.cell.layer, case.cell.position, case.cell.unit),
        challenger="0x" + "11" * 20,
        worker="0x" + "22" * 20,
        model_id=keccak256(case.model.abi_words()),
        rule=case.model.program_root,
        program_leaves=case.model.program_leaves,
        token=case.cell.token,
        trace=case.cell.trace,
        sampling=case.cell.sampling,
        first_instruction=case.first_instruction,
        steps=keccak256(steps),
        phase=Phase.STEPS,
        list=bytes(32),
        worker_turn=True,
        turn_started=now,
        worker_seconds=CLOCK_SECONDS,
        challenger_seconds=CLOCK_SECONDS,
        challenger_moves=1,
        grace=GRACE_SECONDS,
        **zero,
    )


@pytest.fixture(scope="module")
def innocent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    yield tiny.make(tmp_path_factory.mktemp("model"), tiny.config(), positions=5).case(
        Kind.MLP, layer=1, position=3, unit=0
    )


@pytest.fixture(scope="module")
def guilty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    made = tiny.make(tmp_path_factory.mktemp("model"), tiny.config(), positions=5)
    trace = tiny.altered(made, "1.mlp_out", lambda bits: bits ^ 0x80)
    yield tiny.case_of(made, trace, Kind.MLP, layer=1, position=3, unit=0)


def players(rules: Rules, worker: Case, challenger: Case) -> list[Player]:
    chain = cast(Chain, rules)
    return [Player(chain, lambda game: worker, True), Player(chain, lambda game: challenger, False)]


def settle(rules: Rules, sides: list[Player], silent: Player | None = None) -> GameEnded:
    """Both sides step in turn, seeing every event several times over."""
    log = GameLog()
    for _ in range(80):
        log.feed(rules.events)
        for side in sides:
            followed = log.games.get(ID)
            if followed is None:
                assert rules.ended is not None and log.ended[ID] == rules.ended
                return rules.ended
            if side is not silent:
                try:
                    side.step(followed, rules.now)
                except ChainError as error:
                    assert error.name == "NotWrong"  # a liar's last move
        rules.now += 7
    raise AssertionError("expected the game to end")


@pytest.mark.parametrize("step", range(9))
def test_a_liar_that_accuses_loses(innocent: Case, step: int) -> None:
    liar = Liar(innocent, [Lie(step, delta=1 << 12)], wrong=True, follows=True)
    rules = Rules(innocent, b"".join(liar.steps()))
    assert settle(rules, players(rules, innocent, liar)).convicted == NOBODY


@pytest.mark.parametrize("step", range(9))
def test_a_liar_that_denies_loses(guilty: Case, step: int) -> None:
    rules = Rules(guilty, opening_steps(guilty))
    liar = Liar(guilty, [Lie(step, delta=1 << 12)], wrong=False, follows=True)
    assert settle(rules, players(rules, liar, guilty)).convicted == 0


def test_silence_is_flagged_from_both_sides(innocent: Case, guilty: Case) -> None:
    rules = Rules(guilty, opening_steps(guilty))
    sides = players(rules, guilty, guilty)
    ended = settle(rules, sides, silent=sides[0])
    assert (ended.convicted, ended.reason) == (0, 2)
    liar = Liar(innocent, [Lie(3, delta=1 << 12)], wrong=True, follows=True)
    rules = Rules(innocent, b"".join(liar.steps()))
    sides = players(rules, innocent, liar)
    ended = settle(rules, sides, silent=sides[1])
    assert (ended.convicted, ended.reason) == (NOBODY, 2)


def test_a_stale_state_is_no_fault(guilty: Case) -> None:
    rules = Rules(guilty, opening_steps(guilty))
    worker, _ = players(rules, Liar(guilty, [Lie(7, delta=1 << 12)], wrong=False, follows=True), guilty)
    log = GameLog()
    log.feed(rules.events)
    followed = log.games[ID]
    assert worker.step(followed, rules.now)
    assert not worker.step(followed, rules.now)  # WrongState: sent before
    assert len(rules.events) == 2


def test_who_has_no_answer_computes_it_once_and_who_is_late_sends_nothing(guilty: Case) -> None:
    rules = Rules(guilty, opening_steps(guilty))
    asked: list[Game] = []

    def case_of(game: Game) -> Case:
        asked.append(game)
        return guilty

    log = GameLog()
    log.feed(rules.events)
    worker = Player(cast(Chain, rules), case_of, side_is_worker=True)
    assert not worker.step(log.games[ID], rules.now) and not worker.step(log.games[ID], rules.now)
    assert len(asked) == 1
    late = Player(cast(Chain, rules), case_of, side_is_worker=True)
    assert not late.step(log.games[ID], rules.now + CLOCK_SECONDS + 1)
    assert len(asked) == 1


def test_to_a_list_that_the_state_does_not_remember_nothing_is_sent(guilty: Case) -> None:
    liar = Liar(guilty, [Lie(4, delta=1 << 12)], wrong=False, follows=True)
    rules = Rules(guilty, opening_steps(guilty))
    told = rules.posted
    phases = set()
    while (followed := followed_by(rules)) is not None:
        phases.add(followed.game.phase)
        side = players(rules, liar, guilty)[not followed.game.worker_turn]
        for false in (told(followed.last)[:-1] + b"\x11", told(followed.last)[:-1], b""):
            rules.posted = lambda moved, false=false: false  # type: ignore[method-assign, misc]
            with pytest.raises(ValueError, match="expected the list of the game's last move"):
                side.answer(followed)
        rules.posted = told  # type: ignore[method-assign]
        try:
            side.step(followed, rules.now)
        except ChainError:
            break  # the liar's last move
    assert phases == {Phase.STEPS, Phase.NODES, Phase.ELEMENTS, Phase.SUMS}


def test_without_the_games_first_list_nothing_is_proved(guilty: Case) -> None:
    liar = Liar(guilty, [Lie(3, delta=1 << 12)], wrong=False, follows=True)
    rules = Rules(guilty, opening_steps(guilty))
    while (followed := followed_by(rules)) is not None:
        missed = replace(followed, first=followed.last)
        side = players(rules, liar, guilty)[not followed.game.worker_turn]
        try:
            answer = side.answer(missed)
        except ValueError as error:
            assert "its first event was missed" in str(error) and len(rules.events) > 1
            return
        assert isinstance(answer, Move)
        rules.descend(ID, followed.game, answer)
    raise AssertionError("expected a proof to be due")


def followed_by(rules: Rules) -> Followed | None:
    log = GameLog()
    log.feed(rules.events)
    return log.games.get(ID)


def test_who_has_no_signed_hand_off_is_speechless(guilty: Case) -> None:
    rules = Rules(guilty, opening_steps(guilty))
    seen = cast(GameMoved, rules.events[0])
    shown = replace(seen, game=replace(rules.game, phase=Phase.HANDOFF))
    followed = Followed(ID, shown, shown)
    worker, _ = players(rules, guilty, guilty)
    assert not worker.is_speechless(followed)
    assert not worker.step(followed, rules.now) and worker.is_speechless(followed)
    worker.forget(ID)
    assert not worker.is_speechless(followed)


def test_a_reorganised_end_is_no_end(guilty: Case) -> None:
    rules = Rules(guilty, opening_steps(guilty))
    log = GameLog()
    log.feed(rules.events)
    rules.now += CLOCK_SECONDS + 1
    rules.flag(ID, rules.game)
    log.feed(rules.events)
    assert ID in log.ended and ID not in log.games
    log.feed(rules.events[:-1])
    assert ID in log.games and ID not in log.ended
    log.forget(ID)
    assert not log.games and not log.ended


def test_an_end_without_a_move_is_kept() -> None:
    place: Any = {"contract": "Disputes", "block": 1, "log_index": 0, "transaction": bytes(32)}
    log, end = GameLog(), GameEnded(id=ID, job=JOB, stage=1, convicted=1, reason=3, **place)
    log.feed([end])
    assert log.ended == {ID: end}
