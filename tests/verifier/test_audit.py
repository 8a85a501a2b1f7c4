"""Audits against the canonical verdict: honest runs pass, lies are found where they are, ratios agree with the law."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tests.verifier import tiny
from verifier.audit import NO_TOKEN, SUSPICION, Audit, Auditor, Stage, Verdict
from verifier.commit import LIMITED, STOPPED, Output, Request, TraceNode
from verifier.linear import Bits
from verifier.program import Kind
from verifier.record_rules import audit_bill, audit_length, audit_stop
from verifier.referee.codec import ProfileCell
from verifier.referee.floats import Dtype
from verifier.tolerance import Profile
from verifier.trace import RequestTrace

torch.set_num_threads(1)
POSITIONS, PROMPT = 12, 9


@pytest.fixture(scope="module", params=list(Dtype), ids=lambda dtype: dtype.name)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tiny.Tiny:
    return tiny.make(tmp_path_factory.mktemp(request.param.name), tiny.config(request.param), POSITIONS)


@pytest.fixture(scope="module")
def auditor(model: tiny.Tiny) -> Auditor:
    return Auditor(model.weights, model.profile)


def batch(model: tiny.Tiny, auditor: Auditor, trace: RequestTrace) -> tuple[Request, Output]:
    """The request and output that make the fed tokens, the last one sampled greedily."""
    probe = auditor.tokens(tiny.whole(trace), 0, PROMPT, [0] * (POSITIONS - PROMPT + 1))
    output = (*model.tokens[PROMPT:], probe[-1].unit)
    return Request(tuple(model.tokens[:PROMPT]), len(output)), Output(0, len(output), LIMITED, output)


def places(found: list[Verdict]) -> set[tuple[Kind, int, int, int]]:
    return {(verdict.kind, verdict.layer, verdict.position, verdict.unit) for verdict in found}


def test_an_honest_request_raises_no_suspicion_but_for_its_random_tokens(model: tiny.Tiny, auditor: Auditor) -> None:
    found = auditor.request([tiny.whole(model.trace)], 0, *batch(model, auditor, model.trace))
    # the tokens fed in are random, so all but the last are not what the model would have said
    assert {verdict.kind for verdict in found} == {Kind.TOKEN}
    assert {verdict.position for verdict in found} == set(range(PROMPT - 1, POSITIONS - 1))
    assert auditor.confirm(model.model, found[0], [tiny.whole(model.trace)])


def flip(position: int, column: int) -> Callable[[Bits], Bits]:
    def change(bits: Bits) -> Bits:
        bits[position, column] ^= 0x8000 if bits.dtype == np.uint16 else 0x80000000
        return bits

    return change


def scaled(position: int, first: int, end: int, dtype: Dtype) -> Callable[[Bits], Bits]:
    def change(bits: Bits) -> Bits:
        values = 1.2 * tiny.to_real(bits[position : position + 1, first:end], dtype)
        bits[position, first:end] = tiny.to_bits(values, dtype)
        return bits

    return change


@pytest.mark.parametrize(
    ("key", "columns", "kind", "unit"),
    [
        ("1.q", (16, 32), Kind.Q, 1),
        ("0.k", (16, 32), Kind.K, 1),
        ("1.v", (0, 16), Kind.V, 0),
        ("0.attn_out", (256, 320), Kind.ATTEND, 1),
        ("1.mlp_out", (0, 256), Kind.MLP, 0),
    ],
)
def test_a_lie_is_found_where_it_is(
    model: tiny.Tiny, auditor: Auditor, key: str, columns: tuple[int, int], kind: Kind, unit: int
) -> None:
    position, layer = 5, int(key[0])
    trace = tiny.altered(model, key, scaled(position, *columns, model.shape.served_dtype))
    audits = {audit.kind: audit for audit in auditor.layer(tiny.whole(trace), 0, layer)}
    worst = audits[kind].worst()
    assert (worst.position, worst.unit) == (position, unit) and worst.ratio > 1
    assert places(audits[kind].suspicions()) == {(kind, layer, position, unit)}
    assert auditor.confirm(model.model, worst, [tiny.whole(trace)])
    neighbour = replace(worst, position=position + 1)
    assert not auditor.confirm(model.model, neighbour, [tiny.whole(trace)])


def test_ratios_agree_with_the_law_to_a_millionth(model: tiny.Tiny) -> None:
    """The canonical verdict flips between a tolerance just below and just above what the ratio says."""
    dtype = model.shape.served_dtype
    trace = tiny.altered(model, "1.mlp_out", scaled(4, 0, 256, dtype))
    stage = tiny.whole(trace)
    by_kind = {a.kind: a for a in Auditor(model.weights, model.profile).layer(stage, 0, 1)}
    num, den, floor = model.profile.values(0)
    for kind, audit in by_kind.items():
        ratio = float(audit.ratios[4, 0])
        for factor, wrong in ((1 + 1e-4, False), (1 - 1e-4, True)):
            cell = ProfileCell(round(num / den * ratio * factor * 4e9), 4 * 10**9, floor)
            cells = (*[cell] * (model.profile.leaves - 1), model.profile.cells[-1])
            adjusted = Profile(model.shape, cells)
            case = tiny.case_of(replace(model, profile=adjusted), trace, kind, layer=1, position=4, unit=0)
            if dtype == Dtype.FLOAT32 and ratio < 0.01:
                continue  # honest float32 lies as close to the standard as the reference does
            assert case.verdict() == wrong, kind.name


@pytest.mark.parametrize(
    ("key", "kind", "layer"), [("0.h", Kind.EMBED, 0), ("1.h", Kind.LINK, 0), ("out", Kind.LINK, 1)]
)
def test_one_flipped_sign_breaks_an_exact_piece(
    model: tiny.Tiny, auditor: Auditor, key: str, kind: Kind, layer: int
) -> None:
    stage = tiny.whole(tiny.altered(model, key, flip(3, 300)))
    audit = auditor.embed(stage, 0, model.tokens) if kind == Kind.EMBED else auditor.link(stage, 0, layer)
    assert audit is not None
    (found,) = audit.suspicions()
    assert (found.position, found.unit) == (3, 300 if kind == Kind.LINK else 1)
    assert audit.worst() == found
    if kind == Kind.EMBED:
        assert auditor.confirm(model.model, replace(found, token=model.tokens[3]), [stage])


def test_a_boundary_accuses_the_receiver(model: tiny.Tiny, auditor: Auditor) -> None:
    shape, arrays = model.shape, model.trace.arrays
    received = flip(2, 9)(flip(2, 7)(np.array(arrays["1.h"])))
    first = RequestTrace(shape, 0, 1, {key: array for key, array in arrays.items() if key.startswith("0.")})
    rest = {key: array for key, array in arrays.items() if key[0] in "1o"}
    second = RequestTrace(shape, 1, 2, rest | {"1.h": received})
    stages = [Stage(0, first), Stage(1, second)]
    assert auditor.link(stages[0], 0, 0) is None
    audit = auditor.link(stages[0], 0, 0, stages[1])
    assert audit is not None and audit.stage == 1
    (found,) = audit.suspicions()
    assert (found.layer, found.position, found.unit) == (0, 2, 7)  # the first of its block


def test_what_is_no_number_is_infinitely_far(model: tiny.Tiny, auditor: Auditor) -> None:
    def spoiled(bits: Bits) -> Bits:
        bits[1, 7] = model.shape.served_dtype.nan
        return bits

    trace = tiny.altered(model, "0.q", spoiled)
    (audit,) = auditor.layer(tiny.whole(trace), 0, 0, [Kind.Q])
    assert audit.worst().ratio == float("inf") and places(audit.suspicions()) == {(Kind.Q, 0, 1, 0)}


@pytest.mark.parametrize("most", [1, 3, 50, 200])
def test_of_millions_of_suspicions_the_farthest_are_told(most: int) -> None:
    ratios = np.random.default_rng(0).permutation(np.linspace(0, 4, 100)).reshape(20, 5)
    ratios[7, 2] = np.inf
    audit = Audit(0, Kind.Q, 0, 0, ratios, first=10)
    every = audit.suspicions()
    assert len(every) == audit.suspicious == int((ratios > SUSPICION).sum())
    told = audit.suspicions(most)
    assert sorted(told, reverse=True) == sorted(every, reverse=True)[:most]
    assert told[0].position >= 10 and (17, 2) in {(v.position, v.unit) for v in told}


def test_a_token_is_held_against_its_strongest_competitor(model: tiny.Tiny, auditor: Auditor) -> None:
    stage = tiny.whole(model.trace)
    (honest,) = auditor.tokens(stage, 0, POSITIONS, [auditor.tokens(stage, 0, POSITIONS, [0])[0].unit])
    assert honest.ratio == 0 and honest.position == POSITIONS - 1 and honest.unit != honest.token
    (false,) = auditor.tokens(stage, 0, POSITIONS, [(honest.token + 1) % model.shape.vocabulary])
    assert false.unit == honest.token and false.suspicious
    assert auditor.confirm(model.model, false, [stage])
    assert not auditor.confirm(model.model, honest, [stage])


# ---- records

REQUEST = Request((1, 2, 3), 4, stops=(9,))


@pytest.mark.parametrize(
    ("changes", "unit"),
    [
        ({}, None),
        ({"count": 2, "tokens": (5, 9), "code": STOPPED}, None),
        ({"code": 3}, NO_TOKEN),
        ({"count": 0, "tokens": ()}, NO_TOKEN),
        ({"count": 5, "tokens": (5,) * 5}, NO_TOKEN),
        ({"count": 3, "tokens": (5,) * 3}, NO_TOKEN),
        ({"code": STOPPED}, 3),
        ({"tokens": (5, 9, 5, 5)}, 1),
        ({"tokens": (5, 5, 5, 9)}, 3),
        ({"tokens": (5, 300, 5, 5)}, 1),
        ({"tokens": (5, 5, 5)}, 0),
    ],
)
def test_stop(changes: dict[str, Any], unit: int | None) -> None:
    output = replace(Output(0, 4, LIMITED, (5, 5, 5, 5)), **changes)
    verdict = audit_stop(1, 7, REQUEST, output, 3 + output.count - 1, vocabulary=300)
    assert (verdict.unit if verdict else None) == unit
    assert verdict is None or (verdict.kind, verdict.request, verdict.stage) == (Kind.STOP, 7, 1)


def test_stop_counts_the_last_stages_positions() -> None:
    verdict = audit_stop(0, 0, REQUEST, Output(0, 4, LIMITED, (5, 5, 5, 5)), 7, vocabulary=300)
    assert verdict is not None and verdict.unit == NO_TOKEN


def test_bill() -> None:
    outputs = [Output(start, 2, LIMITED, (1, 1)) for start in (0, 2, 4)]
    assert audit_bill(1, outputs, 6) == []
    assert [verdict.request for verdict in audit_bill(1, outputs, 7)] == [2]
    assert [verdict.request for verdict in audit_bill(1, [replace(outputs[0], start=1), *outputs[1:]], 6)] == [0]
    assert [v.request for v in audit_bill(1, [outputs[0], replace(outputs[1], start=3), outputs[2]], 6)] == [0, 1]


def test_length() -> None:
    def nodes(*positions: int) -> list[TraceNode]:
        return [TraceNode(t, bytes(32)) for t in positions]

    assert audit_length([nodes(5, 6), nodes(5, 4)]) == []
    (found,) = audit_length([nodes(5, 6), nodes(5, 7), nodes(5, 7)])
    assert (found.kind, found.stage, found.request, found.position) == (Kind.LENGTH, 1, 1, 6)


def test_a_profile_of_another_shape_is_refused(model: tiny.Tiny) -> None:
    other = replace(model.shape, vocabulary=7)
    with pytest.raises(ValueError, match="expected a profile"):
        Auditor(model.weights, Profile(other, model.profile.cells))
