"""From the roots alone to the wrong piece: bisection over layers and positions, without a chain."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from bench._place import answer
from bench._town import Hall, Served, facts, serve
from challenger.inquiry import PROBES, Inquiry, Step
from challenger.judge import Judge
from challenger.posted import Posted
from tests.challenger.cheats import at, coarse, made
from tests.verifier import tiny
from verifier.commit import Request
from verifier.demand import Demand, Wanted, grid_of
from verifier.program import Kind
from verifier.tolerance import uniform_profile

LAYERS = 8
REQUESTS = (Request((5, 6, 7, 8, 9), 4), Request((1, 2), 2))


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Judge]:
    folder: Path = tmp_path_factory.mktemp("model")
    weights = tiny.make_weights(folder, tiny.config(num_hidden_layers=LAYERS))
    uniform_profile(weights.shape, 3, 1000, 1 << 14, 1 << 20).save(folder)
    yield Judge(folder)


def inquire(judge: Judge, served: Served, r: int = 0) -> tuple[Step, list[tuple[Demand, ...]]]:
    """What an inquiry finds of a job of which nothing is served, and its rounds of demands."""
    with Hall() as hall:
        job = facts(judge.weights, served, hall)
    posted = Posted(job, judge.weights.shape, judge.model, None)
    inquiry = Inquiry(posted, judge, b"seed")
    rounds: list[tuple[Demand, ...]] = []
    while True:
        step = inquiry.step(r)
        if not step.demands:
            return step, rounds
        rounds.append(step.demands)
        assert len(rounds) < 30
        for demand in step.demands:
            stage = job.stages[demand.stage]
            grid_of(demand, judge.model, stage.first_layer, stage.end_layer)  # the contract would take it
            posted.feed(demand, answer(served, demand, judge.model))


def test_an_honest_job_is_cleared_by_its_rows_and_some_probes(judge: Judge) -> None:
    step, rounds = inquire(judge, serve(judge.weights, requests=REQUESTS, make=made(lambda *given: given[2])))
    assert step == Step()
    assert len(rounds) <= 2 + 2 * PROBES + 1
    kinds = {demand.kind for asked in rounds for demand in asked}
    assert kinds == {Wanted.PROMPT, Wanted.OUTPUT, Wanted.TENSORS, Wanted.LEAVES}


@pytest.mark.parametrize("layer", [0, 3, 4, LAYERS - 1])
@pytest.mark.parametrize(
    ("name", "kind"), [("q", Kind.Q), ("attn_out", Kind.ATTEND), ("mlp_out", Kind.MLP), ("next", Kind.LINK)]
)
def test_one_altered_row_at_the_last_position_is_found(judge: Judge, layer: int, name: str, kind: Kind) -> None:
    position = 7
    columns = 16 if name == "q" else 256
    served = serve(judge.weights, requests=REQUESTS, make=made(at(layer, name, position, columns=columns)))
    step, rounds = inquire(judge, served)
    (verdict,) = step.wrong
    if name == "q":
        assert (verdict.kind, verdict.layer, verdict.position, verdict.unit) == (Kind.Q, layer, position, 0)
    else:
        assert (verdict.kind, verdict.layer, verdict.position) == (kind, layer, position)
    half = LAYERS // 2
    owner = (layer + 1 if kind is Kind.LINK and layer + 1 < LAYERS else layer) // half
    assert verdict.stage == owner
    # Records, two rounds down to a layer of eight, its rows; attention asks for all k and v besides.
    assert len(rounds) <= 6


@pytest.mark.parametrize(("name", "kind"), [("k", Kind.K), ("v", Kind.V)])
def test_a_lie_about_the_past_is_followed_to_its_position(judge: Judge, name: str, kind: Kind) -> None:
    served = serve(judge.weights, requests=REQUESTS, make=made(at(3, name, 1, change=0x4080, columns=32)))
    step, rounds = inquire(judge, served)
    (verdict,) = step.wrong
    assert (verdict.kind, verdict.layer, verdict.position, verdict.stage) == (kind, 3, 1, 0)
    assert len(rounds) <= 9


def test_a_false_embedding_is_found(judge: Judge) -> None:
    step, _ = inquire(judge, serve(judge.weights, requests=REQUESTS, make=made(at(-1, "h", 7))))
    (verdict,) = step.wrong
    assert (verdict.kind, verdict.stage, verdict.position, verdict.token) == (Kind.EMBED, 0, 7, verdict.token)


def test_a_token_that_the_model_did_not_choose_needs_one_row(judge: Judge) -> None:
    honest = serve(judge.weights, requests=REQUESTS)
    first = honest.outputs[0]
    other = (first.tokens[3] + 1) % 300
    lied = replace(first, tokens=(*first.tokens[:3], other))
    step, rounds = inquire(judge, replace(honest, outputs=(lied, *honest.outputs[1:])))
    (verdict,) = step.wrong
    assert (verdict.kind, verdict.position, verdict.token, verdict.unit) == (Kind.TOKEN, 7, other, first.tokens[3])
    assert len(rounds) == 2


def test_coarse_weights_everywhere_are_found_wherever_one_looks(judge: Judge) -> None:
    served = serve(judge.weights, requests=REQUESTS, make=made(coarse(range(LAYERS))))
    step, rounds = inquire(judge, served)
    (verdict,) = step.wrong
    assert verdict.kind in (Kind.MLP, Kind.Q, Kind.K, Kind.V)
    assert len(rounds) <= 6


def test_a_wrong_bill_is_seen_between_neighbours(judge: Judge) -> None:
    honest = serve(judge.weights, requests=REQUESTS)
    first, second = honest.outputs
    step, rounds = inquire(judge, replace(honest, outputs=(first, replace(second, start=3))), r=1)
    assert step.wrong[0].kind == Kind.BILL and len(rounds) == 1  # the total, at the last request
    step, rounds = inquire(judge, replace(honest, outputs=(replace(first, start=1), second)))
    (verdict,) = step.wrong
    assert (verdict.kind, verdict.request, verdict.stage) == (Kind.BILL, 0, 1) and len(rounds) == 1


def test_records_that_break_the_law_need_no_rows(judge: Judge) -> None:
    honest = serve(judge.weights, requests=REQUESTS)
    step, rounds = inquire(judge, replace(honest, outputs=(replace(honest.outputs[0], code=1), *honest.outputs[1:])))
    (verdict,) = step.wrong
    assert (verdict.kind, verdict.stage) == (Kind.STOP, 1)
    assert len(rounds) == 1
