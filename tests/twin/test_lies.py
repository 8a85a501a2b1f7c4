"""Every lie at every depth, on a real EVM: each kind of segment, each instruction of its program, each class of
element.

A worker that lies exactly there, and consistently above it, is convicted; a challenger that lies there loses to one
that is right. A game counts only if its last state was at the place of the lie. Around the games, in turn, everybody
misbehaves: moves in the last second, repeated, out of order, copied, from strangers, into what is over.
"""

from collections.abc import Iterator
from dataclasses import replace

import pytest

from bench._arena import NOBODY, Silence
from bench._docket import CHALLENGED
from bench._liar import Depth, Liar, Lie, classes, depths, every_lie
from bench._market import LONG_AT, POSITION, serve
from tests.twin.stand import MANNERS, Mute, Stand, assert_at, opened, told
from verifier.program import Kind
from verifier.referee.codec import vector_leaf_elements

ELEMENTS = {"first", "last"}
BORDERS = {"leaf", "last leaf", "row", "last row", "group", "padding", "last padding"}
CHUNKS = {"first chunk", "before list", "list", "middle chunk", "last chunk"}
CLASSES = ELEMENTS | BORDERS | {f"before {name}" for name in BORDERS} | CHUNKS
EXACT = {Kind.EMBED, Kind.LINK}  # shown at once: there is no descent in which to lie
COLUMNS = (0, 255, 256, 319)  # first, last, and both sides of the border of blocks


@pytest.fixture(scope="module")
def stand(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stand]:
    with opened(tmp_path_factory.mktemp("model")) as made:
        yield made


@pytest.mark.parametrize("guilty", [True, False], ids=["worker lies", "challenger lies"])
@pytest.mark.parametrize("kind", CHALLENGED, ids=lambda kind: kind.name)
def test_every_lie_at_every_depth_is_found_out(stand: Stand, kind: Kind, guilty: bool) -> None:
    piece = stand.piece(kind, guilty)
    segment, truth = piece[1:]
    found = set[tuple[int, int, int, Depth]]()
    for number, lie in enumerate(every_lie(truth)):
        liar, manners = Liar(truth, [told(number, lie)], wrong=not guilty), MANNERS[number % len(MANNERS)]
        end = stand.play(piece, guilty, liar, manners)
        assert end.convicted == (segment.stage if guilty else NOBODY), (lie, manners)
        assert_at(end, lie, truth)
        found.add((lie.step, lie.element, lie.chunk, lie.depth))
    for step in range(len(truth.instructions)):
        for name, (element, chunk) in classes(truth, step).items():
            assert (step, element, chunk, Depth.CHUNK) in found, (step, name)
        assert {depth for i, *_, depth in found if i == step} == set(depths(truth, step)), step


def test_no_kind_instruction_or_class_is_left_out(stand: Stand) -> None:
    programs = stand.market.weights.program.segments
    assert set(programs) | {Kind.LINK} == set(CHALLENGED) | EXACT
    assert len(programs[Kind.EMBED]) == 1
    named = set[str]()
    for kind in CHALLENGED:
        _, segment, truth = stand.piece(kind, guilty=True)
        assert segment.kind == kind and len(truth.instructions) == len(programs[kind])
        for step in range(len(truth.instructions)):
            has = classes(truth, step)
            n, chunks = len(truth.vector(step)), truth.chunks(step)
            assert has["first"][0] == 0 and has["last"][0] == n - 1
            assert n <= vector_leaf_elements(bool(truth.instructions[step].wide)) or {"before leaf", "leaf"} <= set(has)
            assert chunks == 1 or {"first chunk", "last chunk"} <= set(has)
            named |= set(has)
    assert named == CLASSES


@pytest.mark.parametrize("guilty", [True, False], ids=["worker is right", "challenger is right"])
@pytest.mark.parametrize("kind", CHALLENGED, ids=lambda kind: kind.name)
def test_who_is_right_but_silent_at_any_move_loses(stand: Stand, kind: Kind, guilty: bool) -> None:
    """And whoever lies and is silent loses too: silence is never better than a move."""
    guilty = not guilty
    piece = stand.piece(kind, guilty)
    truth = piece[2]
    deepest = max(range(len(truth.instructions)), key=lambda i: (truth.chunks(i), truth.leaves(i)))
    element, chunk = classes(truth, deepest)["last"]
    liar = Liar(truth, [Lie(deepest, element, chunk, -1)], wrong=not guilty)
    for worker in (True, False):
        came = 0
        for from_move in range(1, 8):
            end = stand.play(piece, guilty, liar, MANNERS[from_move], Silence(worker, from_move), True)
            if end.silenced:
                came += 1
                assert end.convicted == (piece[1].stage if worker else NOBODY), (worker, from_move)
            else:
                assert end.convicted == (piece[1].stage if guilty else NOBODY), (worker, from_move)
        assert came >= 1


@pytest.mark.parametrize("column", COLUMNS)
def test_a_bit_at_any_class_of_an_exact_row_convicts_at_once(stand: Stand, column: int) -> None:
    """In an embedding, in a link within a stage and, where no signed hand-off explains it, at a boundary."""
    market = stand.market
    changes = {(LONG_AT, "0.h"): (3, column), (LONG_AT, "1.h"): (300, column), (LONG_AT, "out"): (POSITION, column)}
    served = serve(market.weights, changes=changes)
    batch, right = market.batch(True, served), stand.batches[True, False]
    places = ((Kind.EMBED, 0, 0, 3), (Kind.LINK, 1, 0, 300), (Kind.LINK, 1, 1, POSITION))
    for kind, stage, layer, position in places:
        segment = batch.segment(kind, stage, layer, position, column if kind == Kind.LINK else column // 256)
        honest = replace(segment, job=right.job)
        stand.arena.prepare(honest, right.model, right.premises(honest))
        stand.arena.prepare(segment, batch.model, batch.premises(segment))
        stand.arena.refused("NotWrong", stand.arena.show, honest, right.model, right.shown(honest))
        id = stand.arena.show(segment, batch.model, batch.shown(segment))
        end = stand.arena.play(id, Mute(), Mute(), (True, False))
        assert end.convicted == stage, (kind, layer)
    stand.arena.put_back()
