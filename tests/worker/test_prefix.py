"""What prompts begin with alike is computed once, and nothing that a job commits to tells."""

import asyncio
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench._pipeline import Wire
from tests.worker.pipeline_in_process import JOB, Greedy, Tiny, serve, split, wire, within
from verifier.audit import Auditor
from verifier.audit import Stage as AuditedStage
from verifier.commit import Request
from verifier.tolerance import uniform_profile
from verifier.trace import RequestTrace
from worker import ring_pb2 as pb
from worker.batch import Batch, Piece, Token
from worker.cache import PAGE, Cache
from worker.channel import Peer
from worker.config import Serving
from worker.homes import Homes
from worker.job import JobState
from worker.ledger import Ledger
from worker.pace import Pace
from worker.prefix import Prefixes
from worker.recorder import trace_path
from worker.repeat import RepeatableStage
from worker.run import Run
from worker.scheduler import Scheduler
from worker.stage import Captured, Stage
from worker.swap import SwappingCache

SHARED = Serving(max_rows=24, microbatches=3, attempts=2)
ALONE = replace(SHARED, share_prefixes=False)
SYSTEM = tuple((11 * t + 5) % 211 for t in range(50))


@st.composite
def batches(draw: st.DrawFn, longest: int = 90) -> list[Request]:
    """Prompts that go on where another's beginning ends, anywhere in it; some are the same or end within."""
    requests: list[Request] = []
    for r in range(draw(st.integers(2, 8))):
        prompt: tuple[int, ...] = ()
        if r and draw(st.integers(0, 4)):
            before = draw(st.sampled_from(requests)).prompt
            prompt = before[: draw(st.sampled_from([len(before), draw(st.integers(1, len(before)))]))]
        more = min(draw(st.integers(0 if prompt else 1, 60)), longest - len(prompt))
        dice = random.Random(draw(st.integers(0, 2**16)))
        requests.append(Request(prompt + tuple(dice.randrange(211) for _ in range(more)), draw(st.integers(1, 6))))
    return requests


# ---- who computes what


def common(one: Sequence[int], other: Sequence[int]) -> int:
    return next((t for t, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


@given(
    batches(300),
    st.integers(1, 200),
    st.integers(1, 6),
    st.integers(1, 900),
    st.booleans(),
    st.randoms(),
    st.booleans(),
)
def test_a_page_is_computed_once_among_the_requests_in_flight(
    requests: list[Request], rows: int, flights: int, room: int, swaps: bool, dice: random.Random, kept: bool
) -> None:
    homes = Homes(requests, room, 128, 300) if swaps else Homes(requests, room)
    tokens = [[1] * dice.randrange(request.limit) for request in requests] if kept else ()
    prefixes = Prefixes([request.prompt for request in requests])
    pace = Pace(2, flights)
    scheduler = Scheduler(requests, max_rows=rows, pace=pace, homes=homes, kept=tokens, prefixes=prefixes)
    done, chosen, here = [0] * len(requests), [0] * len(requests), set(range(len(requests)))
    flying: list[Batch] = []
    while not scheduler.done:
        batch = scheduler.next()
        here -= set(scheduler.ended())
        if batch is not None:
            assert 0 < batch.rows <= rows
            begun = {r for r in here if done[r]}
            for piece in batch.pieces:
                r, prompt = piece.request, requests[piece.request].prompt
                if piece.donor is None:
                    assert piece.first == done[r]
                else:
                    assert done[r] == 0 < piece.first and piece.donor in here and done[piece.donor] >= piece.first
                    assert prompt[: piece.first] == requests[piece.donor].prompt[: piece.first]
                if r not in begun:  # whoever began before has no more of its beginning, and does not compute more
                    most = max((common(prompt, requests[other].prompt) for other in begun), default=0)
                    assert piece.first == min(most, len(prompt) - 1) // PAGE * PAGE
                    begun.add(r)
            for piece in batch.pieces:
                done[piece.request] = piece.end
            flying.append(batch)
        else:
            assert flying, "nothing is in flight, and nothing goes"
        while flying and (batch is None or dice.random() < 0.3):
            batch, came = flying.pop(0), []
            for piece in batch.pieces:
                length = len(requests[piece.request].prompt)
                for position in range(max(piece.first, length - 1), piece.end):
                    came.append(Token(piece.request, position + 1 - length, 1))
                    chosen[piece.request] += 1
            scheduler.returned(came)
    assert chosen == [request.limit for request in requests]
    assert done == [len(request.prompt) + request.limit - 1 for request in requests]


def ask(*prompts: Sequence[int], limit: int = 2) -> list[Request]:
    return [Request(tuple(prompt), limit) for prompt in prompts]


def scheduled(requests: Sequence[Request], room: int, rows: int = 64) -> Scheduler:
    prefixes = Prefixes([request.prompt for request in requests])
    return Scheduler(requests, max_rows=rows, pace=Pace(1), homes=Homes(requests, room), prefixes=prefixes)


def pieces(scheduler: Scheduler) -> tuple[Piece, ...]:
    batch = scheduler.next()
    assert batch is not None
    return batch.pieces


def test_who_asks_the_same_computes_its_last_page_alone() -> None:
    scheduler = scheduled(ask(SYSTEM[:32], SYSTEM[:32], SYSTEM[:33]), 1000)
    assert pieces(scheduler) == (Piece(0, 0, 32),)
    scheduler.returned([Token(0, 0, 7)])
    assert pieces(scheduler) == (Piece(2, 32, 1, donor=0), Piece(0, 32, 1), Piece(1, 16, 16, donor=0))
    assert scheduler.taken_positions == 48


def test_a_prompt_in_chunks_is_waited_for() -> None:
    scheduler = scheduled(ask(SYSTEM, (*SYSTEM[:48], 1), (7,) * 9), 1000, rows=20)
    assert pieces(scheduler) == (Piece(0, 0, 20),)
    scheduler.returned([])
    assert pieces(scheduler) == (Piece(2, 0, 9), Piece(0, 20, 11))
    scheduler.returned([Token(2, 0, 7)])
    assert pieces(scheduler) == (Piece(2, 9, 1), Piece(0, 31, 19))
    scheduler.returned([Token(2, 1, 7), Token(0, 0, 7)])
    assert pieces(scheduler) == (Piece(1, 48, 1, donor=0), Piece(0, 50, 1))


def test_who_has_left_gives_nothing() -> None:
    """The first of three leaves before the second has room, and the second before the third."""
    scheduler = scheduled(ask(SYSTEM, SYSTEM, limit=1), 60)
    assert pieces(scheduler) == (Piece(0, 0, 50),)
    scheduler.returned([Token(0, 0, 7)])
    assert pieces(scheduler) == (Piece(1, 0, 50),) and scheduler.ended() == [0]


def test_who_took_it_gives_it_on() -> None:
    scheduler = scheduled([Request(SYSTEM, 2), Request(SYSTEM, 9), Request(SYSTEM, 1)], 111)
    assert pieces(scheduler) == (Piece(0, 0, 50),)
    scheduler.returned([Token(0, 0, 7)])
    assert pieces(scheduler) == (Piece(0, 50, 1), Piece(1, 48, 2, donor=0))
    scheduler.returned([Token(0, 1, 7), Token(1, 0, 7)])
    assert pieces(scheduler) == (Piece(1, 50, 1), Piece(2, 48, 2, donor=1))


# ---- what is copied

HEADS, SIZE, LAYERS = 2, 4, 2


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32), ahead=st.integers(0, 3), residents=st.integers(0, 6))
def test_who_takes_positions_reads_what_the_donor_reads(seed: int, ahead: int, residents: int) -> None:
    """`residents` of six live on the device, the others on the host: each may take from each, and go on by itself."""
    dice = random.Random(seed)
    cache = SwappingCache(HEADS, SIZE, torch.float32, torch.device("cpu"), range(LAYERS), 8 * PAGE)
    held: dict[int, list[float]] = {}  # what each position of each request holds
    told: list[tuple[Batch, dict[int, list[float]]]] = []
    number = 0.0
    for _ in range(20):
        chosen: list[Piece] = []
        before = {r: len(rows) for r, rows in held.items()}
        for r in dice.sample(range(6), dice.randint(1, 4)):
            donors = [d for d, length in before.items() if length and d != r] if r not in held else []
            donor = dice.choice(donors) if donors and dice.random() < 0.8 else None
            if donor is not None:
                held[r] = held[donor][: dice.randint(1, before[donor])]
            first = len(held.setdefault(r, []))
            chosen.append(Piece(r, first, dice.choice([1, 1, dice.randint(1, 20)]), donor))
            held[r] += [number + t for t in range(chosen[-1].count)]
            number += chosen[-1].count
        batch = Batch(tuple(chosen))
        cache.coming(batch, {piece.request: 4000 for piece in chosen if piece.request >= residents})
        told.append((batch, {r: list(rows) for r, rows in held.items()}))
        while len(told) > ahead:
            _visit(cache, *told.pop(0))
        if not told and dice.random() < 0.3:
            gone = dice.choice(sorted(held))
            cache.drop(gone)
            del held[gone]
    while told:
        _visit(cache, *told.pop(0))


@torch.inference_mode()
def _visit(cache: SwappingCache, batch: Batch, held: dict[int, list[float]]) -> None:
    def rows(piece: Piece, layer: int) -> torch.Tensor:
        numbers = torch.tensor(held[piece.request][piece.first : piece.end]) + 0.25 * layer
        return numbers[:, None, None].expand(-1, HEADS, SIZE)

    with cache.holding(batch):
        cache.share(batch)
        cache.extend(batch)
        places = cache.places([piece for piece in batch.pieces if piece.count == 1])
        for layer in range(LAYERS):
            new = torch.cat([rows(piece, layer) for piece in batch.pieces])
            cache.write(layer, cache.rows(batch), new, -new)
            for piece in batch.pieces:
                keys, values = cache.read(layer, cache.slots(piece))
                expected = rows(Piece(piece.request, 0, piece.end), layer).transpose(0, 1)[None]
                assert torch.equal(keys, expected) and torch.equal(values, -expected)
            for group, view in places:
                keys, _ = cache.read(layer, view)
                for i, piece in enumerate(group):
                    expected = rows(Piece(piece.request, 0, piece.end), layer).transpose(0, 1)
                    assert torch.equal(keys[i, :, : piece.end], expected)
        for piece in batch.pieces:
            cache.advance(piece.request, piece.count)
            assert cache.positions(piece.request) == piece.end


def test_rows_that_two_requests_have_stay_until_both_are_taken() -> None:
    ledger, bits = Ledger(), np.random.default_rng(1).integers(0, 60_000, (40, 264)).astype(np.uint16)

    def add(request: int, first: int, end: int) -> None:
        rows = bits[first:end]
        ledger.add(Batch((Piece(request, first, end - first),)), {"0.h": rows[:, :256], "0.v": rows[:, 256:]})

    add(0, 0, 20)
    ledger.share(1, 0, 16)
    add(1, 16, 30)
    ledger.share(2, 1, 16)
    assert np.array_equal(ledger.rows(2, "0.v", 5), bits[:5, 256:])
    for request, end in ((0, 20), (1, 30), (2, 16)):
        alone = Ledger()
        alone.add(Batch((Piece(0, 0, end),)), {"0.h": bits[:end, :256], "0.v": bits[:end, 256:]})
        arrays, roots = ledger.take(request)
        assert np.array_equal(np.hstack([arrays["0.h"], arrays["0.v"]]), bits[:end])
        assert roots == alone.take(0)[1]
        add(3 + request, 0, 40)  # who comes takes no room that somebody has
    for request in range(6, 40):  # and all the room that nobody has any more
        ledger.take(request - 3)
        add(request, 0, 20)
        ledger.share(1000, request, 16)
        ledger.take(1000)
        add(request, 20, 40)
    assert ledger.held_bytes == 256 * (264 * 2 + 32)


# ---- whole jobs


class Noting(RepeatableStage):
    """Notes the pieces it computes; breaks at some call."""

    at = 0
    seen: list[Piece]

    def forward(self, hidden: torch.Tensor, batch: Batch, cache: Cache) -> tuple[torch.Tensor, Captured]:
        self.seen = [*getattr(self, "seen", []), *batch.pieces]
        self.at -= 1
        if not self.at:
            raise RuntimeError("the device is lost")
        return super().forward(hidden, batch, cache)


def told(states: Sequence[JobState]) -> list[object]:
    """All that a job commits to and signs."""
    return [(state.tokens, state.root, state.nodes, state.sent, state.received, state.outputs) for state in states]


@pytest.fixture(scope="module")
def repeatable(tiny: Tiny) -> list[Stage]:
    return split(tiny[0], 3, 2, RepeatableStage)


SWAPPED = replace(SHARED, cache_positions=100, swap_positions=128, host_positions=400)
WAYS = {
    "as ever": SHARED,
    "few at a time": replace(SHARED, cache_positions=120),
    "swapped": SWAPPED,
    "regenerated": replace(SHARED, retain="regenerate"),
    "swapped and regenerated": replace(SWAPPED, retain="regenerate"),
}


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=8)
@given(requests=batches())
def test_tokens_roots_and_handoffs_are_those_of_requests_served_alone(
    repeatable: list[Stage], requests: list[Request], way: str
) -> None:
    with TemporaryDirectory() as folder:
        shared = serve(Path(folder) / "shared", repeatable, requests, WAYS[way])
        assert told(shared) == told(serve(Path(folder) / "alone", repeatable, requests, ALONE))


@pytest.mark.parametrize("parts", [1, 3])
def test_tokens_are_greedy_and_traces_audit_clean(tiny: Tiny, greedy: Greedy, tmp_path: Path, parts: int) -> None:
    """Of stages whose shapes follow from what is batched: a donor's rows are as good as the request's own."""
    folder, model = tiny
    requests = ask(*((*SYSTEM, r, 2 * r, 9) for r in range(5)), SYSTEM[:40], SYSTEM, (5, 6), limit=8)
    stages = split(folder, 3, parts)
    states = serve(tmp_path, stages, requests, SHARED)
    assert [list(ids) for ids in states[0].tokens] == [greedy(model, request) for request in requests]
    auditor = Auditor(stages[0].weights, uniform_profile(stages[0].shape, 1, 8, 1 << 24, 1 << 30))
    for r, request in enumerate(requests):
        paths = [trace_path(tmp_path / str(i) / "jobs" / JOB.hex(), r) for i in range(parts)]
        audited = [AuditedStage(i, RequestTrace.load(path, stages[0].shape)) for i, path in enumerate(paths)]
        assert all(part.trace.positions == len(request.prompt) + 7 for part in audited)
        for part, receiver in zip(audited, [*audited[1:], None], strict=True):
            for layer in range(part.trace.first_layer, part.trace.end_layer):
                assert all(audit.worst().ratio < 0.5 for audit in auditor.layer(part, r, layer))
                link = auditor.link(part, r, layer, receiver)
                assert link is not None and link.worst().ratio == 0


def test_shared_rows_are_neither_computed_nor_sent(tiny: Tiny, tmp_path: Path) -> None:
    requests = ask(*((*SYSTEM, r) for r in range(6)))
    sent: dict[bool, int] = {}
    for serving in (SHARED, ALONE):
        stages = split(tiny[0], 3, 2, Noting)

        async def work(serving: Serving = serving, stages: list[Stage] = stages) -> None:
            with ThreadPoolExecutor(1) as compute:
                runs = wire(tmp_path / str(serving.share_prefixes), stages, requests, serving, compute)
                for run in runs:
                    run.start()
                await within(60, asyncio.gather(*(run.finished for run in runs)))
                link = runs[0]._successor
                assert isinstance(link, Wire)
                sent[serving.share_prefixes] = sum(m.rows.hidden.shape[0] for m in link.sent if m.HasField("rows"))

        asyncio.run(work())
        assert all(sum(p.count for p in stage.seen) == sent[serving.share_prefixes] for stage in stages)  # type: ignore[attr-defined]
    assert sent == {False: 6 * 52, True: 6 * 52 - 5 * 48}


@pytest.mark.parametrize("broken", [0, 1])
@pytest.mark.parametrize("at", [3, 6, 11])
def test_an_attempt_that_breaks_is_followed_by_one_that_shares_again(
    tiny: Tiny, tmp_path: Path, broken: int, at: int
) -> None:
    requests = ask(*((*SYSTEM, r) for r in range(4)), SYSTEM[:33], (1, 2), limit=9)
    stages = split(tiny[0], 3, 2, Noting)
    stages[broken].at = at  # type: ignore[attr-defined]
    states = serve(tmp_path / "broken", stages, requests, SHARED)
    assert [state.attempt for state in states] == [2, 2]
    assert sum(piece.donor is not None for piece in stages[1].seen) >= 4  # type: ignore[attr-defined]
    plain = serve(tmp_path / "plain", split(tiny[0], 3, 2, RepeatableStage), requests, ALONE)
    assert [(s.tokens, s.root, s.outputs) for s in states] == [(s.tokens, s.root, s.outputs) for s in plain]


def test_a_stage_with_other_homes_serves_what_comes(tiny: Tiny, tmp_path: Path, repeatable: list[Stage]) -> None:
    """Who takes and who gives live elsewhere there than at stage 0: each on the host or on the device."""
    requests = ask(*((*SYSTEM, r) for r in range(7)), SYSTEM[:33], limit=4)

    async def work() -> list[JobState]:
        with ThreadPoolExecutor(1) as compute:
            runs = wire(tmp_path / "swapped", repeatable, requests, SWAPPED, compute)
            runs[1]._serving = replace(SHARED, cache_positions=16, swap_positions=64, host_positions=64)
            for run in runs:
                run.start()
            return list(await within(60, asyncio.gather(*(run.finished for run in runs))))

    assert told(asyncio.run(work())) == told(serve(tmp_path / "plain", repeatable, requests, ALONE))


# ---- bad peers


async def _deliver(runs: list[Run], sequence: int, pieces: Sequence[pb.Piece], ended: Sequence[int] = ()) -> None:
    rows = sum(piece.count for piece in pieces)
    hidden = pb.Tensor(dtype=2, shape=[rows, 64], data=bytes(256 * rows))
    body = pb.Envelope(job=JOB, attempt=1, sequence=sequence, rows=pb.Rows(pieces=pieces, hidden=hidden, ended=ended))
    await runs[1].receive(Peer("stage 0", "stage 0", b""), body)


@pytest.mark.parametrize(
    ("bad", "ended", "what"),
    [
        (dict(request=1, first=32, donor=9), [], "request 1: expected a donor below 5, came 9"),
        (dict(request=1, first=32, donor=1), [], "expected a donor with 32 positions, request 1 has 0"),
        (dict(request=1, first=32, donor=4), [], "expected a donor with 32 positions, request 4 has 0"),
        (dict(request=1, first=49, donor=0), [], "expected a donor with 49 positions, request 0 has 40"),
        (dict(request=1, first=32, donor=0), [0], "expected a donor with 32 positions, request 0 has ended"),
        (dict(request=1, first=0, donor=0), [], "came 0 for one that has 0"),
        (
            dict(request=2, first=24, donor=0),
            [],
            "expected a donor of 1 .. 23 positions for one that has none, came 24",
        ),
        (dict(request=3, first=3, donor=0), [], "expected a donor of 1 .. 50 positions for one that has none, came 3"),
        (
            dict(request=4, first=3, donor=0),
            [],
            "request 4: expected a donor whose prompt begins with the same 3 tokens",
        ),
    ],
)
def test_what_no_donor_has_is_refused(
    tiny: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture, bad: dict[str, int], ended: list[int], what: str
) -> None:
    requests = ask(SYSTEM, SYSTEM, SYSTEM[:24], (*SYSTEM, 1), (5, 16, 28, 38), limit=9)

    async def work() -> None:
        with ThreadPoolExecutor(1) as compute:
            runs = wire(tmp_path, split(tiny[0], 3, 2), requests, SHARED, compute)
            await _deliver(runs, 0, [pb.Piece(request=0, first=0, count=40), pb.Piece(request=3, first=0, count=3)])
            await _deliver(runs, 1, [pb.Piece(count=1, **bad)], ended)
            await asyncio.sleep(0.3)
            for run in runs:
                await run.close("the test is over")

    asyncio.run(work())
    assert "stage 0: " in caplog.text and what in caplog.text
