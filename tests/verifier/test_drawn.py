"""Drawn tokens: what is screened in float64 and judged in integers; an honest one never falls, cheats do."""

from dataclasses import replace

import numpy as np
import pytest

from bench.sampling import ASKED, ERRORS, REQUESTS, SHAPES, audit, cheats
from tests.verifier import tiny
from verifier import sampling
from verifier.audit import Auditor
from verifier.commit import LIMITED, Output, Request
from verifier.program import Kind
from verifier.referee import sampling as clear
from verifier.referee.codec import FOLD
from verifier.referee.fixed import Q30
from worker.sampler import Draw as Place
from worker.sampler import choose

POSITIONS, PROMPT = 12, 5
DRAWN = Request((1,) * PROMPT, POSITIONS - PROMPT + 1, temperature=1 << 16, top_k=30, top_p=60000, seed=77)


@pytest.mark.parametrize("seed", range(24))
def test_whole_vectors_equal_the_referee_token_by_token(seed: int) -> None:
    random = np.random.default_rng(seed)
    logits = random.normal(0, random.choice([0.01, 1.0, 300.0]), 300)
    logits[random.integers(0, 300, 50)] = logits[0]  # ties
    exact, margin = np.rint(logits * Q30).astype(np.int64), int(random.choice([0, 1, 1 << 24, 1 << 30]))
    token, unit = (int(t) for t in random.integers(0, 300, 2))
    parameters = (int(random.choice([1, 30000, 1 << 16, 1 << 22])), 5, int(random.choice([1, 30000, 65535, 65536])))
    draw = clear.Draw(*parameters, 9, 8, 7, token, token if seed % 3 == 0 else unit, 0)
    own, largest = int(exact[draw.unit]), int(exact.max())
    chunks = [(replace(draw, first=c), [int(v) for v in exact[c : c + FOLD]]) for c in range(0, 300, FOLD)]
    assert sampling.rank_chunks(exact, margin, draw) == [clear.rank(part, own, margin, at) for at, part in chunks]
    masses = [clear.mass(part, own, largest, margin, at) for at, part in chunks]
    assert sampling.mass_chunks(exact, largest, margin, draw) == masses


def test_noise_rows_are_the_noise_of_each_position() -> None:
    rows = sampling.noise_rows(3, 4, range(10, 13), 50)
    assert [row.tolist() for row in rows] == [sampling.noise(3, 4, t, 50).tolist() for t in (10, 11, 12)]


@pytest.mark.parametrize("errors", ERRORS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", REQUESTS)
def test_honest_tokens_are_never_convicted(shape: str, errors: str, name: str) -> None:
    seen = audit(400, 200, shape, errors, replace(REQUESTS[name], seed=11), index=3)
    assert seen.convicted == 0 and seen.worst < 1


@pytest.mark.parametrize("name", [name for name in cheats(1) if name != "one token in a hundred at will"])
def test_every_cheat_is_convicted(name: str) -> None:
    asked = ASKED["temperature 1, top_k 40, top_p 0.9"]
    if name == "no top_p":  # top_k leaves little for it to forbid
        asked = replace(asked, top_k=0)
    seen = audit(400, 200, "plain", "rounded", asked, cheats(200)[name])
    assert seen.convicted > 0
    assert seen.suspicious - seen.convicted <= 2  # what is screened as wrong is wrong but for the very edge


def test_a_token_that_anything_allows_is_judged_by_noise_alone() -> None:
    """All logits equal: the token with the largest noise is right, all others are wrong by how far theirs is less."""
    flat = np.zeros(64, dtype=np.int64)
    noise = sampling.noise(5, 0, 0, 64)
    best, second = (int(t) for t in noise.argsort()[::-1][:2])
    lead = int(noise[best] - noise[second])
    draw = clear.Draw(1 << 16, 0, 1 << 16, 5, 0, 0, second, best, 0)
    assert sampling.convicts(flat, lead - 1, draw) and not sampling.convicts(flat, lead, draw)
    assert not sampling.convicts(flat, 0, replace(draw, token=best, unit=second))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tiny.Tiny:
    return tiny.make(tmp_path_factory.mktemp("model"), tiny.config(), POSITIONS)


def drawn(model: tiny.Tiny, request: Request) -> tuple[int, ...]:
    """What an honest last stage draws at each position from the prompt's last on."""
    auditor = Auditor(model.weights, model.profile)
    tiles = [tile.numpy() for _, tile in auditor.reference.logits(model.trace.arrays["out"][PROMPT - 1 :])]
    rows = np.concatenate(tiles, axis=1)
    return tuple(choose(row, Place(request, 0, PROMPT - 1 + i)) for i, row in enumerate(rows))


def test_an_audit_acquits_what_was_drawn_and_convicts_another_seed(model: tiny.Tiny) -> None:
    auditor, stage = Auditor(model.weights, model.profile), tiny.whole(model.trace)
    tokens = drawn(model, DRAWN)
    assert all(v.ratio < 1 and v.kind == Kind.SAMPLE for v in auditor.chosen(stage, 0, DRAWN, tokens))

    other = replace(DRAWN, seed=78)
    found = [v for v in auditor.chosen(stage, 0, other, tokens) if v.suspicious]
    assert found and all(auditor.confirm(model.model, v, [stage]) for v in found)
    listed = auditor.request([stage], 0, other, Output(0, len(tokens), LIMITED, tokens))
    assert {(v.position, v.unit) for v in listed if v.kind == Kind.SAMPLE} == {(v.position, v.unit) for v in found}


def test_an_audit_sees_a_token_that_was_not_allowed(model: tiny.Tiny) -> None:
    auditor, stage = Auditor(model.weights, model.profile), tiny.whole(model.trace)
    strict = replace(DRAWN, top_k=1, top_p=1 << 16)
    tokens = list(drawn(model, strict))
    worst = auditor.tokens(stage, 0, PROMPT, tokens)
    assert max(v.ratio for v in worst) == 0  # top_k 1 is greedy, whatever the noise
    tokens[2] = (tokens[2] + 1) % model.shape.vocabulary
    (found,) = [v for v in auditor.chosen(stage, 0, strict, tokens) if v.suspicious]
    assert found.position == PROMPT + 1
    assert found.unit in (tokens[2], worst[2].token)
    assert auditor.confirm(model.model, found, [stage])
    membership = replace(found, unit=tokens[2])
    assert auditor.confirm(model.model, membership, [stage])
