"""What prompts begin with alike is computed once, and nothing that a job commits to tells."""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings

from bench._pipeline import Wire
from tests.worker.alike import SYSTEM, ask, batches
from tests.worker.pipeline_in_process import JOB, Greedy, Tiny, serve, split, telling, wire, within
from verifier.audit import Auditor
from verifier.audit import Stage as AuditedStage
from verifier.commit import Request
from verifier.tolerance import uniform_profile
from verifier.trace import RequestTrace
from worker import ring_pb2 as pb
from worker.batch import Batch, Piece
from worker.cache import Cache
from worker.channel import Peer
from worker.config import Serving
from worker.job import JobState
from worker.recorder import trace_path
from worker.repeat import RepeatableStage
from worker.run import Run
from worker.stage import Captured, Stage

SHARED = Serving(max_rows=24, microbatches=3, attempts=2)
ALONE = replace(SHARED, share_prefixes=False)


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
        for stage in range(2):
            names = [path.name for path in (Path(folder) / "shared" / str(stage)).rglob("*.safetensors")]
            dropped = [name for name in names if not name.endswith(".inputs.safetensors")] == []
            assert dropped == (WAYS[way].retain == "regenerate")  # what was taken over comes out again


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
            runs[0]._ready = telling(runs[1]._serving.bounds)
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
            runs = wire(tmp_path, split(tiny[0], 3, 2), requests, replace(SHARED, max_rows=64), compute)
            await _deliver(runs, 0, [pb.Piece(request=0, first=0, count=40), pb.Piece(request=3, first=0, count=3)])
            await _deliver(runs, 1, [pb.Piece(count=1, **bad)], ended)
            await asyncio.sleep(0.3)
            for run in runs:
                await run.close("the test is over")

    asyncio.run(work())
    assert "stage 0: " in caplog.text and what in caplog.text
