"""Exact segments on a real EVM: what is shown convicts the accused, or the sender whose signed hand-off explains it.

The truth cannot be shown wrong.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import pytest

from bench._court import CLOCK_SECONDS
from bench._market import (
    BROKEN,
    CHALLENGER,
    LONG,
    LONG_AT,
    LONG_OUTPUT,
    LONG_TOKENS,
    NO_TOKEN,
    SHORT_TOKENS,
    STOP,
    STRANGER,
    WORKERS,
    Batch,
    Market,
    serve,
    write_model,
)
from contracts.client import Chain, ChainError, Status, challenge_id
from contracts.events import GameEnded, GameMoved
from deploy.deployment import deploy
from deploy.devnet import Devnet
from deploy.keys import dev_account
from verifier.commit import HandoffTree, Output
from verifier.game import Game, HandoffProof, Segment
from verifier.program import Kind
from verifier.referee.codec import Opening, handoff_row, handoff_token
from verifier.weights import Weights

E = TypeVar("E", GameMoved, GameEnded)
SHOWN, DEFLECTED, FLAGGED = 3, 4, 2
FED_AT = 595  # a position of the long request that embeds an output token
FED_PLACE = FED_AT - len(LONG.prompt)


@dataclass
class Table:
    devnet: Devnet
    market: Market
    right: Batch
    salt: int = 0

    def show(self, batch: Batch, segment: Segment, evidence: Sequence[Opening]) -> bytes:
        chain = self.market.chain(CHALLENGER)
        self.salt += 1
        salt = self.salt.to_bytes(32, "big")
        chain.disputes.commit(challenge_id(chain.account, segment, salt))
        self.devnet.mine()  # a node estimates gas as of its latest block, and the opening needs a later one
        premises = batch.premises(segment)
        if premises:
            chain.disputes.prepare(segment, batch.model, premises)
        return chain.disputes.show(segment, salt, batch.model, evidence)

    def refused(self, error: str, segment: Segment, evidence: Sequence[Opening]) -> None:
        with pytest.raises(ChainError, match=error):
            self.show(self.right, segment, evidence)

    def game(self, game_id: bytes) -> Game:
        return self._last(GameMoved, game_id).game

    def ended(self, game_id: bytes) -> tuple[int, int]:
        """Who was convicted, and why."""
        end = self._last(GameEnded, game_id)
        return end.convicted, end.reason

    def _last(self, kind: type[E], game_id: bytes) -> E:
        chain = self.market.chain(STRANGER)
        events = chain.events(max(0, chain.block_number() - 20))
        return [e for e in events if isinstance(e, kind) and e.id == game_id][-1]

    def worker(self, stage: int) -> Chain:
        return self.market.chain(WORKERS[stage])

    def proof(self, batch: Batch, stage: int, records: Sequence[bytes], index: int) -> HandoffProof:
        """A hand-off that `stage` signed."""
        tree = HandoffTree(records)
        signature = self.market.chain(STRANGER).sign_handoff(
            batch.job, stage, tree.root, tree.leaves, self.market.signer(stage)
        )
        opening = tree.opening(index)
        return HandoffProof(tree.root, tree.leaves, index, records[index], opening.siblings, signature)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Table]:
    weights = Weights.open(write_model(tmp_path_factory.mktemp("model")), threads=1)
    with Devnet() as devnet:
        market = Market(devnet.url, deploy(devnet.url, dev_account(0), withdrawal_seconds=60), weights)
        market.settle_in()
        yield Table(devnet, market, market.batch(True, serve(weights)))


def test_embed_of_a_prompt_token_convicts_at_once(table: Table) -> None:
    batch = table.market.batch(True, serve(table.market.weights, changes={(LONG_AT, "0.h"): (130, 300)}))
    segment = batch.segment(Kind.EMBED, 0, 0, 130, 1)
    game_id = table.show(batch, segment, batch.shown(segment))
    assert table.ended(game_id) == (0, SHOWN)
    assert table.worker(0).escrow.status(batch.job) == Status.VOID
    table.refused("NotWrong", replace(segment, job=table.right.job), table.right.shown(segment))
    other = replace(segment, unit=0)
    with pytest.raises(ChainError, match="NotWrong"):
        table.show(batch, other, batch.shown(other))


def test_embed_of_an_output_token_falls_to_whoever_lied_about_it(table: Table) -> None:
    served = serve(table.market.weights, fed={FED_AT: 42})
    for deflects in (False, True):
        batch = table.market.batch(True, served)
        segment = batch.segment(Kind.EMBED, 0, 0, FED_AT, 0)
        game_id = table.show(batch, segment, batch.shown(segment))
        game, worker = table.game(game_id), table.worker(0)
        assert game.token == LONG_TOKENS[FED_PLACE] and game.index == FED_PLACE
        if not deflects:
            table.devnet.pass_seconds(CLOCK_SECONDS + 1)
            table.market.chain(STRANGER).disputes.flag(game_id, game)
            assert table.ended(game_id) == (0, FLAGGED)
            continue
        sent = [handoff_token(LONG_AT, i, token) for i, token in enumerate(LONG_TOKENS)]
        honest = table.proof(batch, 1, sent, FED_PLACE)
        refuse(worker, game_id, game, honest, "token")
        sent[FED_PLACE] = handoff_token(LONG_AT, FED_PLACE, 42)
        good = table.proof(batch, 1, sent, FED_PLACE)
        refuse(worker, game_id, game, table.proof(batch, 0, sent, FED_PLACE), "signature")
        refuse(worker, game_id, game, table.proof(batch, 1, [handoff_token(0, FED_PLACE, 42)], 0), "request")
        refuse(worker, game_id, game, table.proof(batch, 1, [handoff_token(LONG_AT, 1, 42)], 0), "position")
        refuse(worker, game_id, game, table.proof(batch, 1, [sent[FED_PLACE] + b"\0"], 0), "length")
        refuse(worker, game_id, game, replace(good, root=bytes(32)), "root")
        worker.disputes.deflect(game_id, game, good)
        assert table.ended(game_id) == (1, DEFLECTED)
        assert not worker.escrow.convicted(batch.job, 0)


def test_embed_does_not_judge_positions_that_no_token_is_fed_to(table: Table) -> None:
    batch = table.market.batch(True, serve(table.market.weights, extra_positions=(1, 0)))
    segment = batch.segment(Kind.EMBED, 0, 0, 3, 0, request=0)
    tokens = [batch.output(0), batch.output_token(1, 0)]
    evidence = [batch.node(0, 0), batch.request(0), *tokens, *batch.judged(segment, token=STOP)]
    with pytest.raises(ChainError, match=r"WrongSegment\(what=position"):
        table.show(batch, segment, evidence)


def refuse(worker: Chain, game_id: bytes, game: Game, proof: HandoffProof, what: str) -> None:
    with pytest.raises(ChainError, match=f"BadHandoff\\(what={what}"):
        worker.disputes.deflect(game_id, game, proof)


def test_link_within_a_stage_convicts_at_once(table: Table) -> None:
    batch = table.market.batch(True, serve(table.market.weights, changes={(LONG_AT, "out"): (7, 319)}))
    segment = batch.segment(Kind.LINK, 1, 1, 7, 319)
    game_id = table.show(batch, segment, batch.shown(segment))
    assert table.ended(game_id) == (1, SHOWN)
    assert table.game(game_id).challenger_moves == 2
    right = table.right.segment(Kind.LINK, 1, 1, 7, 319)
    table.refused("NotWrong", right, table.right.shown(right))
    other = replace(segment, unit=318)
    with pytest.raises(ChainError, match="NotWrong"):
        table.show(batch, other, batch.shown(other))


def test_a_link_is_prepared_by_anybody_and_truly(table: Table) -> None:
    """The first sum is another's business: what is taken for granted was computed from what the stage committed to."""
    batch, door = table.right, table.market.chain(STRANGER).disputes
    segment = batch.segment(Kind.LINK, 1, 1, 8, 3)
    premises = batch.premises(segment)
    with pytest.raises(ChainError, match="NotPrepared"):
        show_unprepared(table, segment)
    door.prepare(segment, batch.model, premises)
    door.prepare(segment, batch.model, premises)
    with pytest.raises(ChainError, match="NotWrong"):
        show_unprepared(table, segment)
    for other in (replace(segment, unit=4), replace(segment, position=9), replace(segment, layer=0)):
        with pytest.raises(ChainError, match="NotPrepared"):
            show_unprepared(table, other)
    node, h, attn_out = premises
    short = replace(attn_out, data=attn_out.data[:-2])
    for error, false in (
        ("RootMismatch", [node, attn_out, h]),
        ("RootMismatch", [node, h, replace(attn_out, data=attn_out.data[:-1] + b"x")]),
        ("RootMismatch", [batch.node(0), h, attn_out]),
        ("ProofLength", [node, h, replace(attn_out, siblings=attn_out.siblings[:-1])]),
        ("ProofLength", [node, h, replace(attn_out, siblings=(*attn_out.siblings, bytes(32)))]),
        ("RootMismatch", [node, h, short]),
        ("OpeningCount", [node, h]),
        ("OpeningCount", []),
    ):
        with pytest.raises(ChainError, match=error):
            door.prepare(segment, batch.model, false)
    for at, what in (
        (replace(segment, kind=int(Kind.EMBED)), "kind"),
        (replace(segment, unit=batch.weights.shape.hidden), "unit"),
        (replace(segment, position=4096), "position"),
        (replace(segment, layer=2), "layer"),
        (replace(segment, stage=0, layer=0), "stage"),
    ):
        nodes = [batch.node(at.stage), h, attn_out]
        with pytest.raises(ChainError, match=f"WrongSegment\\(what={what}"):
            door.prepare(at, batch.model, nodes)


def show_unprepared(table: Table, segment: Segment) -> None:
    """Shows a LINK from what anybody prepared, or nobody."""
    batch, chain = table.right, table.market.chain(CHALLENGER)
    table.salt += 1
    salt = table.salt.to_bytes(32, "big")
    chain.disputes.commit(challenge_id(chain.account, segment, salt))
    table.devnet.mine()
    chain.disputes.show(segment, salt, batch.model, batch.shown(segment))


def test_link_at_a_boundary_falls_to_whoever_lied_about_it(table: Table) -> None:
    served = serve(table.market.weights, changes={(LONG_AT, "1.h"): (9, 260)})
    for deflects in (False, True):
        batch = table.market.batch(True, served)
        segment = batch.segment(Kind.LINK, 1, 0, 9, 260)
        game_id = table.show(batch, segment, batch.shown(segment))
        game, worker = table.game(game_id), table.worker(1)
        if not deflects:
            table.devnet.pass_seconds(CLOCK_SECONDS + 1)
            table.market.chain(STRANGER).disputes.flag(game_id, game)
            assert table.ended(game_id) == (1, FLAGGED)
            continue
        block = served.traces[LONG_AT][1].block_leaf("1.h", 9, 1)
        others = (handoff_row(LONG_AT, 9, 0, b"x" * 512), handoff_row(0, 0, 0, block))
        records = [others[0], handoff_row(LONG_AT, 9, 1, block), others[1]]
        good = table.proof(batch, 0, records, 1)
        refuse(worker, game_id, game, table.proof(batch, 0, records, 0), "block")
        refuse(worker, game_id, game, table.proof(batch, 0, records, 2), "request")
        refuse(worker, game_id, game, table.proof(batch, 0, [handoff_row(LONG_AT, 9, 1, block[:-1])], 0), "values")
        refuse(worker, game_id, game, table.proof(batch, 1, records, 1), "signature")
        with pytest.raises(ChainError, match="NotYourTurn"):
            table.market.chain(CHALLENGER).disputes.deflect(game_id, game, good)
        worker.disputes.deflect(game_id, game, good)
        assert table.ended(game_id) == (0, DEFLECTED)
    # The sender is not accused of what the receiver holds.
    sender = table.right.segment(Kind.LINK, 0, 0, 9, 260)
    with pytest.raises(ChainError, match=r"WrongSegment\(what=stage"):
        table.market.chain(STRANGER).disputes.prepare(sender, table.right.model, table.right.premises(sender))


def test_length_falls_to_whoever_sent_or_made_up_the_position(table: Table) -> None:
    served = serve(table.market.weights, extra_positions=(0, 1))
    sent = served.traces[0][0].positions
    for deflects in (False, True):
        batch = table.market.batch(True, served)
        segment = batch.segment(Kind.LENGTH, 1, 0, sent, 0, request=0)
        game_id = table.show(batch, segment, [batch.node(1, 0), batch.node(0, 0)])
        game, worker = table.game(game_id), table.worker(1)
        if not deflects:
            table.devnet.pass_seconds(CLOCK_SECONDS + 1)
            table.market.chain(STRANGER).disputes.flag(game_id, game)
            assert table.ended(game_id) == (1, FLAGGED)
            continue
        refuse(worker, game_id, game, table.proof(batch, 0, [handoff_row(0, sent - 1, 0, bytes(512))], 0), "position")
        refuse(worker, game_id, game, table.proof(batch, 0, [handoff_token(0, sent, 0)], 0), "length")
        worker.disputes.deflect(game_id, game, table.proof(batch, 0, [handoff_row(0, sent, 0, bytes(512))], 0))
        assert table.ended(game_id) == (0, DEFLECTED)
    right = table.right.segment(Kind.LENGTH, 1, 0, sent, 0, request=0)
    table.refused("NotWrong", right, [table.right.node(1, 0), table.right.node(0, 0)])
    table.refused("WrongSegment", replace(right, position=sent + 1), [table.right.node(1, 0), table.right.node(0, 0)])


@pytest.mark.parametrize("name", BROKEN)
def test_stop_convicts(table: Table, name: str) -> None:
    output, unit = BROKEN[name]
    batch = table.market.batch(True, serve(table.market.weights, outputs=(output, LONG_OUTPUT)))
    segment = batch.segment(Kind.STOP, 1, 0, 0, unit, request=0)
    evidence = [batch.request(0), batch.output(0), batch.node(1, 0)]
    if unit != NO_TOKEN:
        with pytest.raises(ChainError, match="NotWrong"):
            table.show(batch, replace(segment, unit=NO_TOKEN), evidence)
        evidence.append(batch.output_token(unit, 0))
    assert table.ended(table.show(batch, segment, evidence)) == (1, SHOWN)


def test_stop_cannot_be_shown_of_a_right_output(table: Table) -> None:
    batch = table.right
    for request, tokens in enumerate((SHORT_TOKENS, LONG_TOKENS)):
        segment = batch.segment(Kind.STOP, 1, 0, 0, NO_TOKEN, request=request)
        evidence = [batch.request(request), batch.output(request), batch.node(1, request)]
        table.refused("NotWrong", segment, evidence)
        for place in range(len(tokens)):
            table.refused("NotWrong", replace(segment, unit=place), [*evidence, batch.output_token(place, request)])
        table.refused("WrongSegment", replace(segment, unit=len(tokens)), [*evidence, batch.output_token(0, request)])
        table.refused("OpeningCount", segment, evidence[:2])
        table.refused("WrongSegment", replace(segment, stage=0), evidence)


@pytest.mark.parametrize(
    ("outputs", "request_"),
    [
        ((Output(1, 2, 1, SHORT_TOKENS), Output(3, 11, 2, LONG_TOKENS)), 0),
        ((Output(0, 2, 1, SHORT_TOKENS), Output(5, 11, 2, LONG_TOKENS)), 0),
    ],
    ids=["first start", "gap"],
)
def test_bill_convicts(table: Table, outputs: tuple[Output, Output], request_: int) -> None:
    served = serve(table.market.weights, outputs=outputs)
    batch = table.market.batch(True, served)
    segment = batch.segment(Kind.BILL, 1, 0, 0, 0, request=request_)
    assert table.ended(table.show(batch, segment, [batch.output(0), batch.output(1)])) == (1, SHOWN)


def test_bill_convicts_of_a_false_total_and_of_nothing_else(table: Table) -> None:
    batch = table.market.batch(True, replace(serve(table.market.weights), tokens=14))
    segment = batch.segment(Kind.BILL, 1, 0, 0, 0)
    assert table.ended(table.show(batch, segment, [batch.output(1)])) == (1, SHOWN)
    right = table.right
    table.refused("NotWrong", right.segment(Kind.BILL, 1, 0, 0, 0), [right.output(1)])
    table.refused("NotWrong", right.segment(Kind.BILL, 1, 0, 0, 0, request=0), [right.output(0), right.output(1)])
    table.refused("RootMismatch", right.segment(Kind.BILL, 1, 0, 0, 0), [right.output(0)])


def test_a_kind_is_shown_or_challenged_never_the_other(table: Table) -> None:
    table.refused("WrongSegment", table.right.segment(Kind.Q, 0, 0, 0, 0), [table.right.node(0)])
    table.refused("WrongSegment", replace(table.right.segment(Kind.Q, 0, 0, 0, 0), kind=11), [table.right.node(0)])
