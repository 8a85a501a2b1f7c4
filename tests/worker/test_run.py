"""Whole batches through one, two and three stages."""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.worker.pipeline_in_process import JOB, Greedy, Stamp, Tiny, serve, split, wire, within
from verifier.audit import Auditor
from verifier.audit import Stage as AuditedStage
from verifier.commit import Request, StageTree, TraceNode, make_outputs, outputs_root
from verifier.referee import floats
from verifier.tolerance import uniform_profile
from verifier.trace import RequestTrace
from worker import ring_pb2 as pb
from worker.batch import Batch
from worker.cache import Cache
from worker.channel import Peer
from worker.config import Serving
from worker.errors import BadHandoff, BadMessage, JobFailed, OutOfRange
from worker.handoff import Handoff
from worker.job import JobState, Phase
from worker.recorder import trace_path
from worker.run import Run
from worker.stage import Captured, Forward, Stage


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_tokens_equal_transformers_greedy(
    tiny: Tiny, requests_batch: list[Request], greedy: Greedy, tmp_path: Path, parts: int
) -> None:
    folder, model = tiny
    states = serve(tmp_path, split(folder, 3, parts), requests_batch)
    expected = [greedy(model, request) for request in requests_batch]
    for state in (states[0], states[-1]):
        assert [list(ids) for ids in state.tokens] == expected
    assert states[-1].outputs == outputs_root(make_outputs(expected, requests_batch))
    assert all(state.phase is Phase.FINISHED for state in states)
    for before, after in pairwise(states):
        assert after.received == before.sent
        assert [n.positions for n in before.nodes] == [n.positions for n in after.nodes]
    if parts > 1:
        assert states[0].received == states[-1].sent


def test_stops_end_a_request(tiny: Tiny, requests_batch: list[Request], greedy: Greedy, tmp_path: Path) -> None:
    folder, model = tiny
    free = greedy(model, requests_batch[0])
    stopping = replace(requests_batch[0], stops=(free[2],))
    states = serve(tmp_path, split(folder, 3, 2), [stopping, requests_batch[1]])
    assert list(states[0].tokens[0]) == free[: free.index(free[2]) + 1]


@pytest.mark.parametrize("model_name", ["tiny", "tiny_bf16"])
def test_link_rule_holds_bit_for_bit(
    request: pytest.FixtureRequest, model_name: str, requests_batch: list[Request], tmp_path: Path
) -> None:
    """next h = (h + attn_out) + mlp_out in the served dtype, within a stage and across the boundary."""
    folder, _ = request.getfixturevalue(model_name)
    stages = split(folder, 3, 2)
    serve(tmp_path, stages, requests_batch)
    shape = stages[0].shape
    for r in range(len(requests_batch)):
        traces = [RequestTrace.load(trace_path(tmp_path / str(i) / "jobs" / JOB.hex(), r), shape) for i in range(2)]
        arrays = {**traces[0].arrays, **traces[1].arrays}
        for layer in range(3):
            follows = arrays[f"{layer + 1}.h"] if layer < 2 else arrays["out"]
            h, attention, mlp = (arrays[f"{layer}.{name}"] for name in ("h", "attn_out", "mlp_out"))
            for t, c in np.ndindex(*h[:6, ::5].shape):
                c *= 5
                middle = floats.add(shape.served_dtype, int(h[t, c]), int(attention[t, c]))
                assert floats.add(shape.served_dtype, middle, int(mlp[t, c])) == int(follows[t, c])


def test_roots_equal_those_of_the_stored_traces(tiny_bf16: Tiny, requests_batch: list[Request], tmp_path: Path) -> None:
    folder, _ = tiny_bf16
    stages = split(folder, 3, 2)
    for name, serving in (("small", Serving(max_rows=3, microbatches=2)), ("large", Serving(max_rows=64))):
        states = serve(tmp_path / name, stages, requests_batch, serving)
        for i, state in enumerate(states):
            path = tmp_path / name / str(i) / "jobs" / JOB.hex()
            traces = [RequestTrace.load(trace_path(path, r), stages[i].shape) for r in range(len(requests_batch))]
            nodes = [TraceNode(trace.positions, trace.tensors_root) for trace in traces]
            assert tuple(nodes) == state.nodes
            assert StageTree(nodes).root == state.root


def test_h_of_layer_0_is_the_embedding(tiny_bf16: Tiny, requests_batch: list[Request], tmp_path: Path) -> None:
    folder, _ = tiny_bf16
    stages = split(folder, 3, 1)
    (state,) = serve(tmp_path, stages, requests_batch)
    table = stages[0].weights.raw("model.embed_tokens.weight")
    for r, request in enumerate(requests_batch):
        trace = RequestTrace.load(trace_path(tmp_path / "0" / "jobs" / JOB.hex(), r), stages[0].shape)
        fed = [*request.prompt, *state.tokens[r][:-1]]
        assert np.array_equal(trace.arrays["0.h"], table[fed])


class Overflowing(Stage):
    def observe(self, context: Forward, key: str, tensor: torch.Tensor) -> torch.Tensor:
        return super().observe(context, key, torch.full_like(tensor, 2.0**20) if key == "1.mlp_out" else tensor)


def test_a_tensor_out_of_range_fails_the_job_before_anything_is_signed(
    tiny: Tiny, requests_batch: list[Request], tmp_path: Path
) -> None:
    folder, _ = tiny
    with pytest.raises(OutOfRange, match=r"1\.mlp_out, request 0, position 0, column 0"):
        serve(tmp_path, [Overflowing(folder, 0, 3)], requests_batch[:1], Serving(attempts=1))


class Failing(Stage):
    """Breaks in the middle of the first attempt."""

    calls = 0

    def forward(self, hidden: torch.Tensor, batch: Batch, cache: Cache) -> tuple[torch.Tensor, Captured]:
        self.calls += 1
        if self.calls == 3:
            raise RuntimeError("the device is lost")
        return super().forward(hidden, batch, cache)


@pytest.mark.parametrize("broken", [0, 1, 2])
def test_a_broken_attempt_is_followed_by_another(
    tiny: Tiny, requests_batch: list[Request], greedy: Greedy, tmp_path: Path, broken: int
) -> None:
    folder, model = tiny
    stages = split(folder, 3, 3)
    stages[broken] = Failing(folder, broken, broken + 1)
    states = serve(tmp_path, stages, requests_batch)
    assert [state.attempt for state in states] == [2, 2, 2]
    assert [list(ids) for ids in states[0].tokens] == [greedy(model, request) for request in requests_batch]


class Aborting:
    """A successor whose ring gives up as it takes the first rows; it takes them `turns` of the loop later."""

    def __init__(self, run: Run, turns: int) -> None:
        self.run = run
        self.turns = turns
        self.told = asyncio.Event()

    async def send(self, envelope: pb.Envelope) -> None:
        abort = pb.Envelope(job=JOB, attempt=envelope.attempt, abort=pb.Abort(reason="lost"))
        await self.run.receive(Peer("stage 1", "stage 1", b""), abort)
        self.told.set()
        for _ in range(self.turns):
            await asyncio.sleep(0)

    def drop(self, job: bytes, attempt: int) -> None:
        pass


def test_an_abort_that_comes_as_a_message_is_taken_ends_the_attempt(
    tiny: Tiny, requests_batch: list[Request], tmp_path: Path
) -> None:
    """Whatever the turn of the loop in which the two meet."""
    folder, _ = tiny
    stage = Stage(folder, 0, 2)

    async def work(turns: int) -> None:
        with ThreadPoolExecutor(1) as compute:
            (run, _) = wire(tmp_path / str(turns), [stage, stage], requests_batch, Serving(attempts=1), compute)
            run._successor = Aborting(run, turns)
            run.start()
            try:
                with pytest.raises(JobFailed, match="a stage gave up: lost"):
                    await within(60, run.finished)
            finally:
                await run.close("the test is over")

    for turns in range(12):
        asyncio.run(work(turns))


def test_a_job_given_up_as_its_attempt_breaks_begins_no_other(
    tiny: Tiny, requests_batch: list[Request], tmp_path: Path
) -> None:
    """Whatever the turn of the loop in which the two meet."""
    folder, _ = tiny
    stage = Stage(folder, 0, 2)

    async def work(turns: int) -> None:
        with ThreadPoolExecutor(1) as compute:
            (run, _) = wire(tmp_path / str(turns), [stage, stage], requests_batch, Serving(), compute)
            run._successor = successor = Aborting(run, 1_000_000)
            run.start()
            await successor.told.wait()
            for _ in range(turns):
                await asyncio.sleep(0)
            await within(60, run.close("given up"))
            with pytest.raises(JobFailed, match="given up"):
                await run.finished
            assert run.state.attempt == 1

    for turns in range(12):
        asyncio.run(work(turns))


def test_the_audit_finds_an_honest_trace_within_tolerance(
    tiny_bf16: Tiny, requests_batch: list[Request], tmp_path: Path
) -> None:
    folder, _ = tiny_bf16
    stages = split(folder, 3, 2)
    serve(tmp_path, stages, requests_batch)
    auditor = Auditor(stages[0].weights, uniform_profile(stages[0].shape, 1, 8, 1 << 24, 1 << 30))
    r = 2
    parts = [
        AuditedStage(i, RequestTrace.load(trace_path(tmp_path / str(i) / "jobs" / JOB.hex(), r), stages[0].shape))
        for i in range(2)
    ]
    for part, receiver in ((parts[0], parts[1]), (parts[1], None)):
        for layer in range(part.trace.first_layer, part.trace.end_layer):
            for audit in auditor.layer(part, r, layer):
                assert audit.worst().ratio < 0.5, audit.worst()
            link = auditor.link(part, r, layer, receiver)
            assert link is not None and link.worst().ratio == 0


async def deliver(runs: list[Run], stage: int, **fields: object) -> None:
    body = pb.Envelope(job=JOB, attempt=1, **fields)
    await runs[stage].receive(Peer("stage 0", "stage 0", b""), body)


def rows_of(first: int, count: int, request: int = 0, ended: Sequence[int] = (), busy: int = 0) -> pb.Rows:
    hidden = pb.Tensor(dtype=2, shape=[count, 64], data=bytes(256 * count))
    pieces = [pb.Piece(request=request, first=first, count=count)]
    return pb.Rows(pieces=pieces, hidden=hidden, ended=ended, times=pb.Times(busy=busy))


@pytest.mark.parametrize(
    ("rows", "what"),
    [
        (rows_of(1, 2), "expected position 0, came 1"),
        (rows_of(0, 2, request=9), "expected a request below 5, came 9"),
        (rows_of(0, 11), "expected at most 10 positions, came 11"),
        (rows_of(0, 2, ended=[1, 5]), "ended: expected a request below 5, each once, came 5"),
        (rows_of(0, 2, ended=[1, 1]), "ended: expected a request below 5, each once, came 1"),
    ],
)
def test_rows_out_of_place_break_the_attempt(
    tiny: Tiny,
    requests_batch: list[Request],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    rows: pb.Rows,
    what: str,
) -> None:
    folder, _ = tiny

    async def work() -> None:
        with ThreadPoolExecutor(1) as compute:
            runs = wire(tmp_path, split(folder, 3, 2), requests_batch, Serving(), compute)
            await deliver(runs, 1, sequence=0, rows=rows)
            await asyncio.sleep(0.3)
            for run in runs:
                await run.close("the test is over")

    asyncio.run(work())
    assert f"stage 0: request 0: {what}" in caplog.text or f"stage 0: {what}" in caplog.text


def test_a_stage_0_that_asks_for_more_room_than_there_is_breaks_the_attempt(
    tiny: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It knows how much a stage has; all requests of a job at once are not it."""
    requests = [Request((1, 2, 3), 5)] * 4

    async def nothing(peer: Peer, envelope: pb.Envelope) -> None:
        pass

    async def work() -> None:
        with ThreadPoolExecutor(1) as compute:
            runs = wire(tmp_path, split(tiny[0], 3, 2), requests, Serving(cache_positions=20), compute)
            link: Any = runs[1]._successor
            link.target = SimpleNamespace(receive=nothing)
            for request in range(3):
                await deliver(runs, 1, sequence=request, rows=rows_of(0, 3, request))
            while not runs[1]._broken:
                await asyncio.sleep(0.01)
            assert runs[1]._homes.admitted == {0, 1}
            for run in runs:
                await run.close("the test is over")

    asyncio.run(within(60, work()))
    assert "stage 0: request 2: expected it once there is room for its 8 positions" in caplog.text


def test_a_gap_in_the_sequence_drops_the_sender(tiny: Tiny, requests_batch: list[Request], tmp_path: Path) -> None:
    folder, _ = tiny

    async def work() -> None:
        with ThreadPoolExecutor(1) as compute:
            runs = wire(tmp_path, split(folder, 3, 2), requests_batch, Serving(), compute)
            await deliver(runs, 1, sequence=0, rows=rows_of(0, 2))
            with pytest.raises(BadMessage, match="stage 0: expected message 1, came 3"):
                await deliver(runs, 1, sequence=3, rows=rows_of(2, 2))
            with pytest.raises(BadMessage, match="attempt 1001 of at most 1000"):
                await runs[1].receive(Peer("stage 0", "", b""), pb.Envelope(job=JOB, attempt=1001, rows=rows_of(0, 1)))
            for run in runs:
                await run.close("the test is over")

    asyncio.run(work())


class Forger(Stamp):
    def sign_handoff(self, job: bytes, stage: int, root: bytes, leaves: int) -> bytes:
        return b"forged"

    def verify_handoff(self, job: bytes, stage: int, handoff: Handoff) -> bool:
        return handoff.signature == Stamp().sign_handoff(job, stage, handoff.root, handoff.leaves)


def test_a_wrong_signature_fails_the_job_naming_the_sender(
    tiny: Tiny, requests_batch: list[Request], tmp_path: Path
) -> None:
    folder, _ = tiny

    async def work() -> None:
        with ThreadPoolExecutor(1) as compute:
            runs = wire(tmp_path, split(folder, 3, 2), requests_batch, Serving(), compute)
            runs[0]._notary = Forger()
            for run in runs:
                run.start()
            with pytest.raises(BadHandoff, match="stage 0: its hand-off is not signed with its key"):
                await within(300, runs[1].finished)
            assert runs[1].folder.load_state().phase is Phase.FAILED
            await runs[0].close("the test is over")

    asyncio.run(work())


def test_a_sealed_stage_finishes_after_a_restart(tiny: Tiny, requests_batch: list[Request], tmp_path: Path) -> None:
    folder, _ = tiny
    stages = split(folder, 3, 2)
    before = serve(tmp_path, stages, requests_batch)

    async def work() -> list[JobState]:
        with ThreadPoolExecutor(1) as compute:
            runs = wire(tmp_path, stages, requests_batch, Serving(), compute)
            for i, run in enumerate(runs):
                run.folder.save_state(
                    replace(before[i], phase=Phase.SEALED, received=None if i == 0 else before[i].received)
                )
            again = []
            for run in runs:
                again.append(
                    Run(
                        run.folder,
                        run.folder.load_state(),
                        requests_batch,
                        run._stage,
                        Serving(),
                        Stamp(),
                        compute,
                        run._successor,
                        "p",
                    )
                )
            again[0]._successor.target, again[1]._successor.target = again[1], again[0]  # type: ignore[union-attr]
            for run in again:
                run.start()
            return list(await within(900, asyncio.gather(*(run.finished for run in again))))

    assert asyncio.run(work()) == before


def test_the_tokens_so_far_are_told_by_the_first_stage_too(
    tiny: Tiny, requests_batch: list[Request], tmp_path: Path
) -> None:
    folder, _ = tiny
    seen: list[int] = []
    runs: list[Run] = []

    class Asked(Stage):
        def forward(self, hidden: torch.Tensor, batch: Batch, cache: Cache) -> tuple[torch.Tensor, Captured]:
            seen.append(sum(map(len, runs[0].tokens)))
            return super().forward(hidden, batch, cache)

    async def work() -> None:
        with ThreadPoolExecutor(1) as compute:
            stages = [Stage(folder, 0, 2), Asked(folder, 2, 3)]
            runs.extend(wire(tmp_path, stages, requests_batch, Serving(max_rows=16), compute))
            for run in runs:
                run.start()
            await within(300, asyncio.gather(*(run.finished for run in runs)))

    asyncio.run(work())
    assert seen == sorted(seen) and 0 < seen[-1] < sum(map(len, runs[0].tokens))
