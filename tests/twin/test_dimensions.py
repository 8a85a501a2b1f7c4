"""Models in which nothing divides: odd widths, an odd vocabulary, heads that lie across leaves and tiles.

Whole games on a real EVM. At every class of element of every instruction - the padding of heads' rows, and of a last
leaf, tile or chunk that is short - a worker that lies there is convicted, and one that a liar accuses there is not.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest

from bench._arena import NOBODY
from bench._docket import CHALLENGED
from bench._liar import Depth, Liar, Lie, classes, every_lie
from bench._market import BROKEN, LONG_AT, LONG_OUTPUT, POSITION, STOP, Batch, serve
from contracts.client import ChainError
from tests.twin.stand import MANNERS, Mute, Stand, assert_at, opened, told
from verifier.canonical import Case
from verifier.commit import Output
from verifier.game import Segment
from verifier.program import Kind

# By head size. Blocks, tiles and chunks have 256, 32 and 256, 128 or 8 elements; one, two or few are left at the end.
SHAPES: dict[int, dict[str, Any]] = {
    64: {"hidden_size": 257, "intermediate_size": 511, "vocab_size": 301},
    80: {"hidden_size": 301, "intermediate_size": 513, "vocab_size": 385},
    96: {"hidden_size": 513, "intermediate_size": 257, "vocab_size": 303, "num_attention_heads": 3},
    128: {"hidden_size": 255, "intermediate_size": 771, "vocab_size": 383, "num_attention_heads": 5},
}
KEY_HEADS = {64: 2, 80: 2, 96: 1, 128: 5}
SHORT_AT, SHORT_LAST = 0, 2  # the other request, and its last position: tiles of v that are 3 positions tall
EDGES = {"first", "last", "border"}


@dataclass(frozen=True)
class Odd:
    """A stand with one of these models."""

    head_dim: int
    stand: Stand

    def piece(self, kind: Kind, guilty: bool) -> tuple[Batch, Segment, Case]:
        """The last head or block; for a token whichever competitor is found."""
        if kind in (Kind.TOKEN, Kind.SAMPLE):
            return self.stand.piece(kind, guilty)
        return self.at(self.stand.batches[guilty, False], kind, POSITION, LONG_AT)

    def at(self, batch: Batch, kind: Kind, position: int, request: int) -> tuple[Batch, Segment, Case]:
        unit = batch.weights.program.units[kind] - 1
        segment = batch.segment(kind, 0, 0, position, unit, request)
        return batch, segment, batch.case(segment)


@pytest.fixture(scope="module", params=SHAPES, ids=lambda head_dim: f"heads of {head_dim}")
def odd(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Odd]:
    head_dim = request.param
    changes = SHAPES[head_dim] | {"head_dim": head_dim, "num_key_value_heads": KEY_HEADS[head_dim]}
    with opened(tmp_path_factory.mktemp("model"), **changes) as made:
        yield Odd(head_dim, made)


def judge(odd: Odd, piece: tuple[Batch, Segment, Case], guilty: bool, lie: Lie, number: int) -> None:
    segment, truth = piece[1:]
    assert truth.verdict() == guilty
    liar = Liar(truth, [told(number, lie)], wrong=not guilty)
    end = odd.stand.play(piece, guilty, liar, MANNERS[number % len(MANNERS)])
    assert end.convicted == (segment.stage if guilty else NOBODY), (segment, lie)
    assert_at(end, lie, truth)


@pytest.mark.parametrize("kind", CHALLENGED, ids=lambda kind: kind.name)
def test_lies_about_what_does_not_divide_are_found_out(odd: Odd, kind: Kind) -> None:
    """Half of the lies with each head size, half of these by the worker: over all four, each by both."""
    pieces = {guilty: odd.piece(kind, guilty) for guilty in (True, False)}
    lies = [lie for lie in every_lie(pieces[True][2]) if lie.depth == Depth.CHUNK]
    assert {lie.step for lie in lies} == set(range(len(pieces[True][2].instructions)))
    turn = list(SHAPES).index(odd.head_dim)
    for number, lie in list(enumerate(lies))[turn % 2 :: 2]:
        guilty = (number // 2 + turn // 2) % 2 == 0
        judge(odd, pieces[guilty], guilty, lie, number)


@pytest.mark.parametrize("kind", [Kind.V, Kind.ATTEND], ids=lambda kind: kind.name)
def test_so_are_lies_over_tiles_that_are_cut_off(odd: Odd, kind: Kind) -> None:
    batches = {guilty: odd.stand.batches[guilty, False] for guilty in (True, False)}
    pieces = {guilty: odd.at(batches[guilty], kind, SHORT_LAST, SHORT_AT) for guilty in batches}
    lies = [lie for lie in every_lie(pieces[True][2]) if lie.depth == Depth.CHUNK]
    for number, lie in enumerate(lies[::3]):
        judge(odd, pieces[number % 2 == 0], number % 2 == 0, lie, number)


def test_padding_is_among_what_is_lied_about(odd: Odd) -> None:
    """SCORE and EXP pad a head's row of positions to whole chunks, with zeros."""
    truth = odd.piece(Kind.ATTEND, guilty=True)[2]
    for step in (0, 2):
        told_of, values = classes(truth, step), truth.vector(step)
        for name in ("before padding", "padding", "last padding"):
            assert name in told_of
        assert values[told_of["padding"][0]] == values[told_of["last padding"][0]] == values[-1] == 0
        assert told_of["last"][0] == len(values) - 1


def test_the_last_word_of_the_vocabulary_competes_and_none_behind_it(odd: Odd) -> None:
    vocabulary = odd.stand.market.weights.shape.vocabulary
    for guilty in (True, False):
        batch, segment, truth = odd.stand.piece(Kind.TOKEN, guilty)
        last = replace(segment, unit=vocabulary - 1)
        case = batch.case(last, truth.token)
        wrong = case.verdict()
        liar = Liar(case, [], wrong=not wrong)
        end = odd.stand.play((batch, last, case), wrong, liar)
        assert end.convicted == (segment.stage if wrong else NOBODY)

        behind, evidence = replace(segment, unit=vocabulary), batch.evidence(segment)
        with pytest.raises(ChainError, match="WrongSegment"):
            odd.stand.arena.challenge(behind, batch.model, evidence, b"".join(truth.steps()))


@pytest.mark.parametrize("edge", sorted(EDGES))
def test_a_bit_at_the_edge_of_an_odd_row_convicts(odd: Odd, edge: str) -> None:
    """EMBED within a prompt, LINK within a stage; the same of an honest worker is refused."""
    market, stand = odd.stand.market, odd.stand
    hidden = market.weights.shape.hidden
    column = {"first": 0, "last": hidden - 1, "border": (hidden - 1) // 256 * 256}[edge]
    changes = {(LONG_AT, "0.h"): (3, column), (LONG_AT, "out"): (POSITION, column)}
    batch, right = market.batch(True, serve(market.weights, changes=changes)), stand.batches[True, False]
    for kind, stage, layer, position in ((Kind.EMBED, 0, 0, 3), (Kind.LINK, 1, 1, POSITION)):
        segment = batch.segment(kind, stage, layer, position, column if kind == Kind.LINK else column // 256)
        honest = replace(segment, job=right.job)
        stand.arena.prepare(honest, right.model, right.premises(honest))
        stand.arena.prepare(segment, batch.model, batch.premises(segment))
        stand.arena.refused("NotWrong", stand.arena.show, honest, right.model, right.shown(honest))
        end = stand.arena.play(
            stand.arena.show(segment, batch.model, batch.shown(segment)), Mute(), Mute(), (True, False)
        )
        assert end.convicted == stage, (kind, column)
        beyond = replace(honest, unit=hidden if kind == Kind.LINK else batch.weights.shape.blocks)
        stand.arena.refused("WrongSegment", stand.arena.show, beyond, right.model, right.shown(honest))


def test_a_token_is_of_the_vocabulary_up_to_its_last_word(odd: Odd) -> None:
    market, arena = odd.stand.market, odd.stand.arena
    vocabulary = market.weights.shape.vocabulary
    place = BROKEN["beyond the vocabulary"][1]
    for token in (vocabulary, vocabulary - 1):
        served = serve(market.weights, outputs=(Output(0, 2, 1, (token, STOP)), LONG_OUTPUT))
        batch = market.batch(True, served)
        segment = batch.segment(Kind.STOP, 1, 0, 0, place, SHORT_AT)
        if token == vocabulary:
            end = arena.play(arena.show(segment, batch.model, batch.shown(segment)), Mute(), Mute(), (True, False))
            assert end.convicted == 1
        else:
            arena.refused("NotWrong", arena.show, segment, batch.model, batch.shown(segment))
