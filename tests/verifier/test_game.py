"""The honest party wins, whichever side it is on and wherever the liar lies; and what the rules refuse."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from bench._liar import Bluffer, Liar, Lie, Solver, every_lie
from tests.verifier import tiny
from verifier.canonical import Case
from verifier.game import (
    WRONG,
    Game,
    Move,
    NothingWrong,
    Phase,
    Proof,
    level_above,
    may_flag,
    next_level,
    opening_steps,
    quoted,
    read_roots,
    remaining_seconds,
    solve,
    sum_range,
)
from verifier.keccak import keccak256
from verifier.linear import Bits
from verifier.program import Kind
from verifier.referee.codec import Request, slices
from verifier.rules import (
    ClaimMismatch,
    FlagFallen,
    MustDescend,
    MustProve,
    NotWrong,
    PickOutOfRange,
    RecordMismatch,
    SameRoot,
    VerdictNotWrong,
    WrongListLength,
    WrongModel,
    WrongPhase,
    apply,
    check_opening,
    decide,
)

torch.set_num_threads(1)
GRACE = 5
CHALLENGER, WORKER = "0xc0", "0x3e"


def opened(case: Case, steps: bytes, now: int = 100, seconds: int = 600) -> Game:
    """The state after `challenge`."""
    check_opening(steps, len(case.instructions))
    model, cell = case.model, case.cell
    return Game(
        segment=tiny.segment(Kind(case.segment.kind), cell.layer, cell.position, cell.unit),
        challenger=CHALLENGER,
        worker=WORKER,
        committed_at=now - 10,
        bond=1,
        gas_rate=1,
        grace=GRACE,
        model_id=keccak256(model.abi_words()),
        rule=model.program_root,
        program_leaves=model.program_leaves,
        token=cell.token,
        trace=cell.trace,
        sampling=cell.sampling,
        first_instruction=case.first_instruction,
        steps=keccak256(steps),
        phase=Phase.STEPS,
        step=0,
        level=0,
        index=0,
        first_chunk=0,
        end_chunk=0,
        list=bytes(32),
        worker_turn=True,
        turn_started=now,
        worker_seconds=seconds,
        challenger_seconds=seconds,
        worker_moves=0,
        challenger_moves=1,
    )


def play(worker: Case, challenger: Case) -> tuple[bool, int]:
    """Both sides by `solve`, each from its own case: (worker convicted, moves). Who has no move loses by its flag."""
    steps = b"".join(challenger.steps())
    game, posted, moves, now = opened(challenger, steps), steps, 1, 100
    while True:
        now += 1
        try:
            answer = solve(game, posted, worker if game.worker_turn else challenger, steps)
            moves += 1
            if isinstance(answer, Proof):
                return decide(game, answer, now), moves
            game, posted = apply(game, answer, now), answer.list
        except (NothingWrong, NotWrong, SameRoot):
            return game.worker_turn, moves


def most_moves(case: Case) -> int:
    """Opening, instruction, six levels of nodes a list, elements, 32-fold sums, proof."""
    deepest = max((case.leaves(i) - 1).bit_length() for i in range(len(case.instructions)))
    chunks = max(case.chunks(i) for i in range(len(case.instructions)))
    return 4 + -(-deepest // 6) + max(1, -(-(chunks - 1).bit_length() // 5))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tiny.Tiny:
    return tiny.make(tmp_path_factory.mktemp("model"), tiny.config(), positions=34)


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> tiny.Tiny:
    """600 positions: 48 leaves of scores, sums of 38 chunks. 2560 columns: sums of 10 chunks in LINEAR."""
    told = tiny.config(num_attention_heads=4, num_key_value_heads=1, head_dim=8, hidden_size=64, intermediate_size=2560)
    return tiny.make(tmp_path_factory.mktemp("long"), told, positions=600)


PLACES: list[tuple[Kind, dict[str, int]]] = [
    (Kind.Q, {"layer": 1, "position": 7, "unit": 3}),
    (Kind.K, {"layer": 0, "position": 17, "unit": 0}),
    (Kind.V, {"layer": 1, "position": 33, "unit": 1}),
    (Kind.ATTEND, {"layer": 1, "position": 33, "unit": 1}),
    (Kind.MLP, {"layer": 1, "position": 5, "unit": 1}),
    (Kind.TOKEN, {"layer": 1, "position": 4, "unit": 12}),
    (Kind.SAMPLE, {"layer": 1, "position": 4, "unit": 12}),
]
LONG_PLACES: list[tuple[Kind, dict[str, int]]] = [
    (Kind.ATTEND, {"layer": 1, "position": 599, "unit": 0}),
    (Kind.MLP, {"layer": 0, "position": 2, "unit": 0}),
]


def served_wrong(model: tiny.Tiny, kind: Kind, place: dict[str, Any]) -> Case:
    """The truth about a piece that the worker served wrong."""
    if kind == Kind.TOKEN:
        logits = {u: truth_logits(model, place, u) for u in range(3)}
        worst, best = min(logits, key=lambda u: logits[u]), max(logits, key=lambda u: logits[u])
        return model.case(kind, token=worst, **(place | {"unit": best}))
    if kind == Kind.SAMPLE:
        word = Request(0, 1, 1, 5, (), bytes(32), temperature=20000, top_k=30, top_p=65000).sampling()
        pairs = ((token, other) for token in range(9) for other in range(9) if token != other)
        cases = (model.case(kind, token=s, sampling=word, **(place | {"unit": u})) for s, u in pairs)
        return next(case for case in cases if case.verdict())
    name = {Kind.ATTEND: "attn_out", Kind.MLP: "mlp_out"}.get(kind, kind.name.lower())
    columns = 256 if kind in (Kind.ATTEND, Kind.MLP) else model.shape.head_dim

    def flipped(bits: Bits) -> Bits:
        bits[place["position"], columns * place["unit"] :][:columns] ^= model.shape.served_dtype.sign
        return bits

    return tiny.case_of(model, tiny.altered(model, f"{place['layer']}.{name}", flipped), kind, **place)


def truth_logits(model: tiny.Tiny, place: dict[str, int], u: int) -> int:
    return int(model.case(Kind.TOKEN, **(place | {"unit": u})).vector(3)[1])


def several(truth: Case, seed: int) -> list[Lie]:
    """Lies in up to four places at once."""
    generator, all_lies = np.random.default_rng(seed), list(every_lie(truth))
    chosen = generator.choice(len(all_lies), int(generator.integers(2, 5)), replace=False)
    return [replace(all_lies[k], delta=int(generator.choice([-1, 1, 1000, -(1 << 40)]))) for k in chosen]


def all_lies(truth: Case) -> list[list[Lie]]:
    """Every lie alone - each instruction, class of element and depth -, the bare verdict, and several at once."""
    return [[], *([lie] for lie in every_lie(truth)), *(several(truth, seed) for seed in range(20))]


@pytest.mark.parametrize(("kind", "place"), PLACES, ids=lambda value: getattr(value, "name", None))
def test_an_honest_worker_wins_against_every_liar(model: tiny.Tiny, kind: Kind, place: dict[str, int]) -> None:
    wrong = served_wrong(model, kind, place)
    right = {Kind.TOKEN: {"unit": wrong.token}, Kind.SAMPLE: {"unit": 8, "token": wrong.segment.unit}}.get(kind, {})
    fields = {"token": wrong.token, "sampling": wrong.sampling_word} | place | right
    assert_worker_wins(model.case(kind, **fields))


@pytest.mark.parametrize(("kind", "place"), PLACES, ids=lambda value: getattr(value, "name", None))
def test_an_honest_challenger_wins_against_every_liar(model: tiny.Tiny, kind: Kind, place: dict[str, int]) -> None:
    assert_challenger_wins(served_wrong(model, kind, place))


@pytest.mark.parametrize(("kind", "place"), LONG_PLACES, ids=lambda value: getattr(value, "name", None))
def test_honest_parties_win_where_lists_are_nested(long: tiny.Tiny, kind: Kind, place: dict[str, int]) -> None:
    assert_worker_wins(long.case(kind, **place))
    assert_challenger_wins(served_wrong(long, kind, place))


def assert_worker_wins(truth: Case) -> None:
    assert not truth.verdict()
    with pytest.raises(NothingWrong):
        opening_steps(truth)
    for lies in all_lies(truth):
        for follows in (False, True) if len(lies) > 1 else (False,):
            convicted, moves = play(truth, Liar(truth, lies, wrong=True, follows=follows))
            assert not convicted and moves <= most_moves(truth), lies


def assert_challenger_wins(truth: Case) -> None:
    assert opening_steps(truth) == b"".join(truth.steps())
    for lies in all_lies(truth):
        for follows in (False, True) if len(lies) > 1 else (False,):
            convicted, moves = play(Liar(truth, lies, wrong=False, follows=follows), truth)
            assert convicted and moves <= most_moves(truth), lies


@pytest.mark.parametrize("seed", range(12))
def test_garbage_loses_from_either_side(long: tiny.Tiny, seed: int) -> None:
    generator = np.random.default_rng(seed)
    kind, place = LONG_PLACES[seed % 2]
    for liar_works in (True, False):
        truth = served_wrong(long, kind, place) if liar_works else long.case(kind, **place)
        roots = [generator.bytes(32) if generator.integers(0, 3) == 0 else root for root in truth.steps()]
        steps = opening_steps(truth) if liar_works else b"".join([*roots[:-1], WRONG])
        game, posted, now = opened(truth, steps), steps, 100
        bluffer = Bluffer(truth, seed, always=True)
        while True:
            now += 1
            side = bluffer if game.worker_turn == liar_works else Solver(truth)
            answer = side.answer(game, posted, steps)
            if isinstance(answer, Proof):
                if side is bluffer:
                    with pytest.raises(NotWrong):
                        decide(game, answer, now)
                    break
                assert decide(game, answer, now) == liar_works
                break
            assert isinstance(answer, Move)
            game, posted = apply(game, answer, now), answer.list


def test_a_worker_who_admits_nothing_wrong_has_no_move(model: tiny.Tiny) -> None:
    wrong = served_wrong(model, Kind.Q, PLACES[0][1])
    steps = opening_steps(wrong)
    with pytest.raises(NothingWrong):
        solve(opened(wrong, steps), steps, wrong, steps)


# ---- what the rules refuse


def started(long: tiny.Tiny, step: int, wrong: bool = True) -> tuple[Game, Move, Case, bytes]:
    """A liar's game and the honest worker's first move; the lie is at `step`."""
    truth = long.case(Kind.ATTEND, layer=1, position=599, unit=0)
    liar = Liar(truth, [Lie(step, 3, 1, 5)], wrong, follows=True)
    steps = b"".join(liar.steps())
    game = opened(truth, steps)
    move = solve(game, steps, truth, steps)
    assert isinstance(move, Move)
    return game, move, liar, steps


def test_an_opening_must_end_in_the_constant(long: tiny.Tiny) -> None:
    steps = b"".join(long.case(Kind.Q, layer=0, position=0, unit=0).steps())
    with pytest.raises(VerdictNotWrong):
        check_opening(steps, 6)
    with pytest.raises(WrongListLength):
        check_opening(steps[:-32] + WRONG, 7)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"claim": bytes(256)}, ClaimMismatch),
        ({"pick": 8}, PickOutOfRange),
        ({"pick": 2}, RecordMismatch),
        ({"list": bytes(31)}, WrongListLength),
    ],
)
def test_a_false_first_move_is_refused(long: tiny.Tiny, changes: dict[str, Any], error: type[Exception]) -> None:
    game, move, _, _ = started(long, 0)
    with pytest.raises(error):
        apply(game, replace(move, **changes), 101)


def test_agreeing_with_what_is_disputed_is_refused(long: tiny.Tiny) -> None:
    game, move, liar, _ = started(long, 0)
    nodes = liar.tree(0).nodes(next_level(6, 6))
    with pytest.raises(SameRoot):
        apply(game, replace(move, list=nodes.tobytes()), 101)


def test_each_phase_asks_for_its_own_move(long: tiny.Tiny) -> None:
    truth = long.case(Kind.ATTEND, layer=1, position=599, unit=0)
    game, move, liar, steps = started(long, 4)
    proof = Proof(truth.model, move.record, 0, move.claim, (), (), ())
    with pytest.raises(WrongPhase):
        decide(game, proof, 101)
    game = apply(game, move, 101)
    while game.phase != Phase.ELEMENTS:
        side = truth if game.worker_turn else liar
        answer = solve(game, move.list, side, steps)
        assert isinstance(answer, Move)
        game, move = apply(game, answer, 102), answer
    roots = tuple(read_roots(truth.instructions[game.step], slices(steps, 32)))
    size = 16 if truth.instructions[game.step].wide else 8
    proof = Proof(truth.model, move.record, 3, *quoted(move.list, 3, size), roots, ())
    with pytest.raises(MustDescend):
        decide(game, proof, 102)
    with pytest.raises(WrongModel):
        decide(game, replace(proof, model=replace(truth.model, layers=3)), 102)
    with pytest.raises(RecordMismatch):
        decide(game, replace(proof, record=truth.record(5)), 102)
    with pytest.raises(ClaimMismatch):
        decide(game, replace(proof, steps=roots[:-1]), 102)


def test_one_step_must_be_proved_and_a_true_value_cannot_be(long: tiny.Tiny) -> None:
    truth = long.case(Kind.ATTEND, layer=1, position=599, unit=0)
    game, move, liar, steps = started(long, 1)  # MAX: one leaf, three chunks
    game = apply(game, move, 101)
    answer = solve(game, move.list, liar, steps)
    assert isinstance(answer, Move)
    game = apply(game, answer, 102)
    final = solve(game, answer.list, truth, steps)
    assert isinstance(final, Proof)
    with pytest.raises(MustProve):
        apply(game, Move(final.record, final.siblings, final.pick, final.claim, bytes(16)), 103)
    other = 1 - final.pick
    with pytest.raises(NotWrong):
        decide(game, replace(final, pick=other, openings=tuple(truth.openings(1, 3, other))), 103)
    assert not decide(game, final, 103)


# ---- lists and clocks


def test_lists_of_nodes_reach_the_leaves_in_few_even_steps() -> None:
    # by hand: depth 6 takes one list, 7 two of 4 and 3 levels, 10 two of 5, 11 of 6 and 5, 13 three of 5, 5 and 3
    expected = {1: [0], 6: [0], 7: [3, 0], 10: [5, 0], 11: [5, 0], 12: [6, 0], 13: [8, 3, 0], 14: [9, 4, 0]}
    for levels, lists in expected.items():
        level, seen = levels, []
        while level:
            below = next_level(levels, level)
            assert level_above(levels, below) == level
            seen.append(below)
            level = below
        assert seen == lists
    with pytest.raises(ValueError, match="stop at"):
        level_above(7, 5)


def test_sums_cover_powers_of_32() -> None:
    assert sum_range(0, 32, 31) == (31, 32)
    assert sum_range(0, 33, 1) == (32, 33)
    assert sum_range(32, 38, 2) == (34, 35)
    assert sum_range(0, 1025, 1) == (1024, 1025)


def test_a_clock_is_charged_and_never_below_grace(long: tiny.Tiny) -> None:
    game, move, _, _ = started(long, 0)
    game = replace(game, challenger_seconds=2)
    assert remaining_seconds(game, 700) == 0 and not may_flag(game, 700) and may_flag(game, 701)
    with pytest.raises(FlagFallen):
        apply(game, move, 701)
    moved = apply(game, move, 700)
    assert (moved.worker_seconds, moved.challenger_seconds, moved.turn_started) == (0, GRACE, 700)
    assert (moved.worker_moves, moved.challenger_moves, moved.worker_turn) == (1, 1, False)
